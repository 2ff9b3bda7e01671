#!/usr/bin/env bash
# Build kaldifeat 1.24 and install it into the environment that tools/setup.sh prints: the optional second extractor of
# the training features (features.extractor=kaldifeat).
#
#   tools/install_kaldifeat.sh [--jobs N]     N compilers at a time (default 1); about 7 CPU minutes, 1 GB each
#
# kaldifeat has no wheel, and its CMake would fetch pybind11 from GitHub: both sources come from PyPI here, as pinned
# below, and are checked by hash. A C++17 compiler, make and Python's headers are needed; cmake comes from PyPI where it
# is missing. The build is tied to the installed torch: run this again after torch changes. Exit codes: 0 installed,
# 1 not, 2 wrong usage. To remove it again: python -m pip uninstall kaldifeat
set -euo pipefail

pins="kaldifeat==1.24 --hash=sha256:71f0f696d8c3fa7e536fede7e16e4f4fe347e8f424e22449478bd9f10b9ed935
pybind11==3.1.0 --hash=sha256:a1cc06b524ab3edca51f8ad3895f9c4fa20b8b19283173dff4ae781449dc9639"
cmake_pin="cmake==4.1.2"
setuptools_pin="setuptools==80.9.0"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
say() { printf 'install_kaldifeat: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

jobs=1
while [ $# -gt 0 ]; do
    case "$1" in
        --jobs) jobs="${2:-}"; shift $(($# > 1 ? 2 : 1)) ;;
        --jobs=*) jobs="${1#*=}"; shift ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) say "unknown option $1, see --help"; exit 2 ;;
    esac
    [[ "$jobs" =~ ^[1-9][0-9]*$ ]] || { say "--jobs must be a whole number from 1, got '$jobs'"; exit 2; }
done

# A compiler that compiles, because one whose standard library is missing is common.
compiler="${CXX:-c++}"
printf '#include <optional>\nint main() { std::optional<int> a{0}; return *a; }\n' |
    "$compiler" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null ||
    fail "no C++17 compiler: '$compiler' does not compile; install one (Debian, Ubuntu: sudo apt install g++) or name it with CXX=..."
command -v make >/dev/null || fail "make was not found; install it (Debian, Ubuntu: sudo apt install make)"

python="$("$root/tools/setup.sh")"
"$python" - <<'HEADERS' || fail "the headers of $("$python" -V) are missing (Python.h); install them (Debian, Ubuntu: sudo apt install python3-dev)"
import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").is_file())
HEADERS

# kaldifeat's set-up hands its folder to a shell without quotes.
case "${TMPDIR:-/tmp}" in *[!A-Za-z0-9_./-]*) export TMPDIR=/tmp ;; esac
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
log="$work/log"
step() {
    say "$1"
    shift
    "$@" >>"$log" 2>&1 && return
    grep -E 'error|Error|ERROR' "$log" | head -n 5 | cut -c 1-300 >&2
    kept="$(mktemp "${TMPDIR:-/tmp}/install_kaldifeat.XXXXXX.log")"
    cp "$log" "$kept"
    fail "that failed; the whole output: $kept"
}
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 "$python" -m pip "$@"; }

if ! command -v cmake >/dev/null; then
    step "getting $cmake_pin, which is removed again" pip install --target "$work/cmake" "$cmake_pin"
    mkdir "$work/bin"
    ln -s "$work/cmake/cmake/data/bin/cmake" "$work/bin/cmake"
    export PATH="$work/bin:$PATH"
fi

printf '%s\n' "$pins" >"$work/pins.txt"
step "getting the sources of kaldifeat 1.24 and pybind11 3.1.0" \
    pip download --no-deps --require-hashes --no-binary kaldifeat,pybind11 -d "$work/sources" -r "$work/pins.txt"
step "unpacking pybind11" "$python" -c '
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2], filter="data")
' "$work/sources/pybind11-3.1.0.tar.gz" "$work"

# Without pip's isolation, in which CMake would not see the environment's torch; so its build tool is brought along.
step "getting $setuptools_pin, which is removed again" pip install --target "$work/setuptools" "$setuptools_pin"

quoted="$(printf '%q' "$python")"
export KALDIFEAT_MAKE_ARGS="-j$jobs"
export KALDIFEAT_CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_STANDARD=17 \
-DPYTHON_EXECUTABLE=$quoted -DPython_EXECUTABLE=$quoted -DFETCHCONTENT_SOURCE_DIR_PYBIND11=$work/pybind11-3.1.0"
export CXX="$compiler"
step "compiling (minutes)" env PYTHONPATH="$work/setuptools" PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$python" -m pip wheel --no-deps --no-build-isolation -w "$work/wheels" "$work/sources/kaldifeat-1.24.tar.gz"
step "installing into $("$python" -c 'import sys; print(sys.prefix)')" \
    pip install --no-deps --force-reinstall "$work"/wheels/kaldifeat-1.24-*.whl

cd "$root"
"$python" - >&2 <<'CHECK' || fail "kaldifeat is installed, but does not do what kaldi-native-fbank does: python -m pip uninstall kaldifeat"
import kaldifeat
import numpy as np
import torch

from cascade.config.options import FeatureConfig
from cascade.audio.fbank import compute_fbank

samples = (0.1 * np.random.default_rng(1).standard_normal(32000)).astype(np.float32)
ours, theirs = (compute_fbank(samples, FeatureConfig(extractor=name)) for name in ("kaldi-native-fbank", "kaldifeat"))
same = ours.shape == theirs.shape and np.allclose(theirs, ours, atol=2e-4, rtol=2e-4)
if same:
    print(f"install_kaldifeat: kaldifeat {kaldifeat.__version__} works with torch {torch.__version__}; on two seconds of "
          f"noise it differs from kaldi-native-fbank by {np.abs(ours - theirs).max():.1e} at most")
raise SystemExit(not same)
CHECK
