"""Time the first pass: compute per chunk (p50, p95, p99) and real-time factor, several models in one run.

Models are trained ones (--exp-dir, any number) or random weights of a config (--config, repeated for several), timed
in turns so that their ratios are fair. Trained ones get DIR/latency.json; --out FILE takes all rows as one JSON list.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.bin.cli import run_program
from cascade.checkpoint import load_model
from cascade.config import Config, ConfigError, load_config
from cascade.data.decode_batches import decode_batches
from cascade.decoding.methods import DEFAULT_CHUNK_MS, DecodingOptions, default_left_context_ms
from cascade.models.build import build_model
from cascade.provenance import command_line, git_commit, machine
from cascade.scoring.latency import TimedModel, summarise, time_chunks
from cascade.scoring.results import describe_model

_NOISE_FRAMES = 3000


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
    parser.add_argument("--chunk-ms", type=int, default=DEFAULT_CHUNK_MS, metavar="MS", help="causal chunk (320)")
    parser.add_argument("--left-context-ms", type=int, metavar="MS", help="left context (default: as in decode)")
    parser.add_argument("--num-chunks", type=int, default=300, metavar="N", help="chunks per model (default 300)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all rows here too, as a JSON list")
    arguments = parser.parse_args()
    if not arguments.exp_dir and not arguments.config:
        raise ConfigError("name at least one model: --exp-dir DIR or --config YAML")
    for name in ("num_chunks", "threads"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.manifest is not None and not arguments.manifest.is_file():
        raise FileNotFoundError(f"--manifest {arguments.manifest} not found")
    return arguments


def speech(manifest: Path, config: Config) -> Tensor:
    """(T, F) features of the manifest's first utterances, one after the other, two minutes at most."""
    parts, num_frames = [], 0
    for batch in decode_batches(manifest, config, max_seconds=30.0):
        for features, length in zip(batch.features, batch.feature_lens.tolist(), strict=True):
            parts.append(features[:length])
            num_frames += length
        if num_frames >= 4 * _NOISE_FRAMES:
            break
    if not parts:
        raise ValueError(f"{manifest} holds no utterance that can be decoded")
    return torch.cat(parts)


def noise(config: Config, mean: Tensor, scale: Tensor) -> Tensor:
    """(T, F) frames with the training data's mean and spread."""
    generator = torch.Generator().manual_seed(config.seed)
    return mean + torch.randn(_NOISE_FRAMES, config.features.num_mel_bins, generator=generator) / scale


def load_models(arguments: argparse.Namespace) -> list[tuple[TimedModel, Config, dict[str, Any]]]:
    """Each model with its config and what `describe_model` says; one manifest's features serve all of equal config."""
    loaded = []
    for directory in arguments.exp_dir:
        model, config, tokenizer = load_model(directory)
        features = (
            noise(config, model.encoder.feature_mean, model.encoder.feature_scale)
            if arguments.manifest is None else speech(arguments.manifest, config)
        )
        timed = TimedModel(directory.resolve().name, model, features, tokenizer.unk_id)
        loaded.append((timed, config, describe_model(model, directory, config)))
    for items in arguments.config:
        files, overrides = [item for item in items if "=" not in item], [item for item in items if "=" in item]
        config = load_config(files, overrides)
        torch.manual_seed(config.seed)
        model = build_model(config, config.tokens.vocab_size).eval()
        features = noise(config, model.encoder.feature_mean, model.encoder.feature_scale)
        timed = TimedModel(Path(files[-1]).stem if files else "defaults", model, features, paced=True)
        loaded.append((timed, config, describe_model(model, None, config)))
    return loaded


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    DecodingOptions(chunk_ms=arguments.chunk_ms, left_context_ms=arguments.left_context_ms or arguments.chunk_ms)
    loaded = load_models(arguments)
    left_context_ms = arguments.left_context_ms
    if left_context_ms is None:
        left_context_ms = max(default_left_context_ms(config, arguments.chunk_ms) for _, config, _ in loaded)
    time_chunks([timed for timed, _, _ in loaded], arguments.num_chunks, arguments.chunk_ms, left_context_ms)
    rows = []
    for index, (timed, _, about) in enumerate(loaded):
        trained = index < len(arguments.exp_dir)
        source = arguments.manifest.name if trained and arguments.manifest is not None else "noise"
        row = summarise(timed, arguments.chunk_ms, left_context_ms) | about | {
            "features": source, "weights": "trained" if trained else "random", "threads": arguments.threads,
            "commit": git_commit(), "command": command_line(), "machine": machine(),
        }
        rows.append(row)
        if trained:
            path = arguments.exp_dir[index] / "latency.json"
            path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per model on stdout; the last column is p50 as a share of the first model's."""
    header = f"{'model':<20}{'params M':>9}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'RTF':>8}"
    print(header + f"{'symbols/s':>11}{'p50 ratio':>11}")
    for row in rows:
        ratio = row["chunk_compute_ms_p50"] / rows[0]["chunk_compute_ms_p50"]
        print(
            f"{row['model']:<20}{row['num_params'] / 1e6:>9.2f}{row['chunk_compute_ms_p50']:>9.2f}"
            f"{row['chunk_compute_ms_p95']:>9.2f}{row['chunk_compute_ms_p99']:>9.2f}{row['rtf']:>8.4f}"
            f"{row['symbols_per_second']:>11.1f}{ratio:>11.3f}"
        )
    logging.info("%d chunks of %d ms per model, in turns", rows[0]["num_chunks"], rows[0]["chunk_ms"])


if __name__ == "__main__":
    run_program(main)
