"""Word and character error rates, and a text file that shows every error in its place.

An alignment has the fewest errors (substitutions + deletions + insertions, each costs 1); among those it has the
fewest substitutions, which is what sclite's costs 4/3/3 prefer too; what is still equal is decided from the end of the
utterance: correct or substitution first, then deletion, then insertion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TextIO

import numpy as np

from cascade.text.normal import split_words

_EDIT = 1 << 24
"""Cost of one error; a substitution costs 1 more, to break ties. Longer sequences would need a larger one."""
_DIAGONAL, _DELETION, _INSERTION = 0, 1, 2
_LENGTHS = ((0, 0), (1, 2), (3, 5), (6, 10), (11, 20), (21, 40), (41, None))
"""Bounds, in reference words, of the table by utterance length."""


@dataclass(frozen=True)
class ErrorCounts:
    """Counts of an alignment. They add up over utterances."""

    reference: int = 0
    """Words (or characters) in the references."""
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def percent(self) -> float | None:
        """Errors per 100 reference words; None, undefined, when the references hold none."""
        return 100.0 * self.errors / self.reference if self.reference else None

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.reference + other.reference,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    def __str__(self) -> str:
        rate = "undefined (no reference)" if self.percent is None else f"{self.percent:.2f} %"
        return (
            f"{rate} [{self.errors} / {self.reference}: "
            f"{self.insertions} ins, {self.deletions} del, {self.substitutions} sub]"
        )


Alignment = list[tuple[str | None, str | None]]
"""Pairs (reference, hypothesis): (a, a) correct, (a, b) substitution, (a, None) deletion, (None, b) insertion."""


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> Alignment:
    """The alignment with the fewest errors; see the module's text for ties. Either side may be empty."""
    moves = _moves(reference, hypothesis)
    i, j, pairs = len(reference), len(hypothesis), []
    while i or j:
        move = moves[i, j]
        i -= move != _INSERTION
        j -= move != _DELETION
        pairs.append((None if move == _INSERTION else reference[i], None if move == _DELETION else hypothesis[j]))
    return pairs[::-1]


def count_errors(alignment: Alignment) -> ErrorCounts:
    """Counts of an alignment."""
    insertions = sum(reference is None for reference, _ in alignment)
    deletions = sum(hypothesis is None for _, hypothesis in alignment)
    different = sum(reference != hypothesis for reference, hypothesis in alignment)
    return ErrorCounts(len(alignment) - insertions, different - insertions - deletions, deletions, insertions)


def characters(text: str) -> list[str]:
    """Units of the character error rate: all characters, one space between two words included."""
    return list(" ".join(text.split()))


def _moves(reference: Sequence[str], hypothesis: Sequence[str]) -> np.ndarray:
    """(I + 1, J + 1) uint8: the last step of the best alignment of the first i and the first j items.

    One numpy pass per reference item: cost[i, j] = min(diagonal, deletion) first, then insertions as a running minimum
    of cost[i, j] - j * insertion.
    """
    ids: dict[str, int] = {}
    ref = [ids.setdefault(word, len(ids)) for word in reference]
    hyp = np.array([ids.setdefault(word, len(ids)) for word in hypothesis], dtype=np.int64)
    ramp = np.arange(len(hyp) + 1, dtype=np.int64) * _EDIT
    moves = np.full((len(ref) + 1, len(hyp) + 1), _INSERTION, dtype=np.uint8)
    moves[:, 0] = _DELETION
    cost = ramp
    for i, word in enumerate(ref, start=1):
        best = cost + _EDIT
        diagonal = cost[:-1] + np.where(hyp == word, 0, _EDIT + 1)
        by_diagonal = diagonal <= best[1:]
        best[1:] = np.where(by_diagonal, diagonal, best[1:])
        cost = np.minimum.accumulate(best - ramp) + ramp
        moves[i, 1:] = np.where(cost[1:] < best[1:], _INSERTION, np.where(by_diagonal, _DIAGONAL, _DELETION))
    return moves


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance's word alignment and its character errors."""

    id: str
    alignment: Alignment
    words: ErrorCounts
    characters: ErrorCounts


@dataclass(frozen=True)
class Score:
    """A test set's totals and its utterances."""

    utterances: tuple[ScoredUtterance, ...]
    words: ErrorCounts
    characters: ErrorCounts

    def by_length(self) -> list[tuple[str, int, ErrorCounts]]:
        """(reference words, utterances, errors) for every length class that occurs."""
        rows = []
        for low, high in _LENGTHS:
            inside = [
                utterance.words for utterance in self.utterances
                if low <= utterance.words.reference and (high is None or utterance.words.reference <= high)
            ]
            label = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
            if inside:
                rows.append((label, len(inside), sum(inside, ErrorCounts())))
        return rows


def score(utterances: Iterable[tuple[str, str, str]]) -> Score:
    """Score (id, reference, hypothesis) texts, as they are; `text.normal.split_words` says what a word is."""
    scored = []
    for name, reference, hypothesis in utterances:
        alignment = align(split_words(reference), split_words(hypothesis))
        letters = count_errors(align(characters(reference), characters(hypothesis)))
        scored.append(ScoredUtterance(name, alignment, count_errors(alignment), letters))
    return Score(
        tuple(scored),
        sum((utterance.words for utterance in scored), ErrorCounts()),
        sum((utterance.characters for utterance in scored), ErrorCounts()),
    )


def oracle(utterances: Iterable[tuple[str, str, Sequence[str]]]) -> ErrorCounts:
    """Word errors if, of each utterance (id, reference, hypotheses), the hypothesis with the fewest were chosen."""
    total = ErrorCounts()
    for _, reference, hypotheses in utterances:
        words = split_words(reference)
        counts = (count_errors(align(words, split_words(hypothesis))) for hypothesis in hypotheses)
        total += min(counts, key=attrgetter("errors"))
    return total


def write_score(result: Score, file: TextIO, notes: Sequence[str] = ()) -> None:
    """Write wer.txt: totals, `notes`, the table by length, then every utterance, those with errors first."""
    file.write(f"WER {result.words}\nCER {result.characters}\n")
    wrong = sum(utterance.words.errors > 0 for utterance in result.utterances)
    file.write(f"Utterances: {len(result.utterances)}, {wrong} with errors\n")
    file.writelines(f"{note}\n" for note in notes)
    file.write("\nBy reference words\n")
    for label, count, errors in result.by_length():
        file.write(f"  {label:>6}  {count:>6} utterances  WER {errors}\n")
    file.write("\nAlignments (S substitution, D deletion, I insertion), most errors first\n")
    for utterance in sorted(result.utterances, key=lambda utterance: (-utterance.words.errors, utterance.id)):
        file.write("\n" + format_alignment(utterance))


def format_alignment(utterance: ScoredUtterance) -> str:
    """Reference, hypothesis and the kind of each error, one below the other in columns."""
    counts = utterance.words
    title = f"{counts.errors} errors in {counts.reference} words" if counts.errors else "correct"
    lines = ["  ref", "  hyp", "     "]
    for reference, hypothesis in utterance.alignment:
        kind = "I" if reference is None else "D" if hypothesis is None else "" if reference == hypothesis else "S"
        cells = [reference or "*" * len(hypothesis or ""), hypothesis or "*" * len(reference or ""), kind]
        width = max(map(len, cells))
        lines = [f"{line}  {cell:<{width}}" for line, cell in zip(lines, cells, strict=True)]
    if not counts.errors:
        lines = lines[:1]
    return "\n".join([f"{utterance.id}: {title}", *(line.rstrip() for line in lines if line.strip())]) + "\n"
