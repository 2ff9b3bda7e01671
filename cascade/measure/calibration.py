"""Calibration of word confidences: its error, and a monotone map that lowers it (Platt scaling).

A word's confidence c, the geometric mean of its tokens' probabilities, becomes logistic(slope logit(c) + offset). The
map is fitted by maximum likelihood to which words of a dev set are right, with Platt's targets (N + 1) / (N + 2) and
1 / (M + 2) for N right and M wrong words, so that it exists for every set (Platt 1999; Lin, Lin & Weng 2007).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cascade.measure.wer import align
from cascade.search.hypothesis import Calibration
from cascade.stream.words import Word
from cascade.text.normal import split_words

BINS = 10


def outcomes(reference: str, words: Sequence[Word]) -> list[tuple[float, bool]]:
    """(confidence, right) of each word of a hypothesis, by the alignment that the word error rate has."""
    pairs = align(split_words(reference), [word.word for word in words])
    right = [said == true for true, said in pairs if said is not None]
    return [(word.confidence, each) for word, each in zip(words, right, strict=True)]


def expected_calibration_error(scored: Iterable[tuple[float, bool]], bins: int = BINS) -> float | None:
    """ECE (Guo et al. 2017): mean over words of |share of right ones - mean confidence| of their bin; None: no words.

    Args:
      scored: (confidence, right) of each word.
      bins: of equal width.
    """
    values = np.array(list(scored), np.float64).reshape(-1, 2)
    if not len(values):
        return None
    place = np.minimum((values[:, 0] * bins).astype(int), bins - 1)
    gaps = np.bincount(place, values[:, 1] - values[:, 0], minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


def fit_calibration(scored: Sequence[tuple[float, bool]], steps: int = 50) -> Calibration:
    """The map that makes the outcomes likeliest, by Newton steps; its slope is not below 0.

    Raises:
      ValueError: no word.
    """
    if not scored:
        raise ValueError("no word was recognised: there is nothing to calibrate confidences on")
    confidences, right = (np.array(values, np.float64) for values in zip(*scored, strict=True))
    number = right.sum()
    targets = np.where(right > 0, (number + 1) / (number + 2), 1 / (len(right) - number + 2))
    inputs = np.stack((Calibration.logit(confidences), np.ones_like(confidences)))  # (2, W)

    def loss(weights: np.ndarray) -> float:
        logits = weights @ inputs
        return float((np.logaddexp(0.0, logits) - targets * logits).sum())

    weights = np.array([0.0, np.log(targets.mean() / (1 - targets.mean()))])
    for _ in range(steps):
        probs = 1 / (1 + np.exp(-(weights @ inputs)))
        gradient = inputs @ (probs - targets)
        hessian = (inputs * (probs * (1 - probs))) @ inputs.T + 1e-9 * np.eye(2)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    if weights[0] < 0:  # confidences that say nothing: all words have the same then
        return Calibration(0.0, float(np.log(targets.mean() / (1 - targets.mean()))))
    return Calibration(float(weights[0]), float(weights[1]))
