"""Paired bootstrap of the difference between two systems' word error rates on the same utterances (Bisani & Ney 2004).

Utterances, or speakers with all of their utterances, are drawn with replacement; both systems are scored on each draw.
Utterances of one speaker are alike, so that the interval over speakers is the honest one where there are many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade.measure.wer import score

_DRAWS_AT_ONCE = 500


@dataclass(frozen=True)
class Hypotheses:
    """Output of one system: errors and reference words of every utterance."""

    errors: dict[str, int]
    references: dict[str, str]
    num_words: dict[str, int]
    speakers: dict[str, str]
    """Of the utterances whose speaker is known."""


@dataclass(frozen=True)
class Interval:
    """The 95 % interval of B's error rate minus A's, in points and relative to A's in percent."""

    num_groups: int
    low: float
    high: float
    relative_low: float | None
    relative_high: float | None
    share_better: float
    """Share of the draws in which B has the lower error rate; an equal one counts half."""


@dataclass(frozen=True)
class Comparison:
    """Two systems, each of one or several runs, on the same utterances."""

    num_utterances: int
    num_words: int
    wer_a: float
    wer_b: float
    over_utterances: Interval
    over_speakers: Interval | None
    """None where a speaker is missing, or where there is only one."""

    @property
    def difference(self) -> float:
        return self.wer_b - self.wer_a

    @property
    def relative(self) -> float | None:
        return 100 * self.difference / self.wer_a if self.wer_a else None


def read_hypotheses(path: Path) -> Hypotheses:
    """Read a hyps.jsonl, with at least `id`, `ref` and `hyp` in each line, `speaker` where it is known.

    Raises:
      ValueError: a line is not such an object, or an id comes twice.
    """
    texts, speakers = {}, {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name, reference, hypothesis = (fields[key] for key in ("id", "ref", "hyp"))
            if not all(isinstance(text, str) for text in (name, reference, hypothesis)):
                raise TypeError("not a string")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: must be an object with strings "id", "ref" and "hyp"') from error
        if name in texts:
            raise ValueError(f"{path}:{number}: utterance {name} comes twice")
        texts[name] = (reference, hypothesis)
        if isinstance(fields.get("speaker"), str):
            speakers[name] = fields["speaker"]
    if not texts:
        raise ValueError(f"{path} holds no utterance")
    scored = score((name, *pair) for name, pair in texts.items()).utterances
    return Hypotheses(
        {utterance.id: utterance.words.errors for utterance in scored},
        {name: reference for name, (reference, _) in texts.items()},
        {utterance.id: utterance.words.reference for utterance in scored},
        speakers,
    )


def compare(pairs: Sequence[tuple[Hypotheses, Hypotheses]], num_draws: int = 10_000, seed: int = 0) -> Comparison:
    """Compare systems A and B; several pairs (other seeds or modes) are pooled, utterance by utterance.

    Raises:
      ValueError: the files do not hold the same utterances with the same references, or no reference word.
    """
    first = pairs[0][0]
    for hypotheses in (side for pair in pairs for side in pair):
        different = sorted(first.references.items() ^ hypotheses.references.items())
        if different:
            raise ValueError(
                f"the files must hold the same utterances with the same references: {different[0][0]} differs"
            )
    names = sorted(first.references)
    words = len(pairs) * np.array([first.num_words[name] for name in names], dtype=np.float64)
    errors_a, errors_b = (
        np.array([sum(pair[side].errors[name] for pair in pairs) for name in names], dtype=np.float64)
        for side in (0, 1)
    )
    if not words.any():
        raise ValueError("the references hold no word")
    counts = np.stack((errors_a, errors_b, words), axis=1)  # (utterances, 3)
    speakers = {name: speaker for pair in pairs for side in pair for name, speaker in side.speakers.items()}
    over_speakers = None
    if all(name in speakers for name in names) and len(set(speakers.values())) > 1:
        _, group = np.unique([speakers[name] for name in names], return_inverse=True)
        by_speaker = np.zeros((group.max() + 1, 3))
        np.add.at(by_speaker, group, counts)
        over_speakers = _bootstrap(by_speaker, num_draws, seed)
    wer_a, wer_b = 100 * errors_a.sum() / words.sum(), 100 * errors_b.sum() / words.sum()
    over_utterances = _bootstrap(counts, num_draws, seed)
    return Comparison(len(names), int(words.sum()), float(wer_a), float(wer_b), over_utterances, over_speakers)


def _bootstrap(counts: np.ndarray, num_draws: int, seed: int) -> Interval:
    """counts: (G, 3) errors of A, errors of B and reference words of each group that is drawn as a whole."""
    rng, num_groups = np.random.default_rng(seed), len(counts)
    alike, sizes = np.full(num_groups, 1 / num_groups), [_DRAWS_AT_ONCE] * (num_draws // _DRAWS_AT_ONCE)
    sizes.append(num_draws % _DRAWS_AT_ONCE)
    sums = np.concatenate([rng.multinomial(num_groups, alike, size) @ counts for size in sizes])  # (num_draws, 3)
    sums = sums[sums[:, 2] > 0]
    difference = 100 * (sums[:, 1] - sums[:, 0]) / sums[:, 2]
    low, high = np.percentile(difference, (2.5, 97.5)).tolist()
    relative = [None, None]
    if (sums[:, 0] > 0).all():
        relative = np.percentile(100 * (sums[:, 1] / sums[:, 0] - 1), (2.5, 97.5)).tolist()
    better = float(np.mean((difference < 0) + 0.5 * (difference == 0)))
    return Interval(num_groups, low, high, *relative, better)
