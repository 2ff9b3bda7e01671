# What every recipe's run.sh shares; run.sh declares its options, sources this file, then lists its stages:
#
#     mini=         # the small subset
#     voices=       # DIR a folder of voices
#     . "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"
#     if stage 0 "data"; then
#         step manifests --outputs "$exp/manifests" -- python "$recipe/local/prepare.py" --out "$exp/manifests"
#         prepare_data --config "$conf/data.yaml"
#     fi
#     recipe_end
#
# Options are variables: `stop_stage=9  # N end with stage N` is the option --stop-stage, which takes a number and is 9
# when not given. N is a whole number, DIR and FILE exist and are made absolute, other capitals are any text; without
# such a word it is a switch, 1 when given. These are the ones of every recipe:
stage=0       # N begin with stage N
stop_stage=9  # N end with stage N
corpus_dir=   # DIR take the corpus from here instead of downloading it
exp_dir=      # DIR put everything this run makes here, results included (otherwise: exp/, results beside run.sh)
noise_dir=    # DIR mix the recordings of this folder into training (augment.noise_share, augment.noise_snr_db)
rir_dir=      # DIR put training copies into the rooms of this folder of impulse responses (augment.rir_share)
extra_conf=   # FILE a YAML file of your own values, which comes after those of conf/
quick=        # few utterances, tiny models, few epochs: a check that all works (otherwise into exp/quick/)
force=        # run the chosen stages again, also with other options; earlier trainings are kept (DIR.previous-1, ...)
help=         # show this
#
# Sourcing it reads the options, sets the environment up and changes into the repository's root. It also sets
#   recipe, conf    the recipe's folder and its conf    exp, results    where the run's outputs and its report go
#   corpus          what prepare.py is told of the corpus: --corpus-dir or --download-dir
#   quick_conf      the YAML files of --quick and --extra-conf, or nothing; they come after the other files
# A function check_options, if run.sh has one, is called before anything is set up.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="$(cd "$(dirname "$0")" && pwd)"
recipe="${recipe#"$root"/}"
conf="$recipe/conf"

say() { printf '%s\n' "$*" >&2; }
usage_error() { say "error: $*"; exit 2; }
elapsed() { printf '%02d:%02d:%02d' $((SECONDS / 3600)) $((SECONDS / 60 % 60)) $((SECONDS % 60)); }

# Learn the options from the lines that declare them: their kinds, and their part of --help.
declare -A kinds=()
option_lines=""
declared='^([a-z0-9_]+)=([^ #]*) +# (([A-Z]+) )?(.*)$'
while IFS= read -r line; do
    [[ "$line" =~ $declared ]] || continue
    kinds["${BASH_REMATCH[1]}"]="${BASH_REMATCH[4]}"
    line="--${BASH_REMATCH[1]//_/-} ${BASH_REMATCH[4]}"
    printf -v line '  %-18s %s\n' "${line% }" "${BASH_REMATCH[5]}${BASH_REMATCH[2]:+ (otherwise: ${BASH_REMATCH[2]})}"
    option_lines+="$line"
done < <(cat "${BASH_SOURCE[0]}" "$0")

while [ $# -gt 0 ]; do
    [ "$1" != -h ] || set -- --help "${@:2}"
    option="${1%%=*}" value=1
    name="${option#--}" name="${name//-/_}"
    [[ "$option" =~ ^--[a-z0-9-]+$ ]] && [ -n "${kinds[$name]+declared}" ] ||
        usage_error "unknown option '$1', --help shows all options"
    kind="${kinds[$name]}"
    if [ "$option" != "$1" ]; then
        [ -n "$kind" ] || usage_error "$option takes no value, got '$1'"
        value="${1#*=}"
    elif [ -n "$kind" ]; then
        value="${2-}"
        shift $(($# > 1))
    fi
    shift
    [ -n "$value" ] || usage_error "$option needs a value, --help shows all options"
    case "$name:$kind:$value" in
        *:N:*[!0-9]* | *:N:??????????*) usage_error "$option must be a whole number, got '$value'" ;;
        *stage:N:*) value=$((10#$value)) ;;
        *:N:*) value=$((10#$value)) && [ "$value" -ge 1 ] || usage_error "$option must be at least 1, got '$value'" ;;
        device:*:auto | device:*:cpu | device:*:cuda | exp_dir:*) ;;
        device:*) usage_error "--device must be auto, cpu or cuda, got '$value'" ;;
        *:DIR:*) [ -d "$value" ] && [ -x "$value" ] || usage_error "$option must be an existing folder, got '$value'" ;;
        *:FILE:*) [ -f "$value" ] || usage_error "$option must be an existing file, got '$value'" ;;
    esac
    case "$name:$kind" in *:DIR | *:FILE) value="$(realpath -ms -- "$value")" ;; esac
    printf -v "$name" %s "$value"
done
[ "$stage" -le "$stop_stage" ] && [ "$stop_stage" -le 9 ] ||
    usage_error "stages go from 0 to 9 in this order, got --stage $stage --stop-stage $stop_stage"
if declare -F check_options >/dev/null && [ -z "$help" ]; then check_options; fi

# stage N TITLE: true when stage N is to be run; prints its banner, or its line of --help.
stage() {
    if [ -n "$help" ]; then
        printf '  %d  %s\n' "$1" "$2"
        return 1
    fi
    [ "$stage" -le "$1" ] && [ "$1" -le "$stop_stage" ] || return 1
    current_stage="$1"
    say "=== stage $1: $2 ($(elapsed) since the start)"
}

# step NAME [options of tools/run_stage.py] -- python WORD...: run it unless it is done; stop the recipe when it fails.
step() {
    local name="$1" code=0 run_stage=("$PYTHON" tools/run_stage.py --stamp "$exp/stamps/$1")
    shift
    set -m  # in a process group of its own: a signal reaches it from on_signal alone, once
    child=starting
    "${run_stage[@]}" ${force:+--force} "$@" </dev/null &
    child=$!
    set +m
    pass_on
    while :; do
        code=0
        wait "$child" || code=$?  # a signal ends the wait, too
        kill -0 "$child" 2>/dev/null || break
    done
    child=""
    if [ "$code" -eq 0 ] && [ -e "$exp/stamps/.$name.begun" ]; then "${run_stage[@]}" --done || code=$?; fi
    if [ "$code" -eq 75 ] || [ -n "$signalled" ]; then
        say "stopped in stage $current_stage; run the same command${force:+ without --force} again to go on"
        exit 75
    elif [ "$code" -ne 0 ]; then
        say "stage $current_stage stopped in step '$name' (exit code $code)"
        exit "$code"
    fi
}

pass_on() { if [ -n "$pending" ] && kill -s "$pending" "$child" 2>/dev/null; then pending=""; fi; }

on_signal() {
    if [ "$1" = "$signalled" ] && [ $((SECONDS - signalled_at)) -le 1 ]; then
        return 0  # a closing terminal says it twice
    elif [ -z "$child" ]; then
        say "stopped; run the same command again to go on"
        exit 75
    fi
    signalled="$1" signalled_at="$SECONDS" pending="$1"
    pass_on
}

recipe_end() { [ -n "$help" ] || say "=== done in $(elapsed): stages $stage to $stop_stage, outputs in $exp"; }

# The programs of the stages, each with the folders of this run; further words go to the program. Every command is shown
# when it runs, so that it can be given by hand with other options.

prepare_data() {
    step data --after manifests --outputs "$exp/data" -- python -m cascade.bin.prepare_data \
        --manifest-dir "$exp/manifests" --out "$exp/data" --num-jobs "$(nproc)" "$@"
}

compute_features() {
    step fbank --after data --inputs ${noise_dir:+"$noise_dir"} ${rir_dir:+"$rir_dir"} --outputs "$exp/fbank" -- \
        python -m cascade.bin.compute_features --data "$exp/data" --out "$exp/fbank" --num-jobs "$(nproc)" \
        ${noise_dir:+--noise-dir "$noise_dir"} ${rir_dir:+--rir-dir "$rir_dir"} "$@"
}

train_tokens() {
    step tokens --after data --outputs "$exp/tokens" -- \
        python -m cascade.bin.train_tokens --data "$exp/data" --out "$exp/tokens" "$@"
}

# train MODEL WORD...: after the steps whose outputs are among the words, as in --teacher "$exp/STEP"
train() {
    local model="$1" word after=()
    for word in "${@:2}"; do
        case "$word" in "$exp"/*) word="${word#"$exp"/}" && after+=("${word%%/*}") ;; esac
    done
    step "$model" --after fbank tokens "${after[@]}" --outputs "$exp/$model" -- \
        python -m cascade.bin.train --data "$exp/fbank" --tokens "$exp/tokens" --exp-dir "$exp/$model" \
        --device "$device" ${num_processes:+--num-processes "$num_processes"} ${force:+--force} "${@:2}"
}

# align MODEL WORD...: the times of the words of the training audio
align() {
    step align --after fbank "$1" --outputs "$exp/align/alignment.ctm" -- \
        python -m cascade.bin.align --exp-dir "$exp/$1" --manifest "$exp/fbank/train_cuts.jsonl.gz" \
        --device "$device" --out "$exp/align" "${@:2}"
}

# calibrate MODEL WORD...: what confidences of words are worth, from dev; hypotheses stay the same
calibrate() {
    step "calibrate-$1" --after fbank "$1" --outputs "$exp/$1/decoding.yaml" -- \
        python -m cascade.bin.calibrate --exp-dir "$exp/$1" --manifest "$exp/fbank/dev_cuts.jsonl.gz" \
        --device "$device" "${@:2}"
}

# decode MODEL TEST-SET WORD...
decode() {
    local part="${2#test}"
    local out="$exp/$1/decode${part:+/${part#-}}"  # decode for the set test, decode/clean for test-clean
    step "decode-$1$part" --after fbank "$1" "calibrate-$1" \
        --outputs "$out"/{streaming,look_ahead,full}-{greedy_search,modified_beam_search}/result.json -- \
        python -m cascade.bin.decode --exp-dir "$exp/$1" --manifest "$exp/fbank/$2_cuts.jsonl.gz" \
        --device "$device" --out "$out" "${@:3}"
}

# latency TEST-SET WORD...: all models, timed in turns
latency() {
    step latency --after fbank teacher student_alone student --outputs "$exp/student/latency.json" -- \
        python -m cascade.bin.latency --exp-dir "$exp/teacher" "$exp/student_alone" "$exp/student" \
        --manifest "$exp/fbank/$1_cuts.jsonl.gz" "${@:2}"
}

# export_onnx MODEL TEST-SET WORD...
export_onnx() {
    step export --after fbank "$1" "calibrate-$1" --inputs "$exp/$1/decoding.yaml" \
        --outputs "$exp/$1/export/export.json" -- \
        python -m cascade.bin.export_onnx --exp-dir "$exp/$1" --manifest "$exp/fbank/$2_cuts.jsonl.gz" \
        --int8 --out "$exp/$1/export" "${@:3}"
}

report() {
    step report --inputs \
        "$exp"/{teacher,student_alone,student}/{train_summary.json,latency.json,losses.jsonl,decode,export/export.json} \
        "$exp/latency_full_size.json" --outputs "$results/RESULTS.md" -- \
        python -m cascade.bin.report --exp-dir "$exp" --out "$results" "$@"
}

child="" signalled="" signalled_at=0 pending="" current_stage=""
exp="${exp_dir:-$recipe/exp${quick:+/quick}}" results="$recipe"
corpus=(--download-dir "$recipe/download")
if [ -n "$corpus_dir" ]; then corpus=(--corpus-dir "$corpus_dir"); fi
quick_conf=(${quick:+egs/quick.yaml} ${extra_conf:+"$extra_conf"})
if [ -n "$help" ]; then
    printf 'usage: %s [OPTION...]\n\n%s\n' "$0" "$option_lines"
    cat <<'HELP'
A finished stage is skipped unless its inputs changed; an interrupted one goes on when run again. Exit codes: 0 done,
1 failed, 2 wrong usage or other options than those of a finished step (--force runs it with them), 75 interrupted (run
the same command again to go on, without --force).

stages:
HELP
    return
fi
if [ -n "$exp_dir" ]; then
    mkdir -p -- "$exp_dir" 2>/dev/null || usage_error "--exp-dir must name a folder that can be made, got '$exp_dir'"
    exp="${exp#"$root"/}"
fi
if [ -n "$exp_dir$quick" ]; then results="$exp"; fi
trap 'on_signal INT' INT
trap 'on_signal TERM' TERM HUP  # a closed terminal asks for the same as a polite kill
PYTHON="$("$root/tools/setup.sh")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# When another job takes a core, threads that spin while they wait make training several times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
cd "$root"
