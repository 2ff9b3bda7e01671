"""A corpus at a glance: lengths, speaking rates, characters, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cascade.corpus.statistics import SplitStatistics, show_character
from cascade.files import replacing
from cascade.report.plots import STYLE, pyplot_without_window

_COLOURS = {"train": "#1b4f8c", "dev": "#8a8a8a", "test": "#d9661f"}
_OTHERS = ("#3c8d5a", "#8e5ea2", "#c0392b", "#16a0a0")
_MAX_CHARACTERS = 60


def draw_statistics(splits: Sequence[SplitStatistics], path: str | Path) -> None:
    """Write the PNG of a corpus.

    Raises:
      ImportError: matplotlib is not installed.
    """
    pyplot = pyplot_without_window()
    splits = [split for split in splits if split.ids]
    others = iter(_OTHERS * len(splits))
    colours = {split.split: _COLOURS.get(split.split) or next(others) for split in splits}
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplot_mosaic(
            [["length", "rate"], ["characters", "characters"]], figsize=(10, 7), layout="constrained"
        )
        for split in splits:
            people = f", {len(split.speakers):,} speakers" if split.speakers else ""
            label = f"{split.split}: {split.seconds.sum() / 3600:,.2f} h, {len(split.ids):,} utterances{people}"
            axes["length"].plot([], [], color=colours[split.split], linewidth=6, label=label)
        _histogram(axes["length"], splits, colours, [split.seconds for split in splits])
        axes["length"].set(title="Length of the utterances", xlabel="seconds")
        _histogram(axes["rate"], splits, colours, [split.words_per_second for split in splits])
        axes["rate"].set(title="Speaking rate", xlabel="words per second, pauses included")
        axes["length"].set_ylabel("share of the split's utterances, %")
        _characters(axes["characters"], next((split for split in splits if split.split == "train"), splits[0]), pyplot)
        handles, labels = axes["length"].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2 if len(splits) > 3 else 1)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
        pyplot.close(figure)


def _histogram(axis, splits: Sequence[SplitStatistics], colours: dict[str, str], values: list[np.ndarray]) -> None:
    """Shares in equal bins up to the 99.5th percentile of all; what lies beyond is in the last bin."""
    everything = np.concatenate(values)
    top = float(np.percentile(everything, 99.5))
    top = top if top > 0 else 1.0
    # As many bins as the smallest split can fill without mere noise.
    num_bins = int(np.clip(1.5 * min(map(len, values)) ** 0.5, 10, 40))
    edges = np.linspace(0, top, num_bins + 1)
    for split, numbers in zip(splits, values, strict=True):
        counts, _ = np.histogram(np.minimum(numbers, top), edges)
        share = 100 * counts / len(numbers)
        axis.stairs(share, edges, color=colours[split.split], linewidth=1.8)
        if split is splits[0]:
            axis.stairs(share, edges, color=colours[split.split], alpha=0.15, fill=True)
    axis.set_xlim(0, top)
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    if everything.max() > 1.001 * top:
        axis.annotate(
            f"last bin: up to {everything.max():.1f}", (1, 1), xycoords="axes fraction", ha="right", va="top",
            xytext=(-2, -2), textcoords="offset points", fontsize=8, color="#666666",
        )


def _characters(axis, split: SplitStatistics, pyplot) -> None:
    """Bars of the most frequent characters; one that the font lacks is shown by its code."""
    from matplotlib import font_manager, ft2font

    font = ft2font.FT2Font(font_manager.findfont(font_manager.FontProperties()))
    common = split.characters.most_common(_MAX_CHARACTERS)
    names = [show_character(character) for character, _ in common]
    names = [
        name if len(name) > 1 or font.get_char_index(ord(name)) else f"U+{ord(name):04X}" for name in names
    ]
    names = ["␣" if name == "space" else name.replace("$", r"\$") for name in names]
    places = np.arange(len(common))
    axis.bar(places, [count for _, count in common], width=0.75, color=_COLOURS["train"])
    codes = any(len(name) > 2 for name in names)
    axis.set_xticks(places, names, rotation=90 if codes else 0, fontsize=7 if codes else 9)
    axis.set(xlim=(-0.7, max(len(common), 12) - 0.3), yscale="log", ylabel="count (log scale)")
    axis.set_ylim(bottom=0.7)
    axis.grid(visible=False, axis="x")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_locator(pyplot.NullLocator())
    more = len(split.characters) - len(common)
    axis.set_title(
        f"Characters of {split.split}" + (f": the {len(common)} most frequent, {more:,} more" if more else
                                         f": {len(common)}") + ("; ␣ is the space" if "␣" in names else "")
    )
