#!/usr/bin/env bash
# Set everything up, then run all tests. Arguments go to pytest: tools/test.sh tests/losses -k pruned
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$("$root/tools/setup.sh")"
cd "$root"
# Tests use tiny tensors: more threads would only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest "$@"
