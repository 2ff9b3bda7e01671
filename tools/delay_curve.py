"""Word error rate against emission delay: fine-tune one model with several delay penalties and measure each.

Every penalty starts from the averaged weights in --start and trains the same number of epochs with the same data order
and seed, so that the rows differ in the penalty alone; `start` is the model as it was. All are decoded with one blank
penalty: the one in force of --start, unless --blank-penalty says another. The delay of a correct word is
the end of the frame that said it minus the word's true end: from the manifest's own alignments, or from --reference
(one model's full pass aligns the references, the same times for every row). Writes OUT/delay_curve.json, .md and .png;
finished trainings in OUT are kept. Example (AN4):

    python tools/delay_curve.py --start egs/an4/exp/student_alone --reference egs/an4/exp/teacher \\
        --data egs/an4/exp/fbank --tokens egs/an4/exp/tokens --manifest egs/an4/exp/fbank/dev_cuts.jsonl.gz \\
        --out egs/an4/exp/delay_curve training.num_epochs=2
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.device_arguments import add_device_argument, open_device  # noqa: E402
from cascade.bin.latency import read_speech  # noqa: E402
from cascade.bin.model_arguments import add_blank_penalty  # noqa: E402
from cascade.checkpoint import load_model  # noqa: E402
from cascade.config.load import save_config  # noqa: E402
from cascade.data.alignments import read_alignments, read_ctm  # noqa: E402
from cascade.measure.compute import Spoken  # noqa: E402
from cascade.measure.delay import measure_delays, usable_words, watch_streams  # noqa: E402
from cascade.measure.wer import score  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.search.methods import DEFAULT_CHUNK_MS, DecodingOptions, default_left_context_ms  # noqa: E402

_FINE_TUNING = (
    "training.num_epochs=2", "training.average_last=1", "training.learning_rate=5e-4",
    "training.muon_learning_rate=4e-3", "training.warmup_steps=20",
    "loss.warmup_steps=0",  # the penalty begins after the warm-up of the losses, here at once
    "data.sorted_epochs=0", "distillation=null",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, metavar="DIR", help="the trained model to start from")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="features to train on")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR")
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="what is measured: a dev set")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a model that says when words end")
    parser.add_argument("--penalties", type=float, nargs="+", default=[0.0, 0.003, 0.01, 0.03], metavar="P")
    add_blank_penalty(parser)
    parser.add_argument("--num-utterances", type=int, default=1000, metavar="N", help="measured (default 1000)")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    add_device_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the fine-tuning")
    return parser.parse_intermixed_args()


def call(program: str, *arguments: str | Path) -> None:
    """Run one program of the package; its failure is ours."""
    words = [sys.executable, "-m", f"cascade.bin.{program}", *map(str, arguments)]
    logging.info("%s", " ".join(words))
    subprocess.run(words, check=True)


def fine_tune(arguments: argparse.Namespace, penalty: float) -> Path:
    """The model trained on with this penalty; one that is there already is kept."""
    directory = arguments.out / f"penalty-{penalty:g}"
    if not (directory / "averaged.pt").is_file():
        call(
            "train", "--data", arguments.data, "--tokens", arguments.tokens, "--exp-dir", directory, "--init-from",
            arguments.start, "--threads", str(arguments.threads), "--device", arguments.device,
            "--config", arguments.out / "start.yaml",
            *_FINE_TUNING, *arguments.overrides, f"loss.delay_penalty={penalty:g}",
        )  # fmt: skip
    return directory


def measure(
    directory: Path, ends: dict[str, list[Any]], arguments: argparse.Namespace, device: torch.device,
    blank_penalty: float,
) -> dict[str, Any]:
    """WER of the streaming and the full pass, and the streaming pass's delays, over utterances with an alignment."""
    model, config, tokenizer = load_model(directory)
    model.to(device)
    speech: Sequence[Spoken] = read_speech(arguments.manifest, config, arguments.num_utterances)
    true_ends = {one.id: usable_words(ends[one.id], one.text, tokenizer) for one in speech if one.id in ends}
    speech = [one for one in speech if true_ends.get(one.id)]
    if not speech:
        raise ValueError(f"no utterance of {arguments.manifest} has an alignment: give --reference DIR")
    row: dict[str, Any] = {"model": directory.name, "num_utterances": len(speech), "blank_penalty": blank_penalty}
    left = default_left_context_ms(config, DEFAULT_CHUNK_MS)
    for mode in ("streaming", "full"):
        options = DecodingOptions(mode=mode, left_context_ms=left, blank_penalty=blank_penalty)
        watched = watch_streams(model, tokenizer, options, [one.features for one in speech])
        texts = [" ".join(word.word for word in item.words) for item in watched]
        scored = score((one.id, " ".join(one.text), text) for one, text in zip(speech, texts, strict=True))
        row[f"wer_{mode}"] = round(scored.words.percent, 2)
        if mode == "streaming":
            last_frames = [item.last_frame for item in watched]
            delays = measure_delays(
                watched, [one.text for one in speech], [true_ends[one.id] for one in speech], options, last_frames
            )
            row |= {key: value for key, value in delays.row().items() if not key.endswith("quantiles")}
            row |= {"num_words": scored.words.reference, "chunk_ms": options.chunk_ms}
    return row


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One point per penalty: mean emission delay across, word error rates up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    delays = [row["emission_delay_ms_mean"] for row in rows]
    for mode, marker in (("streaming", "o"), ("full", "s")):
        axes.plot(delays, [row[f"wer_{mode}"] for row in rows], marker=marker, label=f"{mode} pass")
    for row in rows:
        place = (row["emission_delay_ms_mean"], row["wer_streaming"])
        axes.annotate(f"{row['delay_penalty']:g}", place, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="mean emission delay of the streaming pass, ms", ylabel="word error rate, %")
    axes.set_title("Delay penalty (numbers at the points)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        f"Blank penalty {rows[0]['blank_penalty']:g}, greedy search.", "",
        "| delay_penalty | WER streaming | WER full | emission delay mean | p50 | p90 | word delay | correct words |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = "(start)" if row["delay_penalty"] is None else f"{row['delay_penalty']:g}"
        cells = (f"{row[f'emission_delay_ms_{key}']:.0f} ms" for key in ("mean", "p50", "p90"))
        lines.append(
            f"| {name} | {row['wer_streaming']:.2f} % | {row['wer_full']:.2f} % | {' | '.join(cells)} "
            f"| {row['word_delay_ms_mean']:.0f} ms | {row['num_correct_words']} / {row['num_words']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parse_arguments()
    device = open_device(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = load_model(arguments.start)[1]
    save_config(config, arguments.out / "start.yaml")  # with the decoding section in force, which --start may override
    blank_penalty = DecodingOptions.for_model(config, blank_penalty=arguments.blank_penalty).blank_penalty
    if arguments.reference is None:
        ends = read_alignments(arguments.manifest)
    else:
        call("align", "--exp-dir", arguments.reference, "--manifest", arguments.manifest, "--out",
             arguments.out / "align", "--threads", str(arguments.threads), "--device", arguments.device)  # fmt: skip
        ends = read_ctm(arguments.out / "align" / "alignment.ctm")
    about = {
        "reference": "true" if arguments.reference is None else str(arguments.reference), "threads": arguments.threads,
        "device": device.type, "commit": git_commit(), "command": command_line(), "machine": machine(device),
    }
    rows = [measure(arguments.start, ends, arguments, device, blank_penalty) | {"delay_penalty": None} | about]
    for penalty in arguments.penalties:
        row = measure(fine_tune(arguments, penalty), ends, arguments, device, blank_penalty)
        rows.append(row | {"delay_penalty": penalty} | about)
        (arguments.out / "delay_curve.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        (arguments.out / "delay_curve.md").write_text(table(rows), encoding="utf-8")
    draw(rows[1:], arguments.out / "delay_curve.png")
    print(table(rows), end="")


if __name__ == "__main__":
    run_program(main)
