#!/usr/bin/env bash
# Compare cascade/losses live with the real k2, on fresh random lattices.
#
#   tools/check_k2.sh [--cases N] [--seed N] [--dir DIR]
#
# --dir is k2's environment and the files exchanged; by default ~/.cache/cascade/check_k2.
# k2's wheels on PyPI end at Python 3.9 and torch 1.13.1, so k2 lives in an environment and a process of its own;
# the two sides exchange .npz files. About 3 GB are downloaded on the first run. Where Python 3.9 is missing, or the
# packages cannot be had, the reason is printed and the exit code is 0 (nothing was compared); a difference gives 1.
set -euo pipefail
cd "$(dirname "$0")/.."

cases=24
seed=()
dir="${XDG_CACHE_HOME:-$HOME/.cache}/cascade/check_k2"  # its code is run: in nobody else's reach, so not in /tmp
while [ $# -gt 0 ]; do
  case "$1" in
    --cases) cases="${2:?--cases needs a number}"; shift 2 ;;
    --seed) seed=(--seed "${2:?--seed needs a number}"); shift 2 ;;
    --dir) dir="${2:?--dir needs a folder}"; shift 2 ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "unknown option $1, see --help" >&2; exit 2 ;;
  esac
done

find_python39() {
  local candidate
  for candidate in python3.9 "$HOME"/.pyenv/versions/3.9.*/bin/python /opt/python/*3.9*/bin/python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 9))' > /dev/null 2>&1; then
      echo "$candidate"
      return 0
    fi
  done
  return 1
}

k2_python="$dir/venv/bin/python"
if ! "$k2_python" -c 'import k2' 2> /dev/null; then
  if ! python39="$(find_python39)"; then
    echo "check_k2: skipped: Python 3.9 was not found, and k2 1.23.4 has no wheel for a newer one"
    exit 0
  fi
  mkdir -p "$dir"
  "$python39" -m venv "$dir/venv"
  install=("$k2_python" -m pip install --quiet)
  if ! { "${install[@]}" 'pip<26.1' && "${install[@]}" 'k2==1.23.4' 'numpy<2'; } > "$dir/pip.log" 2>&1; then
    echo "check_k2: skipped: k2 1.23.4 could not be installed: $(tail -n 1 "$dir/pip.log") (all of it: $dir/pip.log)"
    exit 0
  fi
fi

rm -rf "$dir/cases" && mkdir -p "$dir/cases"
python="$(tools/setup.sh)"
record=tests/losses/golden/record.py
"$python" "$record" --folder "$dir/cases" --new "$cases" "${seed[@]}"
# k2 warns of its own about utterances without a path
if ! "$k2_python" "$record" --folder "$dir/cases" > "$dir/k2.log" 2>&1; then
  tail -n 5 "$dir/k2.log" >&2
  exit 1
fi
CASCADE_GOLDEN="$dir/cases" "$python" -m pytest -q tests/losses/test_golden.py -k equals_k2_loss
