"""New training utterances out of pieces of others, cut between words that an alignment has found.

The predictor cannot memorise the transcripts of a small corpus then, and the encoder hears every word beside many
others (2502.14685, the mixing of segments; 2104.01393).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cascade.config.options import FRAME_SHIFT_MS, SUBSAMPLING, AugmentConfig
from cascade.data.alignments import TimedWord, read_ctm
from cascade.data.training_utterances import TrainingUtterance
from cascade.text.normal import begins_word, split_words
from cascade.text.tokens import Tokenizer

REMEDY = "run align again, with --manifest EXP/fbank/train_cuts.jsonl.gz"
LONGEST_PIECE = 3  # words
LOUD_SHARE = 0.9
SHORTEST_SHARE = 0.75  # of the length of what a piece replaces
_PER_SECOND = 1000 / FRAME_SHIFT_MS
_MOST, _LEAST = np.log(np.array([0.75, 0.25], dtype=np.float32))

log = logging.getLogger(__name__)


class Aligned(NamedTuple):
    """An utterance that can be cut."""

    words: list[str]
    """Each with the space that stands before it in the text; the first one has one, too."""
    cuts: np.ndarray
    """(words + 1,) int64 feature frames: word k lies from cuts[k] to cuts[k + 1]."""
    level: float
    """Log energy that a tenth of the frames of its words exceed, so that pauses do not count."""


class _Pieces:
    """The pieces of 1 to LONGEST_PIECE words that some utterances have, by length."""

    def __init__(self, pieces: list[tuple[int, int, int, int]]) -> None:
        """pieces: (frames, index of the utterance, first word, end word)."""
        self._pieces = np.array(sorted(pieces), dtype=np.int64)

    def draw(self, shortest: float, longest: int, generator: np.random.Generator) -> tuple[int, int, int]:
        """(utterance, first word, end word) of one with so many frames, any with the same probability."""
        begin, end = np.searchsorted(self._pieces[:, 0], (shortest, longest + 1))
        return tuple(self._pieces[generator.integers(begin, end), 1:].tolist())


class Recombination:
    """Puts pieces of a voice's utterances together; a function of (utterance, generator) only.

    The base utterance keeps the silence before and behind its words. What lies between is cut into pieces of one to
    three words, and each becomes a piece, drawn from all utterances of the same voice, of about its length: the new
    utterance is never longer than the base, so that batches stay as they were planned. A piece takes the base's level;
    the two frames at a joint are mixed, as windows across a cut in the samples would be.
    """

    def __init__(
        self, alignment: Path, utterances: Sequence[TrainingUtterance], tokenizer: Tokenizer, config: AugmentConfig,
        read: Callable[[int], np.ndarray],
    ) -> None:
        """
        Args:
          alignment: CTM of `align` over the training cuts, speed copies included.
          utterances: what training goes through. read: index of an utterance -> its (T, F) features; all are read once.
        Raises:
          ValueError, FileNotFoundError: no alignment of these cuts.
        """
        self._utterances, self._tokenizer, self._read, self._share = utterances, tokenizer, read, config.recombine_share
        self._own_voice = config.recombine_voices == "same"
        timed = read_ctm(alignment)
        self._aligned: dict[int, Aligned] = {}
        pieces: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
        for index, utterance in enumerate(utterances):
            if utterance.id not in timed:
                continue
            words = check_words(utterance, timed[utterance.id], tokenizer, alignment)
            features = read(index)
            cuts = word_cuts(timed[utterance.id], features)
            if not (np.diff(cuts) > 0).all():  # more words than the audio has room for
                continue
            level = float(np.quantile(np.logaddexp.reduce(features[cuts[0] : cuts[-1]], axis=1), LOUD_SHARE))
            self._aligned[index] = Aligned(words, cuts, level)
            num_words = len(cuts) - 1
            pieces[self._voice(utterance)] += [
                (int(cuts[end] - cuts[first]), index, first, end)
                for first in range(num_words) for end in range(first + 1, min(first + LONGEST_PIECE, num_words) + 1)
            ]
        if 2 * len(self._aligned) < len(utterances):
            raise ValueError(f"--alignment {alignment} has {len(self._aligned)} of {len(utterances)} training "
                             f"utterances, speed copies included: {REMEDY}")
        self._pieces = {voice: _Pieces(of_voice) for voice, of_voice in pieces.items()}
        log.info("recombining %g %% of the utterances out of words of %d of %d", 100 * self._share,
                 len(self._aligned), len(utterances))

    def _voice(self, utterance: TrainingUtterance) -> str:
        return utterance.voice if self._own_voice else ""

    def __call__(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...], str]:
        """(T, F) features, tokens and text of an utterance, recombined or as it was."""
        utterance, features, base = self._utterances[index], self._read(index), self._aligned.get(index)
        if base is None or generator.random() >= self._share:
            return features, utterance.tokens, utterance.text
        cuts, pieces = base.cuts, self._pieces[self._voice(utterance)]
        parts, words, first, spare = [features[: cuts[0]]], [], 0, 0
        while first < len(base.words):
            end = min(first + int(generator.integers(1, LONGEST_PIECE + 1)), len(base.words))
            length = int(cuts[end] - cuts[first])
            source, begin, stop = pieces.draw(SHORTEST_SHARE * length, length + spare, generator)
            other = self._aligned[source]
            part = self._read(source)[other.cuts[begin] : other.cuts[stop]]
            parts.append(part + np.float32(base.level - other.level))
            words += other.words[begin:stop]
            spare += length - len(part)
            first = end
        parts.append(features[cuts[-1] :])
        text = self._tokenizer.normalize(join_words(words))
        tokens = tuple(self._tokenizer.encode(text))
        joined = join(parts)
        if len(tokens) > len(joined) // SUBSAMPLING:
            return features, utterance.tokens, utterance.text
        return joined, tokens, text


def check_words(
    utterance: TrainingUtterance, words: Sequence[TimedWord], tokenizer: Tokenizer, alignment: Path
) -> list[str]:  # fmt: skip
    """The words of the text, each with the space before it.

    Raises:
      ValueError: an alignment of another text or of other audio.
    """
    split = str.split if tokenizer.kind == "word" else split_words
    spaced = [" " * (place == 0) + word for part in utterance.text.split() for place, word in enumerate(split(part))]
    text = " ".join(word.word for word in words)
    if len(words) != len(spaced) or split(tokenizer.normalize(text)) != split(utterance.text):
        raise ValueError(f"--alignment {alignment}: {utterance.id} is {text!r} there and {utterance.text!r} in the "
                         f"training data: {REMEDY}")
    end, duration = words[-1].end, utterance.num_frames * FRAME_SHIFT_MS / 1000
    if end > duration + 0.05:
        raise ValueError(f"--alignment {alignment}: {utterance.id} ends at {end:.2f} s there, its features at "
                         f"{duration:.2f} s: {REMEDY}")
    return spaced


def join_words(words: Sequence[str]) -> str:
    """The text of words with the space before each; there is one, too, where two words would become one without."""
    text = ""
    for word in words:
        text += word if word.startswith(" ") or begins_word(text[-1:], word[0]) else f" {word}"
    return text.lstrip()


def word_cuts(words: Sequence[TimedWord], features: np.ndarray) -> np.ndarray:
    """(words + 1,) frames where each word begins, and where the last one ends; they increase if there is room.

    The streaming pass of a transducer says a word about a quarter of a second after it began, which is more regular
    than how long before its end, so that the next word begins about that long before it is said, in a quiet frame:

        argmin_t  energy(t) + 2 ((t - (said - 25)) / 10)^2     from where the last word was said to where this one is

    The last word ends behind the last frame of the utterance that is not quiet.
    """
    num_frames = len(features)
    energy = np.logaddexp.reduce(features, axis=1)
    energy = np.convolve(np.pad(energy, 2, mode="edge"), np.full(5, 0.2), mode="valid")
    said = [round(word.start * _PER_SECOND) for word in words]
    last_said = [0, *(round(word.end * _PER_SECOND) for word in words)]
    cuts: list[int] = []
    for place, left in zip(said, last_said, strict=False):
        left = min(max(left, cuts[-1] + SUBSAMPLING) if cuts else 0, num_frames - 1)
        times = np.arange(left, max(min(place, num_frames), left + 1))
        cuts.append(left + int(np.argmin(energy[times] + 2 * ((times - place + 25) / 10) ** 2)))
    loud = np.flatnonzero(energy >= energy.min() + 0.2 * np.ptp(energy))
    end = max(cuts[-1] + SUBSAMPLING, last_said[-1], int(loud[-1]) + 6)
    return np.array([*cuts, min(end, num_frames)], dtype=np.int64)


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(T, F) features one after the other; the frames beside a joint take a quarter of each other's energy."""
    joined = np.concatenate(parts)
    for joint in np.cumsum([len(part) for part in parts])[:-1]:
        if 0 < joint < len(joined):
            before, after = joined[joint - 1].copy(), joined[joint].copy()
            joined[joint - 1] = np.logaddexp(before + _MOST, after + _LEAST)
            joined[joint] = np.logaddexp(after + _MOST, before + _LEAST)
    return joined
