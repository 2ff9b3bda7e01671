#!/usr/bin/env bash
# Set everything up, then run all tests, in as many processes as there are cores. Arguments go to pytest:
#
#   tools/test.sh tests/losses -k pruned
#   tools/test.sh -m "not slow"             # without the tests of whole runs and of several processes
#   tools/test.sh -n 0                      # in one process, in order
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$("$root/tools/setup.sh")"
cd "$root"

# Cores that this process may use; nproc would take OMP_NUM_THREADS for their number.
processes="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 1)"
if [ "$processes" -gt 16 ]; then processes=16; fi  # of about 0.7 GB each; the longest test takes as long as all others
parallel=(-n "$processes" --dist worksteal)
for word in "$@"; do
    case "$word" in
        -n* | --numprocesses* | --dist* | --pdb* | --trace) parallel=() ;;
    esac
done
if [ "$processes" -lt 2 ]; then parallel=(); fi

# Tests use tiny tensors: more threads would only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest "${parallel[@]}" "$@"
