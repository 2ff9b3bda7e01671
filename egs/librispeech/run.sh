#!/usr/bin/env bash
# LibriSpeech: read English, 960 h (--full, the default), 100 h or 5 h. A teacher, a student alone and a student
# distilled from the teacher, decoded in three modes and timed. --help lists options and stages.

full=           # 960 h, dev-clean and dev-other, test-clean and test-other: 63 GB to download (the default)
clean_100=      # train-clean-100, dev-clean, test-clean: 7 GB to download
mini=           # train-clean-5 and dev-clean-2, which is the test set too: 0.5 GB to download
small=          # models of 5.0 and 2.4 M parameters, which CPUs can train, instead of 41.3 and 20.8 M
musan=          # download MUSAN (11 GB) and take its noises as --noise-dir
lm=             # a language model of OpenSLR 11's text (1.5 GB to download), tuned on dev; rows of its own
lm_text=        # FILE as --lm, of the sentences of this file, one a line (.txt, .gz, .xz)
lm_order=4      # N tokens in its longest n-grams
epochs=         # N train so many epochs instead of as many as the confs say
device=auto     # NAME train and decode on cpu, cuda (a GPU) or auto (a GPU where there is one)
num_processes=  # N train with so many processes on this machine, one for each GPU or CPU core
check_options() {
    case "$full$clean_100$mini" in 11*) usage_error "choose one of --full, --clean-100 and --mini" ;; esac
    case "$musan$noise_dir" in 1/*) usage_error "choose one of --musan and --noise-dir" ;; esac
    case "$lm$lm_text" in 1?*) usage_error "choose one of --lm and --lm-text" ;; esac
    [ "$lm_order" -le 7 ] || usage_error "--lm-order goes up to 7 (with 500 tokens), got '$lm_order'"
}
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"

lm_text="${lm_text:-${lm:+$recipe/download/librispeech-lm-norm.txt.gz}}"
noise_dir="${noise_dir:-${musan:+$recipe/download/musan/noise}}"
corpus+=(${full:+--set full} ${clean_100:+--set clean-100} ${mini:+--set mini})

models="$conf${small:+/small}"
last=("${quick_conf[@]}" ${quick:+tokens.vocab_size=60} ${epochs:+"training.num_epochs=$epochs"})
data=("$conf/data.yaml" ${small:+"$conf/small/data.yaml"})
teacher=("${data[@]}" "$models/teacher.yaml" "${last[@]}")
student=("${data[@]}" "$models/teacher.yaml" "$models/student.yaml" "${last[@]}")
data+=("${quick_conf[@]}" ${quick:+tokens.vocab_size=60})

if stage 0 "data: download or --corpus-dir, manifests, validation"; then
    step manifests --inputs ${corpus_dir:+"$corpus_dir"} --outputs "$exp/manifests" -- \
        python "$recipe/local/prepare.py" "${corpus[@]}" --out "$exp/manifests"
    if [ -n "$musan" ]; then
        step musan --outputs "$recipe/download/musan" -- \
            python "$recipe/local/prepare.py" --musan-dir "$recipe/download"
    fi
    prepare_data ${quick:+--max-utterances 60} --config "${data[@]}"
fi

if stage 1 "features: log-mel fbank, speed copies of train"; then
    compute_features --config "${data[@]}"
fi

if stage 2 "tokens"; then
    train_tokens --config "${data[@]}"
fi

if stage 3 "train the teacher"; then
    train teacher --config "${teacher[@]}"
fi

if stage 4 "train the student alone, without teacher"; then
    train student_alone --config "${student[@]}" distillation=null
fi

if stage 5 "train the student, distilled from the teacher"; then
    train student --teacher "$exp/teacher" --config "${student[@]}"
fi

tests=("$exp"/manifests/test*.jsonl)
tests=("${tests[@]##*/}")
tests=("${tests[@]%.jsonl}")

if stage 6 "decode the test sets: three modes, two methods"; then
    for model in teacher student_alone student; do
        calibrate "$model" --lm-scale 0
        for test in "${tests[@]}"; do
            decode "$model" "$test" --mode all --method all --lm-scale 0
        done
    done
    if [ -n "$lm_text" ]; then
        if [ -n "$lm" ]; then
            step lm-text --outputs "$lm_text" -- python "$recipe/local/prepare.py" --lm-text "$lm_text"
        fi
        step lm --after data tokens --outputs "$exp/lm/lm.npz" -- python -m cascade.bin.train_ngram \
            --text "$lm_text" --tokens "$exp/tokens" --order "$lm_order" --prune 0 0 0 1 \
            --held-out "$exp/data/dev_cuts.jsonl.gz" --out "$exp/lm/lm.npz"
        step lodr --after data tokens --outputs "$exp/lm/lodr.npz" -- python -m cascade.bin.train_ngram \
            --text "$exp/data/train_cuts.jsonl.gz" --tokens "$exp/tokens" --order 2 --out "$exp/lm/lodr.npz"
        for model in teacher student_alone student; do
            step "tune-$model" --after fbank "$model" lm lodr --outputs "$exp/$model/decoding.yaml" -- \
                python -m cascade.bin.tune_scales --exp-dir "$exp/$model" --manifest "$exp/fbank/dev_cuts.jsonl.gz" \
                --ngram "$exp/lm/lm.npz" --lodr "$exp/lm/lodr.npz" --beam 8 --device "$device"
            for test in "${tests[@]}"; do
                step "decode-lm-$model-$test" --after fbank "tune-$model" \
                    --outputs "$exp/$model/decode/lm/$test/full-modified_beam_search/result.json" -- \
                    python -m cascade.bin.decode --exp-dir "$exp/$model" --manifest "$exp/fbank/${test}_cuts.jsonl.gz" \
                    --mode all --method all --beam 8 --device "$device" --out "$exp/$model/decode/lm/$test"
            done
        done
    fi
fi

if stage 7 "latency: compute on one thread, memory, delays of words"; then
    latency "${tests[0]}" ${quick:+--num-chunks 50}
fi

if stage 8 "export the student to ONNX, compare it with PyTorch in onnxruntime and sherpa-onnx"; then
    export_onnx student "${tests[0]}"
fi

if stage 9 "report: results.json, RESULTS.md, plots"; then
    report
fi

recipe_end
