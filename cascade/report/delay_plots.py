"""Plot of the delays of a word and of the final text, mode by mode, model beside model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cascade.search.methods import STREAMING_MODES

_PARTS = (("emission", "the model says the word"), ("wait", "its chunk or block is complete"), ("compute", "computed"))
_ALPHAS = {"emission": 1.0, "wait": 0.45, "compute": 1.0}
_COMPUTE_COLOUR = "#222222"
_NAMES = {"streaming": "streaming", "look_ahead": "look-ahead", "two_pass": "two-pass", "full": "full"}
_LINES = {"streaming": "-", "look_ahead": "--", "two_pass": ":"}


def draw_delays(latency: Mapping[str, dict[str, Any]], colours: Mapping[str, str], labels: Mapping[str, str], pyplot):
    """Three panels: delay of words in parts, their distribution, delay of the final text; None without delays.

    Args:
      latency: per model what latency.json says; colours, labels: of the models.
      pyplot: matplotlib's.
    """
    models = {name: row["delays"] for name, row in latency.items() if row.get("delays")}
    if not models:
        return None
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.6), layout="constrained", width_ratios=(1.15, 1, 1.15))
    shown_early = [mode for mode in STREAMING_MODES if mode != "full"]  # the full pass shows nothing before the end
    _bars(axes[0], models, shown_early, colours, _word_parts, "word_delay_ms_p90")
    axes[0].set(title="A correct word, after its end", xlabel="ms: mean / 90th percentile (tick)")
    _distribution(axes[1], models, colours, pyplot)
    _bars(axes[2], models, STREAMING_MODES, colours, _final_parts, "final_delay_ms_p90")
    axes[2].set(title="The final text, after the last word's end", xlabel="ms: mean / 90th percentile (tick)")
    any_colour = "#777777"
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours.get(name, any_colour)) for name in models]
    names = [labels.get(name, name) for name in models]
    for key, text in _PARTS:
        colour = _COMPUTE_COLOUR if key == "compute" else any_colour
        handles.append(pyplot.Rectangle((0, 0), 1, 1, color=colour, alpha=_ALPHAS[key]))
        names.append(f"until {text}" if key != "compute" else "until it is computed")
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    references = {delays["reference"] for delays in models.values()}
    delays = next(iter(models.values()))
    truth = "true ends of words" if references == {"true"} else f"ends of words: {', '.join(sorted(references))}"
    silence = delays["silence_at_end_ms_mean"]
    figure.suptitle(
        f"{delays['num_utterances']} utterances, {truth}; recordings go on for {silence:.0f} ms after the last word",
        fontsize=10, color="#555555", x=0.01, ha="left",
    )
    return figure


def _word_parts(delays: dict[str, Any]) -> tuple[float, float, float] | None:
    if delays["word_delay_ms_mean"] is None:
        return None
    compute = delays.get("step_compute_ms_p50") or delays.get("final_compute_ms_p50") or 0.0
    return delays["emission_delay_ms_mean"], delays["word_delay_ms_mean"], compute


def _final_parts(delays: dict[str, Any]) -> tuple[float, float, float] | None:
    """Delay in one part: the last token's own delay is not that of every pass's final text."""
    if delays["final_delay_ms_mean"] is None:
        return None
    return 0.0, delays["final_delay_ms_mean"], delays.get("final_compute_ms_p50") or 0.0


def _bars(
    axis, models: Mapping[str, dict[str, Any]], modes: Sequence[str], colours: Mapping[str, str], parts_of, p90: str
) -> None:  # fmt: skip
    """A bar per mode and model, in the parts emission, wait and compute."""
    height = 0.8 / len(models)
    right, drawn = 0.0, False
    for number, (name, measured) in enumerate(models.items()):
        colour = colours.get(name, "#777777")
        for row, mode in enumerate(modes):
            delays = measured["modes"][mode]
            parts = parts_of(delays)
            if parts is None:
                continue
            said, shown, compute = parts
            drawn = True
            y = row + (number - (len(models) - 1) / 2) * height
            size = 0.9 * height
            axis.barh(y, said, size, color=colour, alpha=_ALPHAS["emission"], linewidth=0)
            begin = max(said, 0.0)
            axis.barh(y, shown - begin, size, left=begin, color=colour, alpha=_ALPHAS["wait"], linewidth=0)
            axis.barh(y, compute, size, left=shown, color=_COMPUTE_COLOUR, linewidth=0)
            tick = delays[p90] + compute
            axis.plot([tick, tick], [y - size / 2, y + size / 2], color=colour, linewidth=2)
            total = shown + compute
            right = max(right, tick, total)
            axis.annotate(
                f"{total:.0f} / {tick:.0f}", (max(total, tick), y), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8, color="#333333",
            )
    axis.set_yticks(range(len(modes)), [_NAMES[mode] for mode in modes])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.axvline(0, color="#666666", linewidth=0.8)
    if right > 0:
        axis.set_xlim(right=1.25 * right)
    if not drawn:
        axis.text(0.5, 0.5, "no correct word", transform=axis.transAxes, ha="center", color="#555555")


def _distribution(axis, models: Mapping[str, dict[str, Any]], colours: Mapping[str, str], pyplot) -> None:
    """Share of correct words on the screen by a time after their end; the last few of 100 may lie far to the right."""
    right, left = 0.0, 0.0
    for name, delays in models.items():
        for mode, line in _LINES.items():
            values = delays["modes"][mode]["word_delay_ms_quantiles"]
            if values:
                shares = np.linspace(0, 100, len(values))
                left, right = min(left, values[1]), max(right, values[-2])  # 5th and 95th percentile
                axis.plot(values, shares, line, color=colours.get(name, "#777777"), linewidth=1.6)
    axis.axvline(0, color="#666666", linewidth=0.8)
    axis.set(
        title="Correct words on the screen", xlabel="ms after the word's end", ylabel="% of words", ylim=(0, 100),
        xlim=(min(-100.0, 1.3 * left), 1.3 * max(right, 100.0)),
    )
    keys = [pyplot.Line2D([], [], color="#444444", linestyle=line) for line in _LINES.values()]
    axis.legend(keys, [_NAMES[mode] for mode in _LINES], loc="lower right")
