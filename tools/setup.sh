#!/usr/bin/env bash
# Make the Python environment that everything here runs in, from the pins of requirements.txt.
#
#   tools/setup.sh                     makes or repairs .venv; at once when nothing changed
#   SETUP_DEVICE=cuda tools/setup.sh   on a login node: PyTorch's CUDA build where no GPU is yet; cpu: its CPU build
#
# PyTorch is its CUDA build where an NVIDIA GPU is, and a CPU build is replaced there, as after a set-up on another node.
# An active environment (venv or conda) that already satisfies the pins is taken as it is. The only line on stdout is the
# path of the interpreter to use; what is going on is said on stderr. Exit codes: 0 ready, 1 not ready.
# SETUP_PYTHON=/path/to/python3.12 names the Python to make .venv with; otherwise it is python3 on PATH if it is 3.11 to
# 3.13, else another one that can be found and really runs (version managers leave commands behind that do not).
set -euo pipefail

tools="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" program=environment.py
if [ "${1:-}" = --doctor ]; then program=doctor.py && shift; fi  # tools/doctor wants a Python, too
for python in "${SETUP_PYTHON:-python3}" python3.13 python3.12 python3.11 python \
    "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[123]*/bin/python /opt/python*/bin/python3 "$tools/../.venv/bin/python"; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        SETUP_PYTHON="$python" exec "$python" -B "$tools/$program" "$@"
    elif [ -n "${SETUP_PYTHON:-}" ]; then
        break
    fi
done
echo "setup failed: ${SETUP_PYTHON:-nothing that was found} is no Python 3.11, 3.12 or 3.13 with its venv module: install" \
    "one (on Debian and Ubuntu with python3-venv), or name it: SETUP_PYTHON=/path/to/python3.12 tools/setup.sh" >&2
exit 1
