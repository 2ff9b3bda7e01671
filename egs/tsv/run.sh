#!/usr/bin/env bash
# A table of recordings and transcripts, in any language: ./egs/tsv/run.sh --tsv data.tsv trains a teacher, a student
# alone and a student distilled from the teacher, decodes them in three modes and times them. --help lists options.

tsv=            # FILE path text [split] [speaker] [start] [end], tab-separated; paths are relative to its folder
large=          # models of 41 and 21 M parameters, for hundreds of hours and GPUs, instead of 5.0 and 2.4 M
device=auto     # NAME train and decode on cpu, cuda (a GPU) or auto (a GPU where there is one)
num_processes=  # N train with so many processes on this machine, one for each GPU or CPU core
check_options() {
    [ "$stage" -gt 0 ] || [ -n "$tsv" ] ||
        usage_error "stage 0 needs --tsv FILE, the table of recordings; --help shows all options"
}
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"

models="${large:+egs/librispeech/conf}"
models="${models:-$conf}"
data=("$conf/data.yaml" ${large:+"$conf/large/data.yaml"})
teacher=("${data[@]}" "$models/teacher.yaml" "${quick_conf[@]}")
student=("${data[@]}" "$models/teacher.yaml" "$models/student.yaml" "${quick_conf[@]}")
data+=("${quick_conf[@]}")

if stage 0 "data: the table, manifests, validation"; then
    step manifests --outputs "$exp/manifests" -- \
        python "$recipe/local/prepare.py" --tsv "$tsv" ${corpus_dir:+--audio-dir "$corpus_dir"} --out "$exp/manifests"
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

if stage 6 "decode the test set: three modes, two methods"; then
    for model in teacher student_alone student; do
        calibrate "$model"
        decode "$model" test --mode all --method all
    done
fi

if stage 7 "latency: compute on one thread, memory, delays of words"; then
    latency test ${quick:+--num-chunks 50}
fi

if stage 8 "export the student to ONNX, compare it with PyTorch in onnxruntime and sherpa-onnx"; then
    export_onnx student test
fi

if stage 9 "report: results.json, RESULTS.md, plots"; then
    report
fi

recipe_end
