"""Export a model for sherpa-onnx, and check that the files compute what PyTorch computes.

--out gets encoder-streaming.onnx and encoder-noncausal.onnx, which reads the other's output: what our own runtime
(`transcribe --onnx-dir`) runs. sherpa-onnx runs encoder-streaming.onnx and encoder-look-ahead.onnx as online
recognisers, encoder-full.onnx as an offline one; the latter two hold both encoders. All share decoder.onnx, joiner.onnx
and tokens.txt; bpe.vocab, if the tokens are BPE, is for hotwords, the tokenizer's other files are for our runtime.
README.md has the commands of sherpa-onnx and what is known of the model; export.json the options, bytes per file, the
differences measured. A model with an LSTM predictor gets the files of our own runtime only. An earlier export in the
folder is replaced, the files that its export.json names; a folder that holds other files of these names is refused.

Chunk, block and left context are constants of the files; the model's blank penalty, or --blank-penalty, is taken off
the blank's bias in joiner.onnx, because sherpa-onnx knows nothing of it (its own option would be taken off once more).
Language models and hotwords of the model's decoding section are copied, for our own runtime.

--int8 adds NAME.int8.onnx beside every file but the predictor's: encoders of a quarter of the size, faster where the
processor has VNNI. With --manifest its word errors are counted against float32, file by file; a file that loses more
than --int8-limit has no int8 copy, and export.json, README.md and the log say so.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import add_model_arguments, check_values, load_for_decoding
from cascade.config.options import DECODING_FILES, Config, ConfigError, DecodingConfig
from cascade.corpus.cuts import read_speech
from cascade.export.card import FILES, describe_export
from cascade.export.int8 import quantise_files, weight_bits
from cascade.export.int8_loss import LIMIT_PERCENT, LossMeter, measure_loss
from cascade.export.onnx import DECODER, FULL, JOINER, OPSET, STREAMING, TOKEN_FILES, build_graphs, write_files
from cascade.export.onnx_engine import ABOUT
from cascade.export.parity import graph_differences
from cascade.export.sessions import int8_name
from cascade.export.sherpa import compare_with_sherpa, synthetic_recordings
from cascade.export.wrappers import Geometry
from cascade.models.transducer import CascadedTransducer
from cascade.provenance import command_line, git_commit, machine
from cascade.search.methods import DecodingOptions
from cascade.text.tokens import Tokenizer

NUM_RECORDINGS = 4
_SYNTHETIC_SECONDS = (2.3, 0.9, 3.1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, cpu_only=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--manifest", type=Path, metavar="FILE",
        help=f"CUTS.jsonl.gz or MANIFEST.jsonl: sherpa-onnx is checked on its first {NUM_RECORDINGS} recordings "
        "(default: tones), --int8 on all",
    )
    parser.add_argument("--int8", action="store_true", help="also write files that compute in 8 bits")
    parser.add_argument(
        "--int8-limit", type=float, default=LIMIT_PERCENT, metavar="PERCENT",
        help=f"relative loss of WER above which a file stays float32 (default {LIMIT_PERCENT:g})",
    )
    parser.add_argument("--no-check", action="store_true", help="write the files without comparing them to PyTorch")
    parser.add_argument(
        "--license", metavar="TEXT", help="of the weights, for the card in README.md (default: what prepare.py wrote)"
    )
    arguments = parser.parse_args()
    check_values(arguments, epoch=1, avg=1)
    if not arguments.int8_limit >= 0:
        raise ConfigError(f"--int8-limit must not be negative, got {arguments.int8_limit}")
    return arguments


def read_recordings(manifest: Path | None, config: Config) -> dict[str, np.ndarray]:
    """Name -> samples of a manifest's first recordings, or synthetic ones. Raises: as `read_speech`."""
    rate = config.features.sampling_rate
    if manifest is None:
        return synthetic_recordings(_SYNTHETIC_SECONDS, rate, config.seed)
    return {utterance.id: utterance.samples for utterance in read_speech(manifest, rate, NUM_RECORDINGS)}


def check_files(
    folder: Path, model: CascadedTransducer, config: Config, tokenizer: Tokenizer, geometry: Geometry,
    recordings: dict[str, np.ndarray], blank_penalty: float,
) -> dict[str, Any]:  # fmt: skip
    """The results of the checks for export.json; raises ValueError when a file is wrong."""
    differences = graph_differences(folder, model, geometry, blank_penalty)
    checks: dict[str, Any] = {"max_difference": differences, "sherpa_onnx": None}
    if not (folder / FULL).is_file():
        logging.warning("sherpa-onnx has no LSTM predictor: these files run in our own runtime (--onnx-dir) only")
        return checks
    report = compare_with_sherpa(folder, model, config.features, tokenizer, geometry, recordings, blank_penalty)
    if report is None:
        logging.warning("sherpa-onnx is not installed, it was not compared: pip install sherpa-onnx")
        return checks
    for name, counts in report.num_tokens.items():
        said = ", ".join(f"{count} by {method}" for method, count in counts.items())
        logging.info(
            "%-24s sherpa-onnx %s finds our tokens (%s) at our times in %d recordings", name, report.version, said,
            report.num_recordings,
        )
    checks["sherpa_onnx"] = {
        "version": report.version, "num_recordings": report.num_recordings, "num_tokens": report.num_tokens,
    }
    return checks


def write_int8(
    folder: Path, model: CascadedTransducer, config: Config, tokenizer: Tokenizer, geometry: Geometry,
    blank_penalty: float, arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """int8 copies of the folder's files, but of those that lose words; what export.json says of them."""
    bits = weight_bits()
    if bits == 7:
        logging.warning("no VNNI in this processor: weights of the int8 files have 7 bits, so that no sum overflows")
    names = quantise_files(folder, model, bits)
    metadata: dict[str, Any] = {"weight_bits": bits, "float32": {}, "rows": []}
    if arguments.manifest is None or arguments.no_check:
        logging.warning("what int8 costs was not measured: give --manifest with a test set, without --no-check")
    else:
        meter = LossMeter(folder, names, model, tokenizer, geometry, blank_penalty)
        metadata |= measure_loss(meter, arguments.manifest, config, arguments.int8_limit)
    for name, reason in metadata["float32"].items():
        logging.warning("%s STAYS float32: %s", name, reason)
        (folder / int8_name(name)).unlink()
    return metadata | {"files": {name: int8_name(name) for name in names if name not in metadata["float32"]}}


def copy_scores(options: DecodingOptions, folder: Path) -> dict[str, Any]:
    """Copy the model's language models and hotwords into the folder; what export.json says of the decoding section."""
    names = [field.name for field in fields(DecodingConfig)]
    of_files = (*DECODING_FILES, "lm_scale", "lodr_scale")
    section: dict[str, Any] = {name: getattr(options, name) for name in names if name not in of_files}
    for name, scale in (("ngram", "lm_scale"), ("lodr", "lodr_scale"), ("hotwords", "hotword_scale")):
        if getattr(options, name) and getattr(options, scale):
            path = Path(getattr(options, name))
            copied = f"{name}.txt" if name == "hotwords" else name + "".join(path.suffixes)
            shutil.copyfile(path, folder / copied)
            section |= {name: copied, scale: getattr(options, scale)}
    return section


def log_sizes(sizes: dict[str, int], tied_bytes: int) -> None:
    for name, size in sizes.items():
        logging.info("%-24s %11d bytes", name, size)
    if tied_bytes:
        logging.info(
            "%s and %s both hold the tied matrix of %d bytes: two files cannot share it", DECODER, JOINER, tied_bytes
        )


def main() -> None:
    arguments = parse_arguments()
    earlier = earlier_export(arguments.out, arguments.exp_dir)
    model, config, tokenizer, options = load_for_decoding(
        arguments, "look_ahead", why_cpu="graphs are traced and compared in onnxruntime on the CPU"
    )
    times = {
        "chunk_ms": options.chunk_ms, "look_ahead_ms": options.look_ahead_ms,
        "left_context_ms": options.left_context_ms,
    }
    geometry, penalty = Geometry.from_ms(**times), options.blank_penalty
    recordings = {} if arguments.no_check else read_recordings(arguments.manifest, config)
    graphs = build_graphs(model, geometry, penalty)
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Nothing appears under its name before all of it is written and checked; export.json comes last.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=arguments.out) as temporary:
        folder = Path(temporary)
        write_files(graphs, arguments.exp_dir / "tokens", folder, {**times, "model": arguments.exp_dir.resolve().name})
        checks: dict[str, Any] = {}
        if not arguments.no_check:
            checks = check_files(folder, model, config, tokenizer, geometry, recordings, penalty)
        if arguments.int8:
            checks["int8"] = write_int8(folder, model, config, tokenizer, geometry, penalty, arguments)
        decoding = copy_scores(options, folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        metadata = describe(arguments, model, config, tokenizer, times, decoding, sizes, checks)
        card = describe_export(metadata, arguments.exp_dir, config, arguments.license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / ABOUT).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        for name in earlier:
            (arguments.out / name).unlink(missing_ok=True)
        for name in (*sizes, "README.md", ABOUT):
            (folder / name).replace(arguments.out / name)
    log_sizes(sizes, metadata["bytes_stored_twice"])


def earlier_export(out: Path, exp_dir: Path) -> list[str]:
    """Names of what an earlier export wrote into the folder, export.json first.

    Raises:
      ConfigError: the folder is the model's own, or holds other files that an export would overwrite.
    """
    if out.resolve() == exp_dir.resolve():
        raise ConfigError(f"--out {out} is the model directory itself: name another folder")
    about, names = out / ABOUT, ("README.md", *FILES, *TOKEN_FILES)
    if about.is_file():
        try:
            return [ABOUT, "README.md", *(Path(name).name for name in json.loads(about.read_bytes())["bytes"])]
        except (ValueError, KeyError, TypeError):  # damaged
            return [ABOUT, *names]
    there = [name for name in names if (out / name).exists()]
    if there and STREAMING not in there:  # which an interrupted export leaves
        raise ConfigError(f"--out {out} holds {there[0]}, and no {ABOUT} of an earlier export: name another folder")
    return []


def describe(
    arguments: argparse.Namespace, model: CascadedTransducer, config: Config, tokenizer: Tokenizer,
    times: dict[str, int], decoding: dict[str, Any], sizes: dict[str, int], checks: dict[str, Any],
) -> dict[str, Any]:
    """What export.json says."""
    tied = model.joiner.output_weight if config.model.predictor.kind == "tied_reduced" else torch.empty(0)
    tied_bytes = tied.numel() * tied.element_size()
    return {
        "model": arguments.exp_dir.resolve().name, **times, "decoding": decoding,
        "sampling_rate": config.features.sampling_rate,
        "num_mel_bins": config.features.num_mel_bins, "vocab_size": tokenizer.vocab_size, "opset": OPSET,
        "bytes": sizes, "total_bytes": sum(sizes.values()), "bytes_stored_twice": tied_bytes,
        "stored_twice": f"the tied matrix, in {DECODER} and {JOINER}" if tied_bytes else None,
        **checks, "commit": git_commit(), "command": command_line(), "machine": machine(),
    }


if __name__ == "__main__":
    run_program(main)
