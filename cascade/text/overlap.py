"""Overlap of a text with some sentences: the share that a language model of the text has memorised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from cascade.files import read_lines

WORDS_PER_BLOCK = 2_000_000
_FACTORS = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, 17, dtype=np.uint64)  # odd: of a hash modulo 2 ** 64


def shared_sequences(
    sentences: Iterable[str], texts: Iterable[str | Path], normalize: Callable[[str], str], length: int = 6
) -> tuple[int, int]:
    """Count the different sequences of `length` (at most 16) words of the sentences: those in the texts, and all.

    Args:
      texts: files (plain, .gz, .xz), one sentence a line; no sequence goes on into the next line.
      normalize: of sentences and lines, `Tokenizer.normalize`.
    """
    wanted = {sequence for sentence in sentences for sequence in _sequences(normalize(sentence).split(), length)}
    numbers: dict[str, int] = {}
    for sequence in wanted:
        for word in sequence:
            numbers.setdefault(word, len(numbers) + 1)
    words = list(numbers)
    hashes = np.array([_hashes(np.array([numbers[word] for word in sequence]), length)[0] for sequence in wanted])
    shared: set[tuple[str, ...]] = set()
    for block in _blocks(texts, normalize):
        ids = np.fromiter((numbers.get(word, 0) for word in block), np.int64, len(block))
        if wanted and len(ids) >= length:
            for place in np.flatnonzero(np.isin(_hashes(ids, length), hashes)).tolist():
                sequence = tuple(words[number - 1] for number in ids[place : place + length] if number)
                shared |= {sequence} & wanted
    return len(shared), len(wanted)


def _sequences(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[place:] for place in range(length)), strict=False)


def _hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """(W,) numbers of words -> (W - length + 1,) hashes of the sequences that begin at each."""
    ids, count = ids.astype(np.uint64), len(ids) - length + 1
    return sum(ids[place : place + count] * _FACTORS[place] for place in range(length))


def _blocks(texts: Iterable[str | Path], normalize: Callable[[str], str]) -> Iterator[list[str]]:
    """Words of many lines, with one that no sentence has between them."""
    block: list[str] = []
    for path in texts:
        for line in read_lines(path):
            block += [*normalize(line.decode(errors="replace")).split(), "\n"]
            if len(block) > WORDS_PER_BLOCK:
                yield block
                block = []
    yield block
