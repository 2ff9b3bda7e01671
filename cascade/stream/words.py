"""Words with times and confidences out of a hypothesis, and how many of them a later hypothesis changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from cascade.config.options import ENCODER_FRAME_MS
from cascade.search.hypothesis import UNCALIBRATED, Calibration, Hypothesis
from cascade.text.normal import WORD_MARK, begins_word, is_unspaced
from cascade.text.tokens import Tokenizer

NOTHING = Hypothesis((), (), (), 0.0)


@dataclass(frozen=True)
class Word:
    word: str
    start: float
    """Seconds from the start of the stream: where the frame of its first token begins."""
    end: float
    """End of the frame of its last token."""
    confidence: float
    """How likely it is right, 0 to 1: the geometric mean of its tokens' probabilities, through the `Calibration`."""
    spaced: bool = True
    """A space stands before it, unless it is the first."""


def frame_seconds(frame: int) -> float:
    """Start of a 40 ms encoder frame, in seconds."""
    return frame * ENCODER_FRAME_MS / 1000


def words_of(
    hypothesis: Hypothesis, tokenizer: Tokenizer, first_frame: int = 0, duration: float = math.inf,
    complete: bool = True, calibration: Calibration = UNCALIBRATED,
) -> tuple[Word, ...]:
    """The words of a hypothesis (in scripts without spaces, its characters); `join_words` gives its text.

    Args:
      first_frame: where the hypothesis's frame 0 stands in the stream.
      duration: seconds of the stream, which no word may exceed (the last frame may, by half a feature frame).
      complete: False while more tokens may come: the bytes of a last character that is not whole yet are left out.
      calibration: makes confidences of mean probabilities.
    """
    words = []
    for text, first, last, spaced in _spans(hypothesis.tokens, tokenizer, complete):
        log_prob = sum(hypothesis.token_log_probs[first : last + 1]) / (last + 1 - first)
        start, end = (first_frame + hypothesis.timestamps[place] for place in (first, last))
        words.append(Word(
            text, min(frame_seconds(start), duration), min(frame_seconds(end + 1), duration),
            float(calibration(math.exp(min(log_prob, 0.0)))), spaced,
        ))  # fmt: skip
    return tuple(words)


def join_words(words: Iterable[Word]) -> str:
    """The text that words are the words of."""
    return "".join(f" {word.word}" if word.spaced else word.word for word in words).lstrip(" ")


def _spans(tokens: Sequence[int], tokenizer: Tokenizer, complete: bool) -> list[tuple[str, int, int, bool]]:
    """(word, places of its first and its last token, whether a space stands before it).

    A word begins with the word mark before it, if that is a token of its own.
    """
    words: list[tuple[str, int, int, bool]] = []
    mark, previous = -1, ""
    for character, first, last in tokenizer.characters(tokens, complete):
        if character == WORD_MARK or character.isspace():
            mark, previous = first, ""
        elif begins_word(previous, character):
            spaced = not previous and not (tokenizer.kind != "word" and words and _idle(words[-1][0], character))
            words.append((character, mark if mark >= 0 else first, last, spaced))
            mark, previous = -1, character
        else:
            word, start, _, spaced = words[-1]
            words[-1] = (word + character, start, last, spaced)
            previous = character
    return words


def _idle(word: str, character: str) -> bool:
    """True where a space between a word and the character that follows means nothing."""
    return is_unspaced(word[-1]) and is_unspaced(character)


def count_changed(shown: Hypothesis, now: Hypothesis, tokenizer: Tokenizer) -> int:
    """Number of the words that were shown and are changed or taken back; more tokens behind them change nothing."""
    if now.tokens[: len(shown.tokens)] == shown.tokens:
        return 0
    old, new = ([word.word for word in words_of(hypothesis, tokenizer, complete=False)] for hypothesis in (shown, now))
    pairs = zip(old, new, strict=False)
    same = next((place for place, (word, other) in enumerate(pairs) if word != other), min(len(old), len(new)))
    old, new = old[same:], new[same:]
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return len(old) - sum(block.size for block in blocks)
