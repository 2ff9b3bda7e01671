#!/usr/bin/env bash
# Spoken home-assistant commands, synthesised on the spot: nothing to download. A teacher, a student alone and a student
# distilled from the teacher, decoded in three modes and timed. ./egs/commands/run.sh --help lists options and stages.
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"

quick_conf=(${quick:+"$conf/quick.yaml"})
data=("$conf/data.yaml" "${quick_conf[@]}")
teacher=("$conf/data.yaml" "$conf/teacher.yaml" "${quick_conf[@]}")
student=("$conf/data.yaml" "$conf/student.yaml" "${quick_conf[@]}")
# The results are those of two CPU processes, whatever this machine has; --device auto or cuda trains in one process.
processes=(--device cpu --num-processes 2)
[ "${device:-cpu}" = cpu ] || processes=("${with_device[@]}")

if stage 0 "data: sentences, voices and noise, spoken by eSpeak NG; validation"; then
    step manifests --inputs "$recipe/local" tools/synthesise.py --outputs "$exp/manifests" -- \
        python "$recipe/local/prepare.py" --out "$exp/manifests" \
        ${corpus_dir:+--corpus-dir "$corpus_dir"} ${quick:+--max-utterances 60}
    step data --after manifests --outputs "$exp/data" -- \
        python -m cascade.bin.prepare_data --manifest-dir "$exp/manifests" --out "$exp/data" --config "${data[@]}"
fi

if stage 1 "features: log-mel fbank, speed copies of train"; then
    step fbank --after data ${noise_dir:+--inputs "$noise_dir"} ${rir_dir:+--inputs "$rir_dir"} \
        --outputs "$exp/fbank" -- \
        python -m cascade.bin.compute_features --data "$exp/data" --out "$exp/fbank" \
        ${noise_dir:+--noise-dir "$noise_dir"} ${rir_dir:+--rir-dir "$rir_dir"} --config "${data[@]}"
fi

if stage 2 "tokens"; then
    step tokens --after data --outputs "$exp/tokens" -- \
        python -m cascade.bin.train_tokens --data "$exp/data" --out "$exp/tokens" --config "${data[@]}"
fi

if stage 3 "train the teacher"; then
    step teacher --after fbank tokens --outputs "$exp/teacher" -- \
        python -m cascade.bin.train --data "$exp/fbank" --tokens "$exp/tokens" --exp-dir "$exp/teacher" \
        "${processes[@]}" ${force:+--force} --config "${teacher[@]}"
fi

if stage 4 "train the student alone, without teacher"; then
    step student_alone --after fbank tokens --outputs "$exp/student_alone" -- \
        python -m cascade.bin.train --data "$exp/fbank" --tokens "$exp/tokens" --exp-dir "$exp/student_alone" \
        "${processes[@]}" ${force:+--force} --config "${student[@]}" distillation=null
fi

if stage 5 "train the student, distilled from the teacher"; then
    step student --after fbank tokens teacher --outputs "$exp/student" -- \
        python -m cascade.bin.train --data "$exp/fbank" --tokens "$exp/tokens" --exp-dir "$exp/student" \
        --teacher "$exp/teacher" "${processes[@]}" ${force:+--force} --config "${student[@]}"
fi

if stage 6 "decode the test set: three modes, two methods"; then
    for model in teacher student_alone student; do
        for mode in streaming look_ahead full; do
            for method in greedy_search modified_beam_search; do
                out="$exp/$model/decode/$mode-$method"
                step "decode-$model-$mode-$method" --after fbank "$model" --outputs "$out/result.json" -- \
                    python -m cascade.bin.decode --exp-dir "$exp/$model" --manifest "$exp/fbank/test_cuts.jsonl.gz" \
                    --mode "$mode" --method "$method" --device "${device:-cpu}" --out "$out"
            done
        done
    done
fi

if stage 7 "latency: compute per chunk on one thread"; then
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
