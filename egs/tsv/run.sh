#!/usr/bin/env bash
# A table of recordings and transcripts, in any language: ./egs/tsv/run.sh --tsv data.tsv trains a teacher, a student alone
# and a student distilled from the teacher, decodes them in three modes and times them. --help lists options and stages.
own_options=(
    "--tsv FILE|the corpus: path text [split] [speaker] [start] [end], tab-separated; relative paths start at the
                     table's folder, or at --corpus-dir"
    "--large|models of 41 and 21 M parameters, for hundreds of hours and GPUs, instead of 5.0 and 2.4 M"
    "--num-processes N|train with so many processes on this machine, one for each GPU or CPU core"
)
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"

audio=(${corpus_dir:+--audio-dir "$corpus_dir"})
processes=("${with_device[@]}" ${num_processes:+--num-processes "$num_processes"})

data=("$conf/data.yaml")
teacher=("$conf/data.yaml" "$conf/teacher.yaml")
student=("$conf/data.yaml" "$conf/student.yaml")
if [ -n "$large" ]; then
    data=("$conf/data.yaml" "$conf/large/data.yaml")
    teacher=("${data[@]}" "$conf/large/teacher.yaml")
    student=("${data[@]}" "$conf/large/student.yaml")
fi
if [ -n "$quick" ]; then
    data+=("$conf/quick.yaml") teacher+=("$conf/quick.yaml") student+=("$conf/quick.yaml")
fi

if stage 0 "data: the table, manifests, validation"; then
    [ -n "$tsv" ] || usage_error "stage 0 needs --tsv FILE, the table of recordings; --help shows all options"
    step manifests --outputs "$exp/manifests" -- \
        python "$recipe/local/prepare.py" --tsv "$tsv" "${audio[@]}" --out "$exp/manifests"
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
        --exp-dir "$exp/teacher" ${force:+--force} \
        --config "${teacher[@]}"
fi

if stage 4 "train the student alone, without teacher"; then
    step student_alone --after fbank tokens --outputs "$exp/student_alone" -- \
        python -m cascade.bin.train "${processes[@]}" --data "$exp/fbank" --tokens "$exp/tokens" \
        --exp-dir "$exp/student_alone" ${force:+--force} \
        --config "${student[@]}" distillation=null
fi

if stage 5 "train the student, distilled from the teacher"; then
    step student --after fbank tokens teacher --outputs "$exp/student" -- \
        python -m cascade.bin.train "${processes[@]}" --data "$exp/fbank" --tokens "$exp/tokens" \
        --exp-dir "$exp/student" \
        --teacher "$exp/teacher" ${force:+--force} --config "${student[@]}"
fi

if stage 6 "decode the test set: three modes, two methods"; then
    for model in teacher student_alone student; do
        for mode in streaming look_ahead full; do
            for method in greedy_search modified_beam_search; do
                out="$exp/$model/decode/$mode-$method"
                step "decode-$model-$mode-$method" --after fbank "$model" --outputs "$out/result.json" -- \
                    python -m cascade.bin.decode --exp-dir "$exp/$model" --manifest "$exp/fbank/test_cuts.jsonl.gz" \
                    --mode "$mode" --method "$method" "${with_device[@]}" --out "$out"
            done
        done
    done
fi

if stage 7 "latency: compute on one thread, memory, delays of words"; then
    step latency --after fbank teacher student_alone student --outputs "$exp/student/latency.json" -- \
        python -m cascade.bin.latency --exp-dir "$exp/teacher" "$exp/student_alone" "$exp/student" \
        --manifest "$exp/fbank/test_cuts.jsonl.gz" ${quick:+--num-chunks 50}
fi

if stage 8 "export the student to ONNX, compare it with PyTorch in onnxruntime and sherpa-onnx"; then
    step export --after fbank student --outputs "$exp/student/export/export.json" -- \
        python -m cascade.bin.export_onnx --exp-dir "$exp/student" --manifest "$exp/fbank/test_cuts.jsonl.gz" \
        --out "$exp/student/export"
fi

if stage 9 "report: results.json, RESULTS.md, plots"; then
    step report --optional "$exp"/{teacher,student_alone,student}/{train_summary.json,latency.json,losses.jsonl} \
        "$exp"/{teacher,student_alone,student}/decode/*/result.json "$exp/latency_full_size.json" \
        --outputs "$results/RESULTS.md" -- \
        python -m cascade.bin.report --exp-dir "$exp" --out "$results"
fi

recipe_end
