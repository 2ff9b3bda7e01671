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
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.bin.cli import run_program
from cascade.bin.device_arguments import add_device_argument, open_device
from cascade.bin.model_arguments import add_blank_penalty
from cascade.checkpoint import load_model
from cascade.config.load import load_config
from cascade.config.options import FRAME_SHIFT_MS, Config, ConfigError
from cascade.data.alignments import TimedWord, read_alignments, read_ctm
from cascade.data.decode_batches import decode_batches
from cascade.measure.compute import TimedModel, summarise, time_chunks, time_mode
from cascade.measure.delay import (
    SpokenWord,
    algorithmic_delay,
    flicker,
    measure_delays,
    summary,
    usable_words,
    watch_streams,
)
from cascade.measure.memory import measure_memory
from cascade.models.build import build_model
from cascade.models.prepack import prepack
from cascade.provenance import command_line, git_commit, machine
from cascade.report.collect import describe_model
from cascade.report.plots import draw_latency
from cascade.search.alignment import align_batch
from cascade.search.methods import (
    DEFAULT_CHUNK_MS,
    DEFAULT_LOOK_AHEAD_MS,
    STREAMING_MODES,
    DecodingOptions,
    default_left_context_ms,
)
from cascade.stream.words import words_of
from cascade.text.normal import split_words
from cascade.text.tokens import Tokenizer

_NOISE_FRAMES = 3000
_FEWEST_UTTERANCES = 50
"""What the timing of chunks hears at least."""
_TIMED_SHARE = 8
"""The steps of one utterance in so many are timed in every mode."""


@dataclass
class Spoken:
    """One utterance of the manifest: its reference's words and its (T, F) features."""

    id: str
    text: list[str]
    features: Tensor


@dataclass
class Loaded:
    """One model of this run; tokenizer, directory and speech only of a trained one."""

    timed: TimedModel
    config: Config
    about: dict[str, Any]
    spec: dict[str, Any]
    tokenizer: Tokenizer | None = None
    directory: Path | None = None
    speech: list[Spoken] = field(default_factory=list)


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
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the delays (report does so too)")
    arguments = parser.parse_args()
    if not arguments.exp_dir and not arguments.config:
        raise ConfigError("name at least one model: --exp-dir DIR or --config YAML")
    for name, least in (("num_chunks", 1), ("threads", 1), ("num_utterances", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    for name in ("manifest", "alignment"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{name} {path} not found")
    has_delays = arguments.manifest is not None and arguments.exp_dir and arguments.num_utterances
    for name in ("alignment", "plot"):
        if getattr(arguments, name) is not None and not has_delays:
            raise ConfigError(f"--{name} needs --exp-dir, --manifest and --num-utterances above 0")
    return arguments


def read_speech(manifest: Path, config: Config, max_utterances: int) -> list[Spoken]:
    """Evenly spaced utterances of a manifest, in the order of their ids."""
    speech = []
    for batch in decode_batches(manifest, config, 30.0, max_utterances):
        for name, text, features, length in zip(
            batch.ids, batch.texts, batch.features, batch.feature_lens.tolist(), strict=True
        ):
            speech.append(Spoken(name, split_words(text), features[:length]))
    if not speech:
        raise ValueError(f"{manifest} holds no utterance that can be decoded")
    return sorted(speech, key=lambda item: item.id)


def noise(config: Config, mean: Tensor, scale: Tensor) -> Tensor:
    """(T, F) frames with the training data's mean and spread."""
    generator = torch.Generator().manual_seed(config.seed)
    return mean + torch.randn(_NOISE_FRAMES, config.features.num_mel_bins, generator=generator) / scale


def load_models(arguments: argparse.Namespace) -> list[Loaded]:
    """Every model, the trained ones with the speech they hear."""
    loaded = []
    for directory in arguments.exp_dir:
        model, config, tokenizer = load_model(directory)
        speech = []
        if arguments.manifest is None:
            features = noise(config, model.encoder.feature_mean, model.encoder.feature_scale)
        else:
            count = max(arguments.num_utterances, _FEWEST_UTTERANCES)
            speech = read_speech(arguments.manifest, config, count)
            features = torch.cat([item.features for item in speech])[: 4 * _NOISE_FRAMES]
        options = DecodingOptions.for_model(config, blank_penalty=arguments.blank_penalty)
        about, spec = describe_model(model, directory, config), {"exp_dir": str(directory)}
        timed = TimedModel(
            directory.resolve().name, prepack(model), features, tokenizer.unk_id, options.blank_penalty
        )
        loaded.append(Loaded(timed, config, about, spec, tokenizer, directory, speech))
    for items in arguments.config:
        files, overrides = [item for item in items if "=" not in item], [item for item in items if "=" in item]
        config = load_config(files, overrides)
        torch.manual_seed(config.seed)
        model = build_model(config, config.tokens.vocab_size).eval()
        features = noise(config, model.encoder.feature_mean, model.encoder.feature_scale)
        about = describe_model(model, None, config)
        options = DecodingOptions.for_model(config, blank_penalty=arguments.blank_penalty)
        name = Path(files[-1]).stem if files else "defaults"
        timed = TimedModel(name, prepack(model), features, blank_penalty=options.blank_penalty, paced=True)
        loaded.append(Loaded(timed, config, about, {"config": files, "overrides": overrides}))
    return loaded


def own_alignment(item: Loaded, speech: Sequence[Spoken], options: DecodingOptions) -> dict[str, Sequence[SpokenWord]]:
    """The Viterbi alignment of every utterance that has one and no unknown token."""
    model, tokenizer, found = item.timed.model, item.tokenizer, {}
    tokens = {one.id: tokenizer.encode(" ".join(one.text)) for one in speech}
    known = [one for one in speech if tokens[one.id] and tokenizer.unk_id not in tokens[one.id]]
    for begin in range(0, len(known), 10):
        some = known[begin : begin + 10]
        features = torch.nn.utils.rnn.pad_sequence([one.features for one in some], batch_first=True)
        lens = torch.tensor([one.features.shape[0] for one in some])
        sequences = [tokens[one.id] for one in some]
        aligned = align_batch(model, features, lens, sequences, options, item.config.loss.rnnt_type)
        for one, hypothesis in zip(some, aligned, strict=True):
            if hypothesis is not None:
                duration = one.features.shape[0] * FRAME_SHIFT_MS / 1000
                found[one.id] = words_of(hypothesis, tokenizer, duration=duration)
    return found


def true_ends(
    item: Loaded, speech: Sequence[Spoken], given: Mapping[str, Sequence[TimedWord]], options: DecodingOptions
) -> tuple[dict[str, list[float]], bool]:
    """Where the words of every utterance end, those without an alignment left out; False: by the model itself."""

    def usable(words: Mapping[str, Sequence[SpokenWord]]) -> dict[str, list[float]]:
        ends = {one.id: usable_words(words[one.id], one.text, item.tokenizer) for one in speech if one.id in words}
        return {name: values for name, values in ends.items() if values}

    if ends := usable(given):
        return ends, True
    return usable(own_alignment(item, speech, options)), False


def delays_of(
    item: Loaded, given: Mapping[str, Sequence[TimedWord]], options: Mapping[str, DecodingOptions],
    num_utterances: int, source: str,
) -> dict[str, Any] | None:  # fmt: skip
    """What latency.json says of one model's delays; None where no utterance has an alignment."""
    start = time.perf_counter()
    step = max(1, len(item.speech) // num_utterances)
    chosen = item.speech[::step][:num_utterances]
    ends, is_given = true_ends(item, chosen, given, options["full"])
    if not ends:
        logging.warning("%s: no utterance has an alignment, delays are left out", item.timed.name)
        return None
    speech = [one for one in chosen if one.id in ends]
    texts, features = [one.text for one in speech], [one.features for one in speech]
    watched = {
        mode: watch_streams(item.timed.model, item.tokenizer, options[mode], features) for mode in STREAMING_MODES
    }
    modes = {}
    for mode, found in watched.items():
        first_pass = watched["streaming" if mode == "full" else mode]
        last_frames = [one.last_frame for one in first_pass]
        delays = measure_delays(found, texts, [ends[one.id] for one in speech], options[mode], last_frames)
        modes[mode] = algorithmic_delay(options[mode]) | delays.row()
    logging.info("%s: delays of %d utterances in %.1f s", item.timed.name, len(speech), time.perf_counter() - start)
    silences = [one.duration - ends[spoken.id][-1] for one, spoken in zip(watched["full"], speech, strict=True)]
    return {
        "reference": source if is_given else "model-relative",
        "num_utterances": len(speech),
        "num_left_out": len(chosen) - len(speech),
        "audio_seconds": round(sum(one.duration for one in watched["full"]), 2),
        "num_reference_words": sum(map(len, texts)),
        **summary("silence_at_end_ms", [1000 * silence for silence in silences]),
        **flicker(watched["two_pass"]),
        "modes": modes,
    }


def add_delays(
    loaded: Sequence[Loaded], rows: Sequence[dict[str, Any]], arguments: argparse.Namespace,
    contexts: dict[str, int],
) -> None:  # fmt: skip
    """Measure the delays of the trained models and put them into their rows."""
    given = read_ctm(arguments.alignment) if arguments.alignment else read_alignments(arguments.manifest)
    source = arguments.alignment.name if arguments.alignment else "true"
    trained = [(item, row) for item, row in zip(loaded, rows, strict=True) if item.tokenizer is not None]
    timed: dict[str, list] = {mode: [] for mode in STREAMING_MODES}
    for item, row in trained:
        options = {
            mode: DecodingOptions(mode=mode, blank_penalty=item.timed.blank_penalty, **contexts)
            for mode in STREAMING_MODES
        }
        row["delays"] = delays_of(item, given, options, arguments.num_utterances, source)
        if arguments.alignment and row["delays"] and row["delays"]["reference"] != source:
            raise ValueError(f"--alignment {arguments.alignment} fits no utterance of {arguments.manifest}")
        some = item.speech[:: _TIMED_SHARE if len(item.speech) >= _FEWEST_UTTERANCES else 1]
        for mode in STREAMING_MODES:
            timed[mode].append((item.timed.model, item.tokenizer, options[mode], [one.features for one in some]))
    for mode in STREAMING_MODES:
        for found, (_, row) in zip(time_mode(timed[mode]), trained, strict=True):
            if row["delays"]:
                row["delays"]["modes"][mode] |= found.row()


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
    loaded = load_models(arguments)
    if left is None:
        left = max(default_left_context_ms(item.config, arguments.chunk_ms) for item in loaded)
    contexts["left_context_ms"] = left
    memory = [{}] * len(loaded)
    if not arguments.no_memory:
        specs = [item.spec | {"blank_penalty": item.timed.blank_penalty} for item in loaded]
        memory = measure_memory(specs, arguments.chunk_ms, left)
    time_chunks([item.timed for item in loaded], arguments.num_chunks, arguments.chunk_ms, left)
    rows = []
    for item, needed in zip(loaded, memory, strict=True):
        rows.append(summarise(item.timed, arguments.chunk_ms, left) | item.about | needed | {
            "look_ahead_ms": contexts["look_ahead_ms"],
            "features": arguments.manifest.name if item.speech else "noise",
            "weights": "random" if item.tokenizer is None else "trained", "threads": arguments.threads,
            "commit": git_commit(), "command": command_line(), "machine": machine(),
        })  # fmt: skip
    if arguments.exp_dir and arguments.manifest is not None and arguments.num_utterances:
        add_delays(loaded, rows, arguments, contexts)
    for item, row in zip(loaded, rows, strict=True):
        if item.directory is not None:
            (item.directory / "latency.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw_latency({row["model"]: row for row in rows}, arguments.plot)
    print_table(rows)
    print_delays([row for row in rows if row.get("delays")])


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per model on stdout; the last column is p50 as a share of the first model's."""
    header = f"{'model':<20}{'params M':>9}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'RTF':>8}"
    print(header + f"{'memory MB':>11}{'symbols/s':>11}{'p50 ratio':>11}")
    for row in rows:
        ratio = row["chunk_compute_ms_p50"] / rows[0]["chunk_compute_ms_p50"]
        print(
            f"{row['model']:<20}{row['num_params'] / 1e6:>9.2f}{row['chunk_compute_ms_p50']:>9.2f}"
            f"{row['chunk_compute_ms_p95']:>9.2f}{row['chunk_compute_ms_p99']:>9.2f}{row['rtf']:>8.4f}"
            f"{row.get('peak_memory_mb') or np.nan:>11.1f}{row['symbols_per_second']:>11.1f}{ratio:>11.3f}"
        )
    logging.info("%d chunks of %d ms per model, in turns", rows[0]["num_chunks"], rows[0]["chunk_ms"])


def print_delays(rows: list[dict[str, Any]]) -> None:
    """One line per model and mode on stdout: medians and 90th percentiles in ms."""
    if not rows:
        return
    columns = ("emission_delay_ms", "word_delay_ms", "final_delay_ms", "endpoint_delay_ms")
    titles = "".join(f"{name.removesuffix('_ms').replace('_', ' '):>18}" for name in columns)
    print(f"\n{'p50 / p90 in ms':<34}{titles}{'+ compute':>11}")
    for row in rows:
        for mode, found in row["delays"]["modes"].items():
            cells = "".join(f"{_cell(found, name):>18}" for name in columns)
            print(f"{row['model']:<20}{mode:<14}{cells}{found['final_compute_ms_p50'] or np.nan:>11.2f}")
    for row in rows:
        about = row["delays"]
        print(
            f"{row['model']}: {about['num_utterances']} utterances ({about['reference']}), two_pass changes "
            f"{about['num_changed_words']} of {about['num_words']} words, {about['flicker_per_minute']} a minute"
        )


def _cell(found: dict[str, Any], name: str) -> str:
    return "-" if found[f"{name}_p50"] is None else f"{found[f'{name}_p50']:.0f} / {found[f'{name}_p90']:.0f}"


if __name__ == "__main__":
    run_program(main)
