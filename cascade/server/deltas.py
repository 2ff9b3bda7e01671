"""The append-only part of a text that is still being revised, for clients that can only add to what they have.

A word is handed out when only the full pass could still change it, so that most texts need no revision.
"""

from __future__ import annotations

from cascade.stream.decoder import Partial
from cascade.stream.words import Word, join_words
from cascade.text.normal import join_texts


class Deltas:
    """Of segments that follow each other: all that it hands out, one behind the other, begins the whole text, unless
    the full pass has changed a word that was handed out."""

    def __init__(self) -> None:
        self._told = self._sent = ""  # of the segments that ended, and of the open one

    def go_on(self, partial: Partial) -> str:
        """What the open segment adds; empty if nothing."""
        return self._add(settled_text(partial))

    def end_segment(self, text: str) -> str:
        """What a segment's final text adds; the next segment is open then."""
        delta = self._add(text)
        self._told, self._sent = join_texts([self._told, self._sent]), ""
        return delta

    def _add(self, text: str) -> str:
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return ""
        delta = join_texts([self._told, text])[len(join_texts([self._told, self._sent])) :]
        self._sent = text
        return delta


def stable_words(partial: Partial) -> tuple[Word, ...]:
    """The words that lie in the stable text; the last of them may still grow."""
    position = 0
    for count, word in enumerate(partial.words):
        piece = f" {word.word}" if word.spaced and position else word.word
        if not partial.stable_text.startswith(piece, position):
            return partial.words[:count]
        position += len(piece)
    return partial.words


def settled_text(partial: Partial) -> str:
    """The words of the stable text that cannot grow any more."""
    words = stable_words(partial)
    if join_words(words) == partial.stable_text:
        words = words[:-1]
    return join_words(words)
