"""Words with times and confidences out of a hypothesis, and how many of them a later hypothesis changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import SequenceMatcher

from cascade.config import ENCODER_FRAME_MS
from cascade.decoding.hypothesis import Hypothesis
from cascade.tokens import WORD_MARK, Tokenizer

NOTHING = Hypothesis((), (), (), 0.0)


@dataclass(frozen=True)
class Word:
    word: str
    start: float
    """Seconds from the start of the stream: where the frame of its first token begins."""
    end: float
    """Where the frame of its last token ends."""
    confidence: float
    """The geometric mean of its tokens' probabilities, 0 to 1."""


def frame_seconds(frame: int) -> float:
    """Where a 40 ms encoder frame begins."""
    return frame * ENCODER_FRAME_MS / 1000


def words_of(
    hypothesis: Hypothesis, tokenizer: Tokenizer, first_frame: int = 0, duration: float = math.inf
) -> tuple[Word, ...]:
    """The words of a hypothesis; joined by spaces they are its text.

    Args:
      first_frame: where the hypothesis's frame 0 stands in the stream.
      duration: seconds of the stream, which no word may exceed (the last frame may, by half a feature frame).
    """
    groups: list[list[int]] = []
    for place, token in enumerate(hypothesis.tokens):
        if not groups or tokenizer.id_to_symbol(token).startswith(WORD_MARK):
            groups.append([])
        groups[-1].append(place)
    words = []
    for group in groups:
        text = tokenizer.decode(hypothesis.tokens[place] for place in group)
        if not text:  # a word mark alone
            continue
        log_prob = sum(hypothesis.token_log_probs[place] for place in group) / len(group)
        start, end = (first_frame + hypothesis.timestamps[place] for place in (group[0], group[-1]))
        words.append(Word(
            text, min(frame_seconds(start), duration), min(frame_seconds(end + 1), duration),
            math.exp(min(log_prob, 0.0)),
        ))  # fmt: skip
    return tuple(words)


def count_changed(shown: Hypothesis, now: Hypothesis, tokenizer: Tokenizer) -> int:
    """How many of the words that were shown are changed or taken back; more tokens behind them change nothing."""
    if now.tokens[: len(shown.tokens)] == shown.tokens:
        return 0
    old, new = ([word.word for word in words_of(hypothesis, tokenizer)] for hypothesis in (shown, now))
    pairs = zip(old, new, strict=False)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(old), len(new)))
    old, new = old[same:], new[same:]
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return len(old) - sum(block.size for block in blocks)
