"""Statistics of a corpus, gathered while stage 0 goes over its utterances anyway: no recording is read for it.

A few numbers are kept per utterance, so that 281 k of them take some tens of megabytes.
"""

from __future__ import annotations

import json
import textwrap
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cascade.files import replacing
from cascade.report.markdown import table
from cascade.text.normal import split_words

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
ODD_SIGMAS, ODD_FACTOR = 4.0, 2.5
"""A rate is odd that lies this many (robust) standard deviations and this factor from the median."""
RARE_COUNT = 5
_WIDTH = 110


class SplitStatistics:
    """Statistics of one split; `add` each of its usable utterances once."""

    def __init__(self, split: str, normalize: Callable[[str], str]) -> None:
        """
        Args:
          normalize: the form of the text that tokens are made of (`cascade.text.normal.normalizer`).
        """
        self.split, self.num_set_aside = split, 0
        self._normalize = normalize
        self.ids: list[str] = []
        self._seconds, self._words, self._letters = array("f"), array("l"), array("l")
        self._sentences = array("q")
        self.words: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.speakers: Counter[str] = Counter()
        """Utterances of each known speaker."""

    def add(self, utterance_id: str, seconds: float, text: str, speaker: str | None) -> None:
        text = self._normalize(text)
        words = text.split() if text.isascii() else split_words(text)
        self.ids.append(utterance_id)
        self._seconds.append(seconds)
        self._words.append(len(words))
        self._letters.append(len(text) - text.count(" "))
        self._sentences.append(hash(text))
        self.words.update(words)
        self.characters.update(text)
        if speaker is not None:
            self.speakers[speaker] += 1

    @property
    def seconds(self) -> np.ndarray:
        """(num_utterances,) durations."""
        return np.array(self._seconds, dtype=np.float64)

    @property
    def words_per_second(self) -> np.ndarray:
        """(num_utterances,)"""
        return np.array(self._words) / self.seconds

    @property
    def sentences(self) -> np.ndarray:
        """(num_utterances,) int64 hashes of the texts, comparable within this process only."""
        return np.array(self._sentences, dtype=np.int64)

    def odd_rates(self) -> list[dict[str, Any]]:
        """Utterances spoken far faster or slower than the others, the oddest first: audio and text may not match.

        Characters per second are compared, because words differ in length, and in some languages have no borders. The
        spread is the median of the distances from the median, in logarithms, which a few odd ones cannot move.
        """
        if not self.ids:
            return []
        rates = np.log(np.maximum(np.array(self._letters), 0.5) / self.seconds)
        distance = rates - np.median(rates)
        spread = 1.4826 * np.median(np.abs(distance))
        odd = np.flatnonzero(np.abs(distance) > max(ODD_SIGMAS * spread, np.log(ODD_FACTOR)))
        return [
            {
                "id": self.ids[index], "seconds": round(self._seconds[index], 2), "words": self._words[index],
                "characters_per_second": round(self._letters[index] / self._seconds[index], 2),
                "times_the_median": round(float(np.exp(distance[index])), 2),
            }
            for index in odd[np.argsort(-np.abs(distance[odd]), kind="stable")]
        ]

    def summary(self) -> dict[str, Any]:
        """Summary of the split in builtin types."""
        return {
            "utterances": len(self.ids), "set_aside": self.num_set_aside,
            "hours": round(float(self.seconds.sum()) / 3600, 4),
            "speakers": len(self.speakers), "utterances_without_speaker": len(self.ids) - self.speakers.total(),
            "words": self.words.total(), "distinct_words": len(self.words),
            "characters": self.characters.total(), "distinct_characters": len(self.characters),
            "seconds": _spread(self.seconds), "words_per_utterance": _spread(np.array(self._words)),
            "words_per_second": _spread(self.words_per_second), "odd_rates": self.odd_rates(),
            "character_counts": dict(self.characters.most_common()),
        }


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    points = {f"p{percent}": value for percent, value in
              zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
    spread = {"min": values.min(), **points, "max": values.max(), "mean": values.mean()}
    return {name: round(float(value), 3) for name, value in spread.items()}


def compare(splits: Sequence[SplitStatistics]) -> tuple[list[str], list[str]]:
    """(warnings, notes): what splits share that they should not, or lack that the others have."""
    warnings, notes = [], []
    for split, other in combinations(splits, 2):
        shared = split.speakers.keys() & other.speakers.keys()
        if shared:
            shown = ", ".join(sorted(shared)[:5]) + (", ..." if len(shared) > 5 else "")
            why = ": errors on unknown voices will be more than what is measured" if split.split == "train" else ""
            warnings.append(f"{_count(len(shared), 'speaker')} in {split.split} and in {other.split} ({shown}){why}")
    train = next((split for split in splits if split.split == "train"), None)
    for split in splits:
        if train is None or split is train or not split.ids:
            continue
        known = int(np.isin(split.sentences, train.sentences).sum())
        if known:
            notes.append(
                f"{known:,} of {_count(len(split.ids), 'utterance')} of {split.split} "
                f"({100 * known / len(split.ids):.1f} %) say what one of train says, word for word"
            )
        new = {word: count for word, count in split.words.items() if word not in train.words}
        if new:
            total = sum(new.values())
            share = 100 * total / split.words.total()
            notes.append(f"{total:,} of {split.words.total():,} words of {split.split} ({share:.1f} %) not in train")
        characters = split.characters.keys() - train.characters.keys()
        if characters:
            shown = " ".join(show_character(character) for character in sorted(characters)[:20])
            warnings.append(f"{split.split} has characters that train lacks: {shown}")
    for split in splits:
        odd = split.odd_rates()
        if odd:
            shown = ", ".join(f"{row['id']} ({row['times_the_median']:g} x)" for row in odd[:5])
            notes.append(
                f"{_count(len(odd), 'utterance')} of {split.split} with far more or less text a second than the median"
                f"; check that it is what is said: {shown}{', ...' if len(odd) > 5 else ''}"
            )
    if train is not None:
        rare = [character for character, count in train.characters.items() if count < RARE_COUNT]
        if rare:
            shown = " ".join(show_character(character) for character in sorted(rare)[:30])
            notes.append(f"{_count(len(rare), 'character')} fewer than {RARE_COUNT} times in train: {shown}")
    return warnings, notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def show_character(character: str) -> str:
    """A character as a reader can see it: its code where it is a space, a control character or a lone mark."""
    if character == " ":
        return "space"
    shown = character.isprintable() and not character.isspace() and unicodedata.category(character)[0] != "M"
    return character if shown else f"U+{ord(character):04X}"


_COUNTS = (
    ("utterances", "utterances"), ("set aside", "set_aside"), ("hours", "hours"), ("speakers", "speakers"),
    ("words", "words"), ("different words", "distinct_words"), ("characters", "characters"),
    ("different characters", "distinct_characters"),
)
_SPREADS = (("seconds per utterance", "seconds", 2), ("words per utterance", "words_per_utterance", 0),
            ("words per second", "words_per_second", 2))
_POINTS = (("least", "min"), ("1 %", "p1"), ("5 %", "p5"), ("median", "p50"), ("mean", "mean"), ("95 %", "p95"),
           ("99 %", "p99"), ("most", "max"))


def _number(value: float, digits: int) -> str:
    """Fixed digits; counts without any, unless it is a mean."""
    return f"{value:.{digits}f}" if digits else f"{value:.1f}".removesuffix(".0")


def statistics_table(splits: Sequence[SplitStatistics]) -> str:
    """Table of the splits side by side, the characters of train, then warnings and notes."""
    summaries = [split.summary() for split in splits]
    rows = [[label, *(f"{x[key]:,.2f}" if key == "hours" else f"{x[key]:,}" for x in summaries)]
            for label, key in _COUNTS]
    for title, key, digits in _SPREADS:
        for label, point in _POINTS:
            cells = (_number(x[key][point], digits) if x[key] else "-" for x in summaries)
            rows.append([f"{title}, {label}", *cells])
    lines = table(["", *(split.split for split in splits)], rows).splitlines()
    train = next((split for split in splits if split.split == "train"), splits[0])
    shown = [f"{show_character(character)}\0{count:,}" for character, count in train.characters.most_common(100)]
    more = len(train.characters) - len(shown)
    lines += ["", f"characters of {train.split}, by count"]
    lines += textwrap.wrap(
        "   ".join(shown) + (f"   and {more:,} more" if more else ""), _WIDTH, initial_indent="  ",
        subsequent_indent="  ", break_long_words=False, break_on_hyphens=False,
    )
    lines = [line.replace("\0", " ") for line in lines]  # a character and its count stay in one line
    warnings, notes = compare(splits)
    for title, texts in (("warnings", warnings), ("notes", notes)):
        if texts:
            lines += ["", title]
        for text in texts:
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ",
                                   break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def write_statistics(splits: Sequence[SplitStatistics], out: Path) -> str:
    """Write OUT/statistics.txt and OUT/statistics.json; return the text."""
    text = statistics_table(splits)
    warnings, notes = compare(splits)
    values = {"splits": {split.split: split.summary() for split in splits}, "warnings": warnings, "notes": notes}
    for name, content in (("txt", text), ("json", json.dumps(values, indent=1, ensure_ascii=False))):
        with replacing(out / f"statistics.{name}") as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
    return text
