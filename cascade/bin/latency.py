"""Measure latency: compute per chunk and real-time factor, memory, and when words come, several models in one run.

Models are trained ones (--exp-dir, any number) or random weights of a config (--config, repeated for several), timed
in turns so that their ratios are fair. Trained ones get DIR/latency.json; --out FILE takes all rows as one JSON list.

With --manifest, --num-utterances of its utterances are streamed through trained models in every mode, and the delay
of words is measured: from the true end of a correct word to the frame that said it (emission delay) and to the moment
a user sees it (word delay), and from the end of speech to the final text (final delay). Where words truly end say the
manifest's own alignments (cuts' supervisions, a manifest's `words`) or --alignment CTM, which `align` can make;
without either, the Viterbi alignment of the model's own full pass: such delays are called model-relative.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from cascade.bin.cli import run_program
from cascade.bin.device_arguments import add_device_argument, open_device
from cascade.bin.model_arguments import add_blank_penalty, check_values
from cascade.config.options import Config, ConfigError
from cascade.data.alignments import read_alignments, read_ctm
from cascade.data.decode_batches import decode_batches
from cascade.files import check_writable, replacing
from cascade.measure.compute import NOISE_FRAMES, ModelSource, Spoken, TimedModel, open_model, summarise, time_chunks
from cascade.measure.latency import FEWEST_UTTERANCES, measure_latency
from cascade.measure.memory import measure_memory
from cascade.provenance import command_line, git_commit, machine
from cascade.report.collect import describe_model
from cascade.report.markdown import compute_table, delay_table
from cascade.search.methods import (
    DEFAULT_CHUNK_MS,
    DEFAULT_LOOK_AHEAD_MS,
    DecodingOptions,
    default_left_context_ms,
)
from cascade.text.normal import split_words


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", nargs="+", type=Path, default=[], metavar="DIR", help="model directories")
    parser.add_argument(
        "--config", nargs="+", action="append", default=[], metavar="YAML",
        help="random weights of this config: files and section.key=value; repeat the option for another model",
    )
    parser.add_argument(
        "--manifest", type=Path, metavar="FILE", help="speech: CUTS.jsonl.gz or MANIFEST.jsonl (default: noise)"
    )
    parser.add_argument("--alignment", type=Path, metavar="CTM", help="when the manifest's words were spoken")
    parser.add_argument(
        "--num-utterances", type=int, default=100, metavar="N",
        help="utterances whose words' delays are measured, evenly spaced over the manifest (default 100, 0: none)",
    )
    parser.add_argument("--chunk-ms", type=int, default=DEFAULT_CHUNK_MS, metavar="MS", help="causal chunk (320)")
    parser.add_argument(
        "--look-ahead-ms", type=int, metavar="MS", help="look-ahead block (default: 640, or the next whole chunks)"
    )
    parser.add_argument("--left-context-ms", type=int, metavar="MS", help="left context (default: as in decode)")
    add_blank_penalty(parser)
    parser.add_argument("--num-chunks", type=int, default=300, metavar="N", help="chunks per model (default 300)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    add_device_argument(parser, cpu_only=True)
    parser.add_argument("--no-memory", action="store_true", help="leave out memory, which takes a process per model")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all rows here too, as a JSON list")
    arguments = parser.parse_args()
    if not arguments.exp_dir and not arguments.config:
        raise ConfigError("name at least one model: --exp-dir DIR or --config YAML")
    check_values(arguments, num_chunks=1, threads=1, num_utterances=0)
    has_delays = arguments.manifest is not None and arguments.exp_dir and arguments.num_utterances
    if arguments.alignment is not None and not has_delays:
        raise ConfigError("--alignment needs --exp-dir, --manifest and --num-utterances above 0")
    return arguments


def read_spoken(manifest: Path, config: Config, max_utterances: int) -> list[Spoken]:
    """Evenly spaced utterances of a manifest, in the order of their ids."""
    speech = []
    for batch in decode_batches(manifest, config, 30.0, max_utterances):
        for name, text, features, length in zip(
            batch.ids, batch.texts, batch.features, batch.feature_lens.tolist(), strict=True
        ):
            speech.append(Spoken(name, split_words(text), features[:length]))
    if not speech:
        raise ValueError(f"{manifest} holds no utterance that can be decoded")
    return sorted(speech, key=lambda spoken: spoken.id)


def load_models(arguments: argparse.Namespace) -> tuple[list[ModelSource], list[TimedModel]]:
    """Every model, the trained ones with the speech they hear."""
    penalty = arguments.blank_penalty
    sources = [ModelSource(folder=str(folder), blank_penalty=penalty) for folder in arguments.exp_dir]
    for words in arguments.config:
        files, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
        sources.append(ModelSource(files=files, overrides=overrides, blank_penalty=penalty))
    models = [open_model(source) for source in sources]
    for model in models[: len(arguments.exp_dir) if arguments.manifest is not None else 0]:
        count = max(arguments.num_utterances, FEWEST_UTTERANCES)
        model.speech = read_spoken(arguments.manifest, model.config, count)
        model.features = torch.cat([spoken.features for spoken in model.speech])[: 4 * NOISE_FRAMES]
    return sources, models


def main() -> None:
    arguments = parse_arguments()
    blocks = -(-DEFAULT_LOOK_AHEAD_MS // max(1, arguments.chunk_ms))
    contexts = {"chunk_ms": arguments.chunk_ms, "look_ahead_ms": blocks * arguments.chunk_ms}
    if arguments.look_ahead_ms is not None:
        contexts["look_ahead_ms"] = arguments.look_ahead_ms
    left = arguments.left_context_ms
    DecodingOptions(
        mode="look_ahead", left_context_ms=arguments.chunk_ms if left is None else left,
        blank_penalty=arguments.blank_penalty or 0.0, **contexts,
    )  # fmt: skip
    open_device(arguments, "latency is the compute of CPU threads, one unless --threads says otherwise")
    if arguments.out is not None:
        check_writable(arguments.out.parent)
    sources, models = load_models(arguments)
    if left is None:
        left = max(default_left_context_ms(timed.config, arguments.chunk_ms) for timed in models)
    contexts["left_context_ms"] = left
    memory = [{}] * len(models)
    if not arguments.no_memory:
        memory = measure_memory(sources, arguments.chunk_ms, left)
    time_chunks(models, arguments.num_chunks, arguments.chunk_ms, left)
    rows = []
    for timed, needed in zip(models, memory, strict=True):
        description = describe_model(timed.model, timed.folder, timed.config)
        rows.append(summarise(timed, arguments.chunk_ms, left) | description | needed | {
            "look_ahead_ms": contexts["look_ahead_ms"],
            "features": arguments.manifest.name if timed.speech else "noise",
            "weights": "random" if timed.tokenizer is None else "trained", "threads": arguments.threads,
            "commit": git_commit(), "command": command_line(), "machine": machine(),
        })  # fmt: skip
    if arguments.exp_dir and arguments.manifest is not None and arguments.num_utterances:
        trained = models[: len(arguments.exp_dir)]
        given = read_ctm(arguments.alignment) if arguments.alignment else read_alignments(arguments.manifest)
        source = arguments.alignment.name if arguments.alignment else "true"
        delays = measure_latency(trained, given, source, arguments.num_utterances, contexts)
        for row, delay in zip(rows, delays, strict=False):
            row["delays"] = delay
            if arguments.alignment and delay and delay["reference"] != source:
                raise ValueError(f"--alignment {arguments.alignment} fits no utterance of {arguments.manifest}")
    print(*filter(None, (compute_table(rows, "Compute"), delay_table(rows))), sep="\n\n", flush=True)
    outputs = [(timed.folder / "latency.json", row) for timed, row in zip(models, rows, strict=True) if timed.folder]
    for path, values in [*outputs, *([(arguments.out, rows)] if arguments.out is not None else [])]:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
