# What every recipe's run.sh shares; run.sh sources this file, then lists its stages:
#
#     own_options=("--voice-dir DIR|a folder of voices" "--mini|the small subset")     # if it has any
#     . "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"
#     if stage 0 "data"; then
#         step manifests --outputs "$exp/manifests" -- python "$recipe/local/prepare.py" "${corpus[@]}" --out "$exp/manifests"
#         step data --after manifests --outputs "$exp/data" -- python -m cascade.bin.prepare_data ...
#     fi
#     recipe_end
#
# Sourcing it reads the options, sets the environment up and changes into the repository's root. It sets
#   recipe      the recipe's folder            conf        its conf folder
#   exp         where the run's outputs go     results     where its report goes
#   corpus_dir  --corpus-dir or empty          corpus      what local/prepare.py is told about it
#   quick       1 with --quick, else empty     PYTHON      the interpreter; a step's `python` means this one
#   device      --device or empty              with_device --device for a program, if it was given
#   noise_dir, rir_dir   --noise-dir and --rir-dir or empty, for stage 1 and its --inputs
# and, of the recipe's own options, voice_dir to the absolute folder and mini to 1, both empty when not given.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="$(cd "$(dirname "$0")" && pwd)"
recipe="${recipe#"$root"/}"
conf="$recipe/conf"
last_stage=9

say() { printf '%s\n' "$*" >&2; }
usage_error() { say "error: $*"; exit 2; }
elapsed() { printf '%02d:%02d:%02d' $((SECONDS / 3600)) $((SECONDS / 60 % 60)) $((SECONDS % 60)); }

# Options, "--name|what it does" or "--name VALUE|what it does"; the recipe's own ones follow in own_options. A value that
# is called FILE or DIR must exist and is made absolute, N is a whole number.
shared_options=(
    "--stage N|begin with stage N"
    "--stop-stage N|end with stage N"
    "--corpus-dir DIR|take the corpus from here instead of downloading it"
    "--exp-dir DIR|put everything this run makes here, results included
                     (otherwise: $recipe/exp, results in $recipe itself)"
    "--noise-dir DIR|mix the recordings of this folder into training (augment.noise_share, augment.noise_snr_db)"
    "--rir-dir DIR|put training copies into the rooms of this folder of impulse responses (augment.rir_share)"
    "--device NAME|train and decode on cpu, cuda (a GPU) or auto (a GPU where there is one); README.md
                     names the default"
    "--quick|few utterances, tiny models, few epochs: a check that all works (otherwise into $recipe/exp/quick)"
    "--force|run the chosen stages again even if nothing changed, or with other options than before;
                     earlier trainings are kept (DIR.previous-1, -2, ...)"
    "--help|show this"
)
[ -n "${own_options+set}" ] || own_options=()

# Give every option's variable its value: --voice-dir sets voice_dir, a switch sets 1, what is not given is empty.
read_options() {
    local entry option value
    for entry in "${shared_options[@]}" "${own_options[@]}"; do
        find_option "${entry%%[ |]*}"
        printf -v "$variable" ""
    done
    while [ $# -gt 0 ]; do
        [ "$1" != -h ] || set -- --help "${@:2}"
        option="${1%%=*}"
        find_option "$option" || usage_error "unknown option '$1', --help shows all options"
        if [ -z "$kind" ]; then
            [ "$option" = "$1" ] || usage_error "$option takes no value, got '$1'"
            value=1
        elif [ "$option" != "$1" ]; then
            value="${1#*=}"
        else
            [ $# -gt 1 ] || usage_error "$option needs a value, --help shows all options"
            value="$2"
            shift
        fi
        shift
        set_option "$option" "$value"
    done
    first=$((10#${stage:-0})) final=$((10#${stop_stage:-$last_stage})) exp="$exp_dir"
    [ "$first" -le "$final" ] || usage_error "--stage $first lies after --stop-stage $final"
}

# find_option OPTION: false if there is none; sets `variable` and `kind`, the name of its value (empty for a switch).
find_option() {
    local entry
    for entry in "${shared_options[@]}" "${own_options[@]}"; do
        entry="${entry%%|*}"
        if [ "${entry%% *}" = "$1" ]; then
            variable="${1#--}" kind="${entry#"$1"}"
            variable="${variable//-/_}" kind="${kind# }"
            return
        fi
    done
    return 1
}

# set_option OPTION VALUE: check and store the value of the option that find_option found.
set_option() {
    local value="$2"
    case "$1:$kind" in
        --stage:* | --stop-stage:*)
            [[ "$value" =~ ^[0-9]{1,3}$ ]] && [ "$((10#$value))" -le "$last_stage" ] ||
                usage_error "$1 must be a number from 0 to $last_stage, got '$value'"
            ;;
        --exp-dir:*)
            [ -n "$value" ] || usage_error "--exp-dir must name a folder, got ''"
            if [ -e "$value" ] && [ ! -d "$value" ]; then usage_error "--exp-dir must name a folder, '$value' is a file"; fi
            ;;
        --device:*)
            case "$value" in
                auto | cpu | cuda) ;;
                *) usage_error "--device must be auto, cpu or cuda, got '$value'" ;;
            esac
            ;;
        *:DIR)
            [ -d "$value" ] || usage_error "$1 must be an existing folder, got '$value'"
            value="$(cd -- "$value" && pwd)" || usage_error "$1 '$2' cannot be entered"
            ;;
        *:FILE)
            [ -f "$value" ] || usage_error "$1 must be an existing file, got '$value'"
            value="$(cd -- "$(dirname -- "$value")" && pwd)/$(basename -- "$value")" || usage_error "$1 '$2' cannot be read"
            ;;
        *:N) [[ "$value" =~ ^[0-9]+$ ]] || usage_error "$1 must be a whole number, got '$value'" ;;
        *) [ -n "$value" ] || usage_error "$1 needs a value, got ''" ;;
    esac
    printf -v "$variable" %s "$value"
}

show_help() {
    local entry
    printf 'usage: %s' "$0"
    for entry in "${shared_options[@]}" "${own_options[@]}"; do printf ' [%s]' "${entry%%|*}"; done
    printf '\n\n'
    for entry in "${shared_options[@]}"; do printf '  %-18s %s\n' "${entry%%|*}" "${entry#*|}"; done
    [ "${#own_options[@]}" -eq 0 ] || printf '\nof this recipe:\n'
    for entry in "${own_options[@]}"; do printf '  %-18s %s\n' "${entry%%|*}" "${entry#*|}"; done
    cat <<HELP

A finished stage is skipped unless its inputs changed; an interrupted one goes on when run again. Exit codes: 0 done,
1 failed, 2 wrong usage or other options than those of a finished step (--force runs it with them), 75 interrupted (run
the same command again to go on, without --force).

stages:
HELP
}

# stage N TITLE: true when stage N is to be run; prints its banner, or its line of --help.
stage() {
    if [ -n "$help" ]; then
        printf '  %d  %s\n' "$1" "$2"
        return 1
    fi
    [ "$first" -le "$1" ] && [ "$1" -le "$final" ] || return 1
    current_stage="$1"
    say "=== stage $1: $2 ($(elapsed) since the start)"
}

# step NAME [--after STEP...] [run_stage's options] -- python WORD...: run it unless it is done; stop the recipe when it
# fails. --after names earlier steps whose results it reads.
step() {
    local name="$1" kind="" options=()
    shift
    while [ "$1" != -- ]; do
        case "$kind:$1" in
            *:--after) kind=after ;;
            *:--*) kind="" options+=("$1") ;;
            after:*)
                [ -f "$exp/stamps/$1" ] || {
                    say "error: stage $current_stage needs step '$1', which is not done in $exp: begin with an earlier --stage"
                    exit 1
                }
                options+=(--inputs "$exp/stamps/$1")
                ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    shift 2  # -- python
    in_background "$PYTHON" "$root/tools/run_stage.py" --stamp "$exp/stamps/$name" "${options[@]}" ${force:+--force} \
        -- "$PYTHON" "$@"
    if [ "$code" -eq 75 ]; then
        say "stopped in stage $current_stage; run the same command${force:+ without --force} again to go on"
        exit 75
    elif [ "$code" -ne 0 ]; then
        say "stage $current_stage stopped in step '$name' (exit code $code)"
        exit "$code"
    fi
}

# Run a command so that this shell still hears signals, which it passes on; sets `code`.
in_background() {
    local interrupted=""
    "$@" &
    child=$!
    while :; do
        signalled="" code=0
        wait "$child" || code=$?
        [ -n "$signalled" ] || break
        interrupted=1
    done
    child=""
    # When the child ends just as a signal comes, bash may lose its exit code and say -1, 255 or "not a child" instead.
    case "$interrupted$code" in 1-1 | 1255 | 1127) code=75 ;; esac
}

on_signal() {
    signalled=1
    if [ -n "$child" ]; then
        kill -s "$1" "$child" 2>/dev/null || true
    else
        say "stopped; run the same command again to go on"
        exit 75
    fi
}

recipe_end() {
    if [ -n "$help" ]; then return; fi
    say "=== done in $(elapsed): stages $first to $final, outputs in $exp"
}

read_options "$@"
child="" signalled="" current_stage=""
if [ -n "$help" ]; then
    show_help
    corpus=()
else
    trap 'on_signal INT' INT
    trap 'on_signal TERM' TERM
    trap 'on_signal HUP' HUP
    PYTHON="$("$root/tools/setup.sh")"
    export PYTHON PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    # When another job takes a core, threads that spin while they wait make training several times slower.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    results="$recipe"
    if [ -n "$exp" ]; then
        mkdir -p "$exp" || usage_error "--exp-dir '$exp' cannot be made"
        exp="$(cd "$exp" && pwd)"
        exp="${exp#"$root"/}"
        results="$exp"
    elif [ -n "$quick" ]; then
        exp="$recipe/exp/quick" results="$recipe/exp/quick"
    else
        exp="$recipe/exp"
    fi
    corpus=(--download-dir "$recipe/download")
    if [ -n "$corpus_dir" ]; then corpus=(--corpus-dir "$corpus_dir"); fi
    cd "$root"
fi
with_device=(${device:+--device "$device"})
exp="${exp:-$recipe/exp}" results="${results:-$recipe}"
