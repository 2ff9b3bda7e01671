"""README.md of an exported folder: how sherpa-onnx is told to run the files, and the model's card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from cascade.config.options import FRAME_SHIFT_MS, Config
from cascade.export.onnx import DECODER, FULL, JOINER, LOOK_AHEAD, NONCAUSAL, STREAMING
from cascade.report.markdown import int8_table, number

FILES = {
    STREAMING: "causal encoder, a chunk at a time: the first pass",
    NONCAUSAL: "non-causal encoder on what the causal one gave: look-ahead blocks and the full pass of our own runtime",
    LOOK_AHEAD: "both encoders, a block at a time, for sherpa-onnx",
    FULL: "both encoders over a whole recording, for sherpa-onnx",
    DECODER: "predictor", JOINER: "joiner, with the encoder's projection",
    "tokens.txt": "token and number, a line each", "bpe.vocab": "for sherpa-onnx's hotwords",
}  # fmt: skip


def describe_export(metadata: dict[str, Any], exp_dir: Path, config: Config, license_name: str | None = None) -> str:
    """Markdown.

    Args:
      metadata: what export.json says.
      exp_dir: where training, decoding and, beside it, the manifests and the statistics of the data left their results;
        what is not there is said to be missing.
      license_name: of the weights; None: as the manifests' about.json has it.
    """
    sherpa = _sherpa_commands(metadata, config) if FULL in metadata["bytes"] else [
        "sherpa-onnx's transducers have no LSTM predictor: these files run in our own runtime only."
    ]  # fmt: skip
    lines = [
        f"# {metadata['model']}", "",
        "A speech recogniser for streams and recordings in two passes (cascaded encoders, transducer), as ONNX graphs. "
        f"Exported with a chunk of {metadata['chunk_ms']} ms, look-ahead blocks of {metadata['look_ahead_ms']} ms and "
        f"a left context of {metadata['left_context_ms']} ms; {metadata['sampling_rate']} Hz, samples in [-1, 1].", "",
        "| file | what it is |", "|---|---|",
        *(f"| {name} | {what} |" for name, what in FILES.items() if name in metadata["bytes"]), "",
        "## Our own runtime", "", "Installed by `pip install '.[server]'` in a clone of the project, "
        "without PyTorch:", "",
        "    python -m cascade.bin.transcribe --onnx-dir . FILE.wav",
        "    python -m cascade.bin.serve --onnx-dir .            # then open http://127.0.0.1:8080", "",
        "## sherpa-onnx", "", *sherpa, "", *_int8(metadata),
        *_card(metadata, exp_dir, config, license_name), "",
    ]  # fmt: skip
    return "\n".join(lines)


def tail_seconds(step_ms: int) -> float:
    """Silence that an online recogniser needs behind the last word: one step, and the frame it waits for."""
    return (step_ms + FRAME_SHIFT_MS) / 1000


def _sherpa_commands(metadata: dict[str, Any], config: Config) -> list[str]:
    shared = f"--tokens=tokens.txt --decoder={DECODER} --joiner={JOINER} --num-threads=1"
    shared += f" --sample-rate={metadata['sampling_rate']} --feat-dim={metadata['num_mel_bins']}"
    streaming, look_ahead = tail_seconds(metadata["chunk_ms"]), tail_seconds(metadata["look_ahead_ms"])
    feature_options = f"sample_rate={metadata['sampling_rate']}, feature_dim={metadata['num_mel_bins']}"
    lines = [
        "Version 1.11.0 or newer (`pip install sherpa-onnx sherpa-onnx-bin`). The first pass, the pass with "
        "look-ahead, the full pass in C++; FILE.wav has 16-bit samples:", "",
        f"    sherpa-onnx --encoder={STREAMING} {shared} FILE.wav",
        f"    sherpa-onnx --encoder={LOOK_AHEAD} {shared} FILE.wav",
        f"    sherpa-onnx-offline --encoder={FULL} {shared} FILE.wav", "",
        f"An online recogniser drops what does not fill a step. Append {streaming:g} s of zeros for {STREAMING}, "
        f"{look_ahead:g} s for {LOOK_AHEAD}, or the last word is cut (the program above appends its own). In "
        "Python:", "",
        "    import numpy as np, sherpa_onnx, soundfile",
        '    samples, rate = soundfile.read("FILE.wav", dtype="float32")       # mono',
        f'    files = dict(tokens="tokens.txt", decoder="{DECODER}", joiner="{JOINER}", {feature_options})',
        f'    recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(encoder="{STREAMING}", **files)',
        "    stream = recognizer.create_stream()",
        "    stream.accept_waveform(rate, samples)",
        f"    stream.accept_waveform(rate, np.zeros(round({streaming:g} * rate), np.float32))",
        "    stream.input_finished()",
        "    while recognizer.is_ready(stream):",
        "        recognizer.decode_stream(stream)",
        "    print(recognizer.get_result(stream))", "",
        f'    recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(encoder="{FULL}", **files)',
        "    stream = recognizer.create_stream()                              # a whole recording",
        "    stream.accept_waveform(rate, samples)",
        "    recognizer.decode_stream(stream)",
        "    print(stream.result.text)", "",
        f"Android's two-pass app (SherpaOnnx2Pass) takes {STREAMING} in getModelConfig (OnlineRecognizer.kt, "
        f"firstType) and {FULL} in getOfflineModelConfig (OfflineRecognizer.kt, secondType), both as transducers "
        f"with the same {DECODER}, {JOINER} and tokens.txt, from app/src/main/assets.", "",
    ]  # fmt: skip
    beam = "`--decoding-method=modified_beam_search --max-active-paths=4`"
    if not config.augment.carry_over_share:
        lines += [
            "sherpa-onnx's greedy search begins with the last labels behind an endpoint, which this model never saw "
            f"(`augment.carry_over_share`): where audio has pauses, take {beam}.", "",
        ]  # fmt: skip
    if config.tokens.kind == "bpe":
        lines.append(
            f"Hotwords, a phrase a line: {beam} `--hotwords-file=F --hotwords-score=1.5 --modeling-unit=bpe "
            "--bpe-vocab=bpe.vocab`."
        )
    else:
        lines.append(
            "sherpa-onnx's hotwords need tokens of kind bpe (`--modeling-unit=bpe --bpe-vocab=bpe.vocab`); "
            f"these are {config.tokens.kind}. Our own runtime has hotwords with any."
        )
    return [
        *lines, f"A language model over these tokens: {beam} `--lm=F.onnx --lm-scale=A`, with `--lodr-fst=F.fst "
        "--lodr-scale=B` (B negative) against the internal one.",
        f"`--blank-penalty` comes on top of the {metadata['decoding']['blank_penalty']:g} that is part of {JOINER}.",
    ]  # fmt: skip


def _int8(metadata: dict[str, Any]) -> list[str]:
    """Which files compute in 8 bits, and what that costs."""
    int8 = metadata.get("int8")
    if int8 is None:
        return []
    sizes = ", ".join(
        f"{name} ({metadata['bytes'][name] / metadata['bytes'][float32]:.2f} of float32's size)"
        for float32, name in int8["files"].items()
    )
    lines = [
        "## int8", "", f"Files in 8 bits: {sizes or 'none'}. Give them to sherpa-onnx in the place of their float32 "
        "neighbours; our own runtime takes them with `--int8`:", "",
        "    python -m cascade.bin.transcribe --onnx-dir . --int8 FILE.wav", "",
        f"Weights have {int8['weight_bits']} bits; predictor, front end and the joiner's output are float32.", "",
        *(f"{name} stays float32: {reason}." for name, reason in int8["float32"].items()), "",
        int8_table(int8), "",
    ]  # fmt: skip
    return lines


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none, or a damaged one, which is no reason to lose an export."""
    try:
        values = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        values = None
    if isinstance(values, dict):
        return values
    logging.warning("%s is damaged: the model's card leaves it out", path)
    return {}


def _card(metadata: dict[str, Any], exp_dir: Path, config: Config, license_name: str | None) -> list[str]:
    """What the model learned from, what it can do, and what it cannot."""
    about, summary = _read(exp_dir.parent / "manifests" / "about.json"), _read(exp_dir / "train_summary.json")
    data = "no statistics were found"
    if statistics := _read(exp_dir.parent / "data" / "statistics.json"):
        train = statistics.get("splits", {}).get("train", {})
        train = train | {"hours": round(train.get("hours", 0.0), 1)}
        names = ("hours", "utterances", "speakers", "words")
        data = ", ".join(f"{train[name]} {name}" for name in names if name in train)
    license_name = license_name or about.get("license", "not stated")
    size = f"{summary['num_params'] / 1e6:.2f} M parameters, " if "num_params" in summary else ""
    trained_at = f"commit {summary['commit']}" if "commit" in summary else "unknown origin"
    lines = [
        "## Model card", "", f"- Training data: {about.get('data', 'not named')}; {data}.",
        f"- Network: {size}causal encoder {config.model.causal.num_layers} deep, non-causal encoder "
        f"{config.model.noncausal.num_layers} deep, width {config.model.d_model}, predictor "
        f"{config.model.predictor.kind}; tokens: {metadata['vocab_size']} of kind {config.tokens.kind}.",
        f"- Exported at commit {metadata['commit']}; weights of {trained_at}.",
        f"- Licence of the weights: {license_name}. The code is under Apache-2.0.",
        "- Limits: one language and the kind of speech it was trained on; words outside of what tokens.txt can spell "
        "cannot be said; word error rates below hold for their test set only.", "",
    ]  # fmt: skip
    found = map(_read, sorted(exp_dir.glob("decode/**/result.json")))
    rows = [row for row in found if {"test_set", "mode", "method", "wer", "commit"} <= row.keys()]
    if not rows:
        return [*lines, "It was not tested: no results of `decode` were found."]
    lines += ["| test set | mode | search | WER % | commit |", "|---|---|---|---:|---|"]
    return lines + [
        f"| {row['test_set']} | {row['mode']} | {row['method']}{' with ' + row['ngram'] if row.get('ngram') else ''} "
        f"| {number(row['wer'])} | {row['commit']} |" for row in rows
    ]
