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
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin import decode  # noqa: E402
from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.device_arguments import add_device_argument, open_device  # noqa: E402
from cascade.bin.latency import read_spoken  # noqa: E402
from cascade.bin.model_arguments import add_blank_penalty, check_values  # noqa: E402
from cascade.checkpoint import load_model  # noqa: E402
from cascade.config.load import save_config  # noqa: E402
from cascade.data.alignments import read_alignments, read_ctm  # noqa: E402
from cascade.measure.compute import ModelSource, open_model  # noqa: E402
from cascade.measure.latency import Alignments, delay_summary  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.report.markdown import number, table  # noqa: E402
from cascade.search.methods import DEFAULT_CHUNK_MS, default_left_context_ms  # noqa: E402
from tools.run_arms import call  # noqa: E402

_FINE_TUNING = (
    "training.num_epochs=2", "training.average_last=1", "training.learning_rate=5e-4",
    "training.muon_learning_rate=4e-3", "training.warmup_steps=20",
    "loss.warmup_steps=0",  # the penalty begins after the warm-up of the losses, here at once
    "data.sorted_epochs=0", "distillation=null", "augment.recombine_share=0",
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
    arguments = parser.parse_intermixed_args()
    check_values(arguments, num_utterances=1, threads=1)
    return arguments


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


def measure(directory: Path, given: Alignments, arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """WER of the streaming and the full pass, and the streaming pass's delays."""
    timed = open_model(ModelSource(str(directory), blank_penalty=arguments.blank_penalty))
    timed.speech = read_spoken(arguments.manifest, timed.config, arguments.num_utterances)
    contexts = {"left_context_ms": default_left_context_ms(timed.config, DEFAULT_CHUNK_MS)}
    delays = delay_summary(timed, given, arguments.num_utterances, arguments.source, contexts)
    if delays is None or delays["reference"] != arguments.source:
        raise ValueError(f"no utterance of {arguments.manifest} has an alignment: give --reference DIR")
    words = ["--exp-dir", directory, "--manifest", arguments.manifest, "--blank-penalty", timed.blank_penalty]
    words += ["--device", arguments.device, "--threads", arguments.threads, "--method", "greedy_search"]
    row = {"model": directory.name, "num_utterances": delays["num_utterances"], "blank_penalty": timed.blank_penalty}
    for mode in ("streaming", "full"):
        out = arguments.out / "decode" / f"{directory.name}-{mode}"
        decode.main(list(map(str, [*words, "--mode", mode, "--out", out])))
        row[f"wer_{mode}"] = json.loads((out / "result.json").read_text())["wer"]
    streaming = delays["modes"]["streaming"]
    row |= {key: value for key, value in streaming.items() if not key.endswith("quantiles")}
    return row | {"num_words": delays["num_reference_words"], "chunk_ms": DEFAULT_CHUNK_MS, **more}


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


def write_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    header = ["delay_penalty", "WER streaming", "WER full", "emission delay mean", "p50", "p90", "word delay"]
    header.append("correct words")
    keys = [*(f"emission_delay_ms_{key}" for key in ("mean", "p50", "p90")), "word_delay_ms_mean"]
    cells = [
        ["(start)" if row["delay_penalty"] is None else f"{row['delay_penalty']:g}",
         *(f"{row[f'wer_{mode}']:.2f} %" for mode in ("streaming", "full")),
         *(f"{number(row[key], 0)} ms" for key in keys),
         f"{row['num_correct_words']} / {row['num_words']}"] for row in rows
    ]  # fmt: skip
    return f"Blank penalty {rows[0]['blank_penalty']:g}, greedy search.\n\n{table(header, cells)}\n"


def main() -> None:
    arguments = parse_arguments()
    device = open_device(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    # with the decoding section in force, which --start may override
    save_config(load_model(arguments.start)[1], arguments.out / "start.yaml")
    if arguments.reference is None:
        arguments.source, given = "true", read_alignments(arguments.manifest)
    else:
        arguments.source = str(arguments.reference)
        call("align", "--exp-dir", arguments.reference, "--manifest", arguments.manifest, "--out",
             arguments.out / "align", "--threads", str(arguments.threads), "--device", arguments.device)  # fmt: skip
        given = read_ctm(arguments.out / "align" / "alignment.ctm")
    provenance = {
        "reference": arguments.source, "threads": arguments.threads, "device": device.type, "commit": git_commit(),
        "command": command_line(), "machine": machine(device),
    }
    rows = [measure(arguments.start, given, arguments, delay_penalty=None, **provenance)]
    for penalty in arguments.penalties:
        rows.append(measure(fine_tune(arguments, penalty), given, arguments, delay_penalty=penalty, **provenance))
        (arguments.out / "delay_curve.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        (arguments.out / "delay_curve.md").write_text(write_table(rows), encoding="utf-8")
    draw(rows[1:], arguments.out / "delay_curve.png")
    print(write_table(rows), end="")


if __name__ == "__main__":
    run_program(main)
