#!/usr/bin/env bash
# LibriSpeech: read English, 960 h (--full, the default), 100 h or 5 h. A teacher, a student alone and a student distilled
# from the teacher, decoded in three modes and timed. ./egs/librispeech/run.sh --help lists options and stages.
own_options=(
    "--full|960 h, dev-clean and dev-other, test-clean and test-other: 63 GB to download (the default)"
    "--clean-100|train-clean-100, dev-clean, test-clean: 7 GB to download"
    "--mini|train-clean-5 and dev-clean-2, which is the test set too: 0.5 GB to download"
    "--small|models of 5.0 and 2.4 M parameters, which CPUs can train, instead of 41.3 and 20.8 M"
    "--musan|download MUSAN (11 GB) and take its noises as --noise-dir"
    "--epochs N|train so many epochs instead of as many as the confs say"
    "--num-processes N|train with so many processes on this machine, one for each GPU or CPU core"
)
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"

case "$full$clean_100$mini" in 11*) usage_error "choose one of --full, --clean-100 and --mini" ;; esac
case "$musan$noise_dir" in 1/*) usage_error "choose one of --musan and --noise-dir" ;; esac
noise_dir="${noise_dir:-${musan:+$recipe/download/musan/noise}}"
corpus+=(${full:+--set full} ${clean_100:+--set clean-100} ${mini:+--set mini})
processes=("${with_device[@]}" ${num_processes:+--num-processes "$num_processes"})

data=("$conf/data.yaml")
teacher=("$conf/data.yaml" "$conf/teacher.yaml")
student=("$conf/data.yaml" "$conf/student.yaml")
if [ -n "$small" ]; then
    data=("$conf/data.yaml" "$conf/small/data.yaml")
    teacher=("${data[@]}" "$conf/small/teacher.yaml")
    student=("${data[@]}" "$conf/small/student.yaml")
fi
if [ -n "$quick" ]; then
    data+=("$conf/quick.yaml") teacher+=("$conf/quick.yaml") student+=("$conf/quick.yaml")
fi

if [ -n "$epochs" ]; then
    teacher+=("training.num_epochs=$epochs") student+=("training.num_epochs=$epochs")
fi

if stage 0 "data: download or --corpus-dir, manifests, validation"; then
    step manifests ${corpus_dir:+--inputs "$corpus_dir"} --outputs "$exp/manifests" -- \
        python "$recipe/local/prepare.py" "${corpus[@]}" --out "$exp/manifests"
    if [ -n "$musan" ]; then
        step musan --outputs "$recipe/download/musan" -- \
            python "$recipe/local/prepare.py" --musan-dir "$recipe/download"
    fi
    step data --after manifests --outputs "$exp/data" -- \
        python -m cascade.bin.prepare_data --manifest-dir "$exp/manifests" --out "$exp/data" --num-jobs "$(nproc)" \
        ${quick:+--max-utterances 60} --config "${data[@]}"
fi

if stage 1 "features: log-mel fbank, speed copies of train"; then
    step fbank --after data ${noise_dir:+--inputs "$noise_dir"} ${rir_dir:+--inputs "$rir_dir"} \
        --outputs "$exp/fbank" -- \
        python -m cascade.bin.compute_features --data "$exp/data" --out "$exp/fbank" --num-jobs "$(nproc)" \
        ${noise_dir:+--noise-dir "$noise_dir"} ${rir_dir:+--rir-dir "$rir_dir"} --config "${data[@]}"
fi

if stage 2 "tokens"; then
    step tokens --after data --outputs "$exp/tokens" -- \
        python -m cascade.bin.train_tokens --data "$exp/data" --out "$exp/tokens" --config "${data[@]}"
fi

if stage 3 "train the teacher"; then
    step teacher --after fbank tokens --outputs "$exp/teacher" -- \
        python -m cascade.bin.train "${processes[@]}" --data "$exp/fbank" --tokens "$exp/tokens" \
        --exp-dir "$exp/teacher" \
        ${force:+--force} --config "${teacher[@]}"
fi

if stage 4 "train the student alone, without teacher"; then
    step student_alone --after fbank tokens --outputs "$exp/student_alone" -- \
        python -m cascade.bin.train "${processes[@]}" --data "$exp/fbank" --tokens "$exp/tokens" \
        --exp-dir "$exp/student_alone" \
        ${force:+--force} --config "${student[@]}" distillation=null
fi

if stage 5 "train the student, distilled from the teacher"; then
    step student --after fbank tokens teacher --outputs "$exp/student" -- \
        python -m cascade.bin.train "${processes[@]}" --data "$exp/fbank" --tokens "$exp/tokens" \
        --exp-dir "$exp/student" \
        --teacher "$exp/teacher" ${force:+--force} --config "${student[@]}"
fi

tests=("$exp"/manifests/test*.jsonl)
tests=("${tests[@]##*/}")
tests=("${tests[@]%.jsonl}")

if stage 6 "decode the test sets: three modes, two methods"; then
    for model in teacher student_alone student; do
        for test in "${tests[@]}"; do
            for mode in streaming look_ahead full; do
                for method in greedy_search modified_beam_search; do
                    name="$test-$mode-$method"
                    out="$exp/$model/decode/${name#test-}"
                    step "decode-$model-${name#test-}" --after fbank "$model" --outputs "$out/result.json" -- \
                        python -m cascade.bin.decode --exp-dir "$exp/$model" --mode "$mode" --method "$method" "${with_device[@]}" \
                        --manifest "$exp/fbank/${test}_cuts.jsonl.gz" --out "$out"
                done
            done
        done
    done
fi

if stage 7 "latency: compute on one thread, memory, delays of words"; then
    step latency --after fbank teacher student_alone student --outputs "$exp/student/latency.json" -- \
        python -m cascade.bin.latency --exp-dir "$exp/teacher" "$exp/student_alone" "$exp/student" \
        --manifest "$exp/fbank/${tests[0]}_cuts.jsonl.gz" ${quick:+--num-chunks 50}
fi

if stage 8 "export the student to ONNX, compare it with PyTorch in onnxruntime and sherpa-onnx"; then
    step export --after fbank student --outputs "$exp/student/export/export.json" -- \
        python -m cascade.bin.export_onnx --exp-dir "$exp/student" --manifest "$exp/fbank/${tests[0]}_cuts.jsonl.gz" \
        --out "$exp/student/export"
fi

if stage 9 "report: results.json, RESULTS.md, plots"; then
    step report --optional "$exp"/{teacher,student_alone,student}/{train_summary.json,latency.json,losses.jsonl} \
        "$exp"/{teacher,student_alone,student}/decode/*/result.json "$exp/latency_full_size.json" \
        --outputs "$results/RESULTS.md" -- \
        python -m cascade.bin.report --exp-dir "$exp" --out "$results"
fi

recipe_end
