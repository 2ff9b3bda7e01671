#!/usr/bin/env bash
# AN4: 0.6 h of spelled names, numbers and dates. A teacher, a student alone and a student distilled from the teacher,
# decoded in three modes and timed. ./egs/an4/run.sh --help lists options and stages.

# The results are those of two CPU processes, whatever this machine has; --device auto or cuda trains in one process.
device=cpu  # NAME train and decode on cpu, cuda (a GPU) or auto (a GPU where there is one)
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"

num_processes=2
[ "$device" = cpu ] || num_processes=""
data=("$conf/data.yaml" "${quick_conf[@]}")
aligner=("$conf/data.yaml" "$conf/teacher.yaml" "$conf/aligner.yaml" "${quick_conf[@]}")
teacher=("$conf/data.yaml" "$conf/teacher.yaml" "${quick_conf[@]}")
student=("$conf/data.yaml" "$conf/teacher.yaml" "$conf/student.yaml" "${quick_conf[@]}")
alignment="$exp/align/alignment.ctm"

if stage 0 "data: download or --corpus-dir, manifests, validation"; then
    step manifests --inputs ${corpus_dir:+"$corpus_dir"} --outputs "$exp/manifests" -- \
        python "$recipe/local/prepare.py" "${corpus[@]}" --out "$exp/manifests"
    prepare_data ${quick:+--max-utterances 60} --config "${data[@]}"
fi

if stage 1 "features: log-mel fbank, speed copies of train"; then
    compute_features --config "${data[@]}"
fi

if stage 2 "tokens"; then
    train_tokens --config "${data[@]}"
fi

if stage 3 "train the teacher, after a small model that finds the words to recombine"; then
    train aligner --config "${aligner[@]}"
    align aligner --mode streaming
    train teacher --alignment "$alignment" --config "${teacher[@]}"
fi

if stage 4 "train the student alone, without teacher"; then
    train student_alone --alignment "$alignment" --config "${student[@]}" distillation=null
fi

if stage 5 "train the student, distilled from the teacher"; then
    train student --teacher "$exp/teacher" --alignment "$alignment" --config "${student[@]}"
fi

if stage 6 "decode the test set: three modes, two methods"; then
    for model in teacher student_alone student; do
        calibrate "$model"
        decode "$model" test --mode all --method all
    done
fi

if stage 7 "latency: compute on one thread, memory, delays of words; compute of the pair in full size"; then
    latency test ${quick:+--num-chunks 50}
    full_size=egs/librispeech/conf
    step latency-full-size --outputs "$exp/latency_full_size.json" -- \
        python -m cascade.bin.latency --config "$full_size/teacher.yaml" \
        --config "$full_size/teacher.yaml" "$full_size/student.yaml" \
        --out "$exp/latency_full_size.json" ${quick:+--num-chunks 10}
fi

if stage 8 "export the student to ONNX, compare it with PyTorch in onnxruntime and sherpa-onnx"; then
    export_onnx student test
fi

if stage 9 "report: results.json, RESULTS.md, plots"; then
    report
fi

recipe_end
