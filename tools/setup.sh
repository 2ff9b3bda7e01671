#!/usr/bin/env bash
# Make the Python environment that everything here runs in, from the pins of requirements.txt.
#
#   tools/setup.sh                     makes or repairs .venv; at once when nothing changed
#   SETUP_DEVICE=cuda tools/setup.sh   on a login node: PyTorch's CUDA build where no GPU is yet; cpu: its CPU build
#
# PyTorch is its CUDA build where an NVIDIA GPU is, and a CPU build is replaced there, as after a set-up on another node.
#
# An active environment (venv or conda) that already satisfies the pins is taken as it is. The only line on stdout is
# the path of the interpreter to use; what is going on is said on stderr. Exit codes: 0 ready, 1 not ready.
# SETUP_PYTHON=/path/to/python3.12 names the Python to make .venv with; without it, python3 on PATH if it is 3.11-3.13,
# else the newest of 3.13, 3.12, 3.11 that can be found and really runs.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/setup-stamp"
log="$venv/setup.log"
cpu_index="https://download.pytorch.org/whl/cpu"
cpu_mb=3000   # .venv takes 1.6 GB with PyTorch's CPU build, and pip unpacks downloads beside it
cuda_mb=8000  # the CUDA build brings NVIDIA's libraries

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup failed: %s\n' "$*" >&2; exit 1; }
check() { "$1" "$root/tools/check_environment.py" "${@:2}"; }

ready() {
    if [ -t 1 ]; then say "ready; to use it in this shell: source $(printf '%q' "$(dirname "$1")/activate")"; fi
    printf '%s\n' "$1"
    exit 0
}

# What makes a finished set-up stale: the pins, the check itself, another Python under .venv.
fingerprint() {
    cat "$root/requirements.txt" "$root/tools/check_environment.py" <("$venv/bin/python" -VV) | cksum
}

venv_runs() { [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null; }

venv_is_ready() {
    [ -f "$stamp" ] && venv_runs && [ "$(cat "$stamp")" = "$(fingerprint)" ] && check "$venv/bin/python" >/dev/null 2>&1
}

# Sets `why` when the Python cannot be used. Runs it: version managers leave commands behind that do not run.
python_fits() {
    local answer
    answer="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || { why="does not run"; return 1; }
    case "$answer" in
        3.11 | 3.12 | 3.13) ;;
        *) why="is Python $answer"; return 1 ;;
    esac
    "$1" -c 'import venv, ensurepip' 2>/dev/null || { why="is Python $answer without the venv module"; no_venv="$answer"; return 1; }
}

find_python() {
    local name candidate why="" tried=""
    no_venv=""
    if [ -n "${SETUP_PYTHON:-}" ]; then
        python_fits "$SETUP_PYTHON" || fail "SETUP_PYTHON=$SETUP_PYTHON $why; name a Python 3.11, 3.12 or 3.13 with its venv module."
        python="$SETUP_PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python; do
        while IFS= read -r candidate; do
            if python_fits "$candidate"; then python="$candidate"; return; fi
            tried="$tried$candidate $why; "
        done < <(type -aP "$name" || true)
    done
    for candidate in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[321]*/bin/python /opt/python*/bin/python3 /usr/local/bin/python3.1[123]; do
        if [ -x "$candidate" ] && python_fits "$candidate"; then python="$candidate"; return; fi
    done
    if [ -n "$no_venv" ]; then
        fail "Python $no_venv is here, but without its venv module; on Debian and Ubuntu: sudo apt install python$no_venv-venv (tried: ${tried%; })."
    fi
    fail "no usable Python 3.11, 3.12 or 3.13 found (tried: ${tried:-nothing on PATH is called python}); install one, or name it: SETUP_PYTHON=/path/to/python3.12 tools/setup.sh"
}

# One attempt with a short time-out; the alarm also bounds the look-up of the name.
cpu_index_answers() {
    "$python" - "$cpu_index/torch/" 2>/dev/null <<'PROBE'
import signal, sys, urllib.request
signal.alarm(4)
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=3)
PROBE
}

pip_install() {
    # pip's own output, retries and notices included, goes to the log; a failure is told from it below.
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES="${PIP_RETRIES:-2}" \
        "$venv/bin/python" -m pip install --no-input --progress-bar off "$@" >>"$log" 2>&1
}

explain_pip_failure() {
    local last
    last="$(grep -E '^ERROR|Error' "$log" | tail -n 1 | cut -c 1-300)" || true
    if grep -qE 'No space left on device|Errno 28|Disk quota exceeded' "$log"; then
        fail "the disk is full; free about $((${needed_mb:-$cpu_mb} / 1000)) GB (under $root, or under TMPDIR=${TMPDIR:-/tmp}) and run this again."
    elif grep -qE 'NewConnectionError|NameResolutionError|Network is unreachable|Connection refused|ConnectTimeout|ReadTimeout|Read timed out|ProxyError|SSLError|ConnectionReset|ConnectionError|RemoteDisconnected' "$log"; then
        fail "packages could not be downloaded: is there a network, and does it need a proxy (HTTPS_PROXY) or a mirror (PIP_INDEX_URL)? Then run this again$on_failure; pip's output: $log"
    fi
    fail "pip: ${last:-no error line}$on_failure; pip's whole output: $log"
}

need_disk() {
    local free_mb
    free_mb="$(df -Pm "$root" 2>/dev/null | awk 'NR == 2 {print $4}')" || free_mb=""
    if [ -n "$free_mb" ] && [ "$free_mb" -lt "$needed_mb" ]; then
        fail "$root has $free_mb MB of free disk space, the environment needs about $needed_mb MB with ${build:-PyTorch}."
    fi
}

make_venv() {
    say "making $venv with $python ($("$python" -VV 2>&1 | head -n 1))"
    local problem
    problem="$("$python" -m venv --clear "$venv" 2>&1)" ||
        fail "$python -m venv $venv: $(printf '%s' "$problem" | tail -n 1 | cut -c 1-300)"
}

# Sets, once, `index` to the options that get PyTorch's CPU build where the CUDA build is not wanted, and `needed_mb`.
# PyPI has the CUDA build for Linux on x86_64 (2.13.0); with an index that has 2.13.0+cpu too, pip prefers that.
choose_index() {
    [ -z "$needed_mb" ] || return 0
    index=() needed_mb="$cpu_mb" build="PyTorch's CPU build"
    if [ "$(uname -s)" != Linux ]; then return; fi
    if check "$python" --wants-cuda; then
        say "PyTorch's CUDA build is wanted (an NVIDIA GPU, or SETUP_DEVICE): it comes from the default index"
        needed_mb="$cuda_mb" build="PyTorch's CUDA build"
    elif cpu_index_answers; then
        say "no NVIDIA GPU here: PyTorch's CPU build comes from $cpu_index"
        index=(--extra-index-url "$cpu_index")
    else
        say "no NVIDIA GPU here, but $cpu_index does not answer: PyTorch comes from the default index, perhaps as its larger CUDA build (it works too)"
        needed_mb="$cuda_mb" build="PyTorch's CUDA build, which the default index may give"
    fi
}

# pip_install, from the chosen index and without it when that fails; PROBLEMS names what is wrong with the environment.
install() {
    local problems="$1" use
    shift
    : >"$log"
    use=()
    if grep -q '^torch\b' <<<"$problems"; then
        choose_index
        need_disk
        use=("${index[@]}")
    fi
    if [ "${#use[@]}" -gt 0 ]; then
        pip_install "$@" "${use[@]}" && return
        say "that did not work with $cpu_index; trying the default index alone, perhaps for PyTorch's larger CUDA build"
        needed_mb="$cuda_mb" build="PyTorch's CUDA build, which the default index may give"
        need_disk
        : >"$log"
    fi
    pip_install "$@" || explain_pip_failure
}

# A package that says it is installed and yet does not import was cut off half-way: install it again, alone.
repair_packages() {
    local broken names
    broken="$(check "$venv/bin/python" --imports 2>&1)" && return
    names="$("$venv/bin/python" - "$root/requirements.txt" 3<<<"$broken" <<'NAMES'
import os, re, sys
broken = os.fdopen(3).read().replace("_", "-")
pins = [line.split("#")[0].strip() for line in open(sys.argv[1])]
print(" ".join(pin for pin in pins if pin and re.search(rf"(?m)^{re.escape(pin.split('==')[0])}\b", broken)))
NAMES
    )"
    if grep -q '^torchaudio ' <<<"$broken"; then fail "$(grep '^torchaudio ' <<<"$broken") (environment: $venv)."; fi
    [ -n "$names" ] || fail "$(head -n 1 <<<"$broken"); remove $venv and run this again."
    say "repairing: $names"
    # shellcheck disable=SC2086  # one word per package
    install "$broken" --force-reinstall --no-deps $names
    broken="$(check "$venv/bin/python" --imports 2>&1)" || fail "$(head -n 1 <<<"$broken"); remove $venv and run this again."
}

# Put PyTorch's CUDA build in the place of its CPU build; nothing is removed before all of it is downloaded.
replace_cpu_build() {
    local pin remedy="or set SETUP_DEVICE=cpu to keep the CPU build"
    pin="$(grep -m 1 -oE '^torch==[^ #]+' "$root/requirements.txt")"
    say "$1: installing the CUDA build (some minutes)"
    needed_mb="" on_failure=", $remedy; without a network here, run SETUP_DEVICE=cuda tools/setup.sh on a machine that has one"
    install "$1" --force-reinstall -c "$root/requirements.txt" "$pin"
    problems="$(check "$python" 2>&1)" || true
    if grep -q "$cpu_build" <<<"$problems"; then
        fail "pip's index gave $pin as its CPU build again: see PIP_INDEX_URL and PIP_EXTRA_INDEX_URL, $remedy."
    fi
}

case "${SETUP_DEVICE:-}" in
    "" | cpu | cuda) ;;
    *) fail "SETUP_DEVICE must be cpu or cuda, got '$SETUP_DEVICE'." ;;
esac
python="" needed_mb="" build="" on_failure=""
cpu_build="is PyTorch's CPU build"  # what tools/check_environment.py says

active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
if [ -n "$active" ] && [ "$active" != "$venv" ]; then
    if [ -x "$active/bin/python" ] && problems="$(check "$active/bin/python" 2>&1)"; then
        say "taking the active environment as it is: $active"
        ready "$active/bin/python"
    fi
    say "the active environment $active does not satisfy requirements.txt ($(head -n 1 <<<"${problems:-it has no bin/python}")); using $venv"
fi

if venv_is_ready; then ready "$venv/bin/python"; fi

# Two set-ups at the same time would write into each other's packages.
if command -v flock >/dev/null; then
    exec 9<"$root/requirements.txt"
    flock -n 9 || { say "another set-up is running; waiting for it"; flock 9; }
    if venv_is_ready; then ready "$venv/bin/python"; fi
fi

if venv_runs && python_fits "$venv/bin/python"; then
    rm -f "$stamp"
    python="$venv/bin/python"
    problems="$(check "$python" 2>&1)" || say "$venv needs work: $(head -n 1 <<<"$problems")"
else
    if [ -e "$venv" ]; then say "$venv is half made or its Python is gone or unfit; making it anew"; fi
    find_python
    choose_index
    need_disk
    make_venv
    python="$venv/bin/python"
    problems="$(check "$python" 2>&1)" || true
fi
if grep -qv "$cpu_build" <<<"$problems" && [ -n "$problems" ]; then
    say "installing the packages of requirements.txt (some minutes the first time)"
    install "$problems" -r "$root/requirements.txt"
    problems="$(check "$python" 2>&1)" || true
fi
if problem="$(grep "$cpu_build" <<<"$problems")"; then replace_cpu_build "$problem"; fi
repair_packages
fingerprint >"$stamp"
ready "$venv/bin/python"
