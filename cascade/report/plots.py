"""PNG plots of an experiment: loss curves, WER against size and against latency, delays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cascade.models.transducer import MODES
from cascade.report.collect import MODELS, Experiment, Row
from cascade.report.delay_plots import draw_delays

_COLOURS = {"teacher": "#1b4f8c", "student_alone": "#8a8a8a", "student": "#d9661f"}
_LABELS = {"teacher": "teacher", "student_alone": "student alone", "student": "student (distilled)"}
_MARKERS = {"streaming": "o", "look_ahead": "s", "full": "D"}
_PASSES = {"causal": "Streaming pass", "noncausal": "Full pass"}
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.edgecolor": "#666666", "legend.frameon": False,
    "figure.dpi": 100, "savefig.dpi": 160, "savefig.bbox": "tight", "savefig.facecolor": "white",
}


def draw_plots(experiment: Experiment, out_dir: Path) -> list[tuple[str, str]]:
    """Write the plots that the experiment has data for into out_dir/plots.

    Returns:
      (caption, path relative to out_dir) of each.
    Raises:
      ImportError: matplotlib is not installed.
    """
    pyplot = pyplot_without_window()
    (out_dir / "plots").mkdir(parents=True, exist_ok=True)
    drawn = []
    jobs = (
        ("Loss", "loss.png", _draw_losses),
        ("WER against size and latency", "wer.png", _draw_wer),
        ("Delay of words and of the final text", "delay.png", _draw_experiment_delays),
    )
    with pyplot.rc_context(STYLE):
        for caption, name, draw in jobs:
            figure = draw(experiment, pyplot)
            if figure is not None:
                figure.savefig(out_dir / "plots" / name, metadata={"Software": None})
                pyplot.close(figure)
                drawn.append((caption, f"plots/{name}"))
    return drawn


def pyplot_without_window():
    """matplotlib's pyplot, for files.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots are drawn with matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_experiment_delays(experiment: Experiment, pyplot):
    latency = {name: experiment.latency[name] for name in MODELS if name in experiment.latency}
    return draw_delays(latency, _COLOURS, _LABELS, pyplot)


def _points(rows: Sequence[Row], split: str, key: str) -> tuple[list[float], list[float]]:
    chosen = [row for row in rows if row["split"] == split and key in row]
    return [row["step"] for row in chosen], [row[key] for row in chosen]


def _draw_losses(experiment: Experiment, pyplot):
    """Pruned transducer loss of both passes: training thin, dev thick."""
    from matplotlib import ticker

    losses = {name: rows for name, rows in experiment.losses.items() if rows}
    if not losses:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, _PASSES.items(), strict=True):
        for model, rows in losses.items():
            steps, values = _points(rows, "train", f"{name}_pruned")
            axis.plot(steps, values, color=_COLOURS[model], linewidth=0.8, alpha=0.35)
            steps, values = _points(rows, "dev", f"{name}_pruned")
            axis.plot(steps, values, color=_COLOURS[model], linewidth=2, label=_LABELS[model])
        axis.set(title=title, xlabel="training step", yscale="log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlim(left=0)
    axes[0].set_ylabel("pruned transducer loss per token")
    axes[1].legend(loc="upper right")
    dev = pyplot.Line2D([], [], color="#444444", linewidth=2)
    training = pyplot.Line2D([], [], color="#444444", linewidth=0.8, alpha=0.45)
    axes[0].legend([dev, training], ["dev", "training"], loc="upper right")
    return figure


def _draw_wer(experiment: Experiment, pyplot):
    """One marker per model and mode, greedy search, against parameters and, where timed, compute per chunk.

    The two students are of one size, so that their markers share an x: the open ones show the filled ones inside.
    """
    timed = bool(experiment.latency)
    figure, axes = pyplot.subplots(
        1, 1 + timed, figsize=(5 + 5 * timed, 4.2), sharey=True, layout="constrained", squeeze=False
    )
    axes = axes[0]
    panels = [("WER against size", "parameters for decoding, million", _size)]
    if timed:
        panels.append(("WER against compute", "compute per chunk of the first pass, median ms", _latency))
    tops = [0.0]
    for axis, (title, label, place) in zip(axes, panels, strict=True):
        rights = [0.0]
        for model in MODELS:
            x = place(experiment, model)
            rows = [(mode, experiment.find(model, mode, "greedy_search")) for mode in MODES]
            points = [(mode, row["wer"]) for mode, row in rows if row is not None and row["wer"] is not None]
            if x is None or not points:
                continue
            wers = [wer for _, wer in points]
            axis.plot([x] * len(wers), wers, color=_COLOURS[model], linewidth=1, alpha=0.6)
            for mode, wer in points:
                axis.plot([x], [wer], marker=_MARKERS[mode], linestyle="", zorder=3, **_marker_style(model))
            rights.append(x)
            tops += wers
        axis.set(title=title, xlabel=label, xlim=(0, 1.15 * max(rights) or 1.0))
    if len(tops) == 1:
        pyplot.close(figure)
        return None
    axes[0].set(ylabel="word error rate, %, greedy search", ylim=(0, 1.1 * max(tops) or 1.0))
    models = [
        pyplot.Line2D([], [], marker="o", linestyle="", label=_LABELS[name], **_marker_style(name))
        for name in MODELS if any(row["model"] == name for row in experiment.rows)
    ]
    modes = [
        pyplot.Line2D([], [], color="#444444", marker=_MARKERS[mode], linestyle="", label=mode.replace("_", "-"))
        for mode in MODES
    ]
    figure.legend(handles=models + modes, loc="outside lower center", ncols=len(models) + len(modes))
    return figure


def _marker_style(model: str) -> dict[str, object]:
    is_open = model == "student_alone"
    return {
        "color": _COLOURS[model], "markerfacecolor": "none" if is_open else _COLOURS[model],
        "markersize": 8 if is_open else 4.5, "markeredgewidth": 1.2 if is_open else 0,
    }


def _size(experiment: Experiment, model: str) -> float | None:
    return next((row["num_params"] / 1e6 for row in experiment.rows if row["model"] == model), None)


def _latency(experiment: Experiment, model: str) -> float | None:
    return experiment.latency.get(model, {}).get("chunk_compute_ms_p50")
