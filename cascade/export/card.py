"""README.md of an exported folder: how sherpa-onnx is told to run the files, and the model's card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cascade.config.options import FRAME_SHIFT_MS, Config
from cascade.export.onnx import DECODER, FULL, JOINER, LOOK_AHEAD, STREAMING
from cascade.report.markdown import int8_table


def describe_export(metadata: dict[str, Any], exp_dir: Path, config: Config, license_text: str) -> str:
    """Markdown.

    Args:
      about: what export.json says.
      exp_dir: where training, decoding and, beside it, the statistics of the data left their results; what is not
        there is said to be missing.
    """
    sherpa = _sherpa_commands(metadata, config) if FULL in metadata["bytes"] else [
        "sherpa-onnx's transducers have no LSTM predictor: these files run in our own runtime only."
    ]  # fmt: skip
    lines = [
        f"# {metadata['model']}", "",
        f"Exported with a chunk of {metadata['chunk_ms']} ms, look-ahead blocks of {metadata['look_ahead_ms']} ms and "
        f"a left context of {metadata['left_context_ms']} ms; {metadata['sampling_rate']} Hz, samples in [-1, 1].", "",
        "## Our own runtime", "", "    python -m cascade.bin.transcribe --onnx-dir . FILE.wav",
        "    python -m cascade.bin.serve --onnx-dir .", "", "## sherpa-onnx", "", *sherpa, "", *_int8(metadata),
        *_card(metadata, exp_dir, config, license_text), "",
    ]  # fmt: skip
    return "\n".join(lines)


def tail_seconds(step_ms: int) -> float:
    """Silence that an online recogniser needs behind the last word: one step, and the frame it waits for."""
    return (step_ms + FRAME_SHIFT_MS) / 1000


def _sherpa_commands(metadata: dict[str, Any], config: Config) -> list[str]:
    shared = f"--tokens=tokens.txt --decoder={DECODER} --joiner={JOINER} --num-threads=1"
    streaming, look_ahead = tail_seconds(metadata["chunk_ms"]), tail_seconds(metadata["look_ahead_ms"])
    feature_options = f"sample_rate={metadata['sampling_rate']}, feature_dim={metadata['num_mel_bins']}"
    lines = [
        "Version 1.11.0 or newer. The first pass, the pass with look-ahead, the full pass (C++):", "",
        f"    sherpa-onnx --encoder={STREAMING} {shared} FILE.wav",
        f"    sherpa-onnx --encoder={LOOK_AHEAD} {shared} FILE.wav",
        f"    sherpa-onnx-offline --encoder={FULL} {shared} FILE.wav", "",
        f"An online recogniser drops what does not fill a step. Append {streaming:g} s of zeros for {STREAMING}, "
        f"{look_ahead:g} s for {LOOK_AHEAD}, or the last word is cut. In Python:", "",
        "    import numpy as np, sherpa_onnx",
        f'    files = dict(tokens="tokens.txt", decoder="{DECODER}", joiner="{JOINER}", {feature_options})',
        f'    recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(encoder="{STREAMING}", **files)',
        "    stream = recognizer.create_stream()",
        f"    stream.accept_waveform({metadata['sampling_rate']}, samples)",
        f"    stream.accept_waveform({metadata['sampling_rate']}, "
        f"np.zeros({round(streaming * metadata['sampling_rate'])}, np.float32))",
        "    stream.input_finished()",
        "    while recognizer.is_ready(stream):",
        "        recognizer.decode_stream(stream)",
        "    print(recognizer.get_result(stream))",
        f'    # Whole recordings: sherpa_onnx.OfflineRecognizer.from_transducer(encoder="{FULL}", **files)', "",
        f"Android's two-pass app (SherpaOnnx2Pass) takes {STREAMING} in getModelConfig (OnlineRecognizer.kt, "
        f"firstType) and {FULL} in getOfflineModelConfig (OfflineRecognizer.kt, secondType), both as transducers "
        f"with the same {DECODER}, {JOINER} and tokens.txt, from app/src/main/assets.", "",
    ]  # fmt: skip
    beam = "`--decoding-method=modified_beam_search --max-active-paths=4`"
    if config.tokens.kind == "bpe":
        lines.append(
            f"Hotwords: {beam} `--hotwords-file=F --hotwords-score=1.5 --modeling-unit=bpe --bpe-vocab=bpe.vocab`."
        )
    else:
        lines.append(
            "Hotwords need tokens of kind bpe (`--modeling-unit=bpe --bpe-vocab=bpe.vocab`); "
            f"these are {config.tokens.kind}."
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


def _card(metadata: dict[str, Any], exp_dir: Path, config: Config, license_text: str) -> list[str]:
    """What the model learned from, what it can do, and what it cannot."""
    data = "no statistics were found"
    if (statistics := exp_dir.parent / "data" / "statistics.json").is_file():
        train = json.loads(statistics.read_text(encoding="utf-8"))["splits"].get("train", {})
        names = ("hours", "utterances", "speakers", "words")
        data = ", ".join(f"{train[name]} {name}" for name in names if name in train)
    lines = [
        "## Model card", "", f"- Training data: {data}.",
        f"- Network: {config.model.causal.num_layers} causal and {config.model.noncausal.num_layers} non-causal layers "
        f"of width {config.model.d_model}, predictor {config.model.predictor.kind}; "
        f"tokens: {config.tokens.kind}.",
        f"- Exported at commit {metadata['commit']}; weights of {_trained_at(exp_dir)}.",
        f"- Licence of the weights: {license_text}. The code is under Apache-2.0.",
        "- Limits: one language and the kind of speech it was trained on; tokens outside of tokens.txt cannot be said; "
        "word error rates below hold for their test set only.", "",
    ]  # fmt: skip
    results = sorted(exp_dir.glob("decode/**/result.json"))
    if not results:
        return [*lines, "It was not tested: no results of `decode` were found."]
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    lines += ["| test set | mode | search | WER % | commit |", "|---|---|---|---:|---|"]
    return lines + [
        f"| {row['test_set']} | {row['mode']} | {row['method']}{' with ' + row['ngram'] if row.get('ngram') else ''} "
        f"| {row['wer']:.2f} | {row['commit']} |" for row in rows
    ]


def _trained_at(exp_dir: Path) -> str:
    summary = exp_dir / "train_summary.json"
    if not summary.is_file():
        return "unknown origin"
    return f"commit {json.loads(summary.read_text(encoding='utf-8'))['commit']}"
