#!/usr/bin/env bash
# Spoken home-assistant commands, synthesised on the spot: nothing to download. A teacher, a student alone and a student
# distilled from the teacher, decoded in three modes and timed. ./egs/commands/run.sh --help lists options and stages.

# The results are those of two CPU processes, whatever this machine has; --device auto or cuda trains in one process.
device=cpu  # NAME train and decode on cpu, cuda (a GPU) or auto (a GPU where there is one)
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"

num_processes=2
[ "$device" = cpu ] || num_processes=""
data=("$conf/data.yaml" "${quick_conf[@]}")
teacher=("$conf/data.yaml" "$conf/teacher.yaml" "${quick_conf[@]}")
student=("$conf/data.yaml" "$conf/teacher.yaml" "$conf/student.yaml" "${quick_conf[@]}")

if stage 0 "data: sentences, voices and noise, spoken by eSpeak NG; validation"; then
    step manifests --inputs "$recipe/local" tools/synthesise.py --outputs "$exp/manifests" -- \
        python "$recipe/local/prepare.py" --out "$exp/manifests" \
        ${corpus_dir:+--corpus-dir "$corpus_dir"} ${quick:+--max-utterances 60}
    prepare_data --config "${data[@]}"
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

if stage 6 "decode the test set: three modes, two methods"; then
    for model in teacher student_alone student; do
        calibrate "$model"
        decode "$model" test --mode all --method all
    done
fi

if stage 7 "latency: compute per chunk on one thread"; then
    latency test ${quick:+--num-chunks 50}
fi

if stage 8 "export the student to ONNX, compare it with PyTorch in onnxruntime and sherpa-onnx"; then
    export_onnx student test
fi

if stage 9 "report: results.json, RESULTS.md, plots"; then
    report
fi

recipe_end
if [ -z "$help" ] && [ -f "$exp/student/export/export.json" ]; then
    say "speak to it: $PYTHON -m cascade.bin.serve --onnx-dir $exp/student/export, then open http://127.0.0.1:8080"
fi
