"""Back-off n-gram models over tokens in arrays, read from ARPA files or from the arrays themselves; numpy only.

All n-grams are nodes of one tree, numbered order by order: node 0 is the empty context, nodes 1 .. V + 1 are the tokens
(V: </s>, V + 1: <s>), and the keys `context node * (V + 2) + newest token` ascend with the nodes' numbers. A state is
the node of the longest context that changes what comes next.
"""

from __future__ import annotations

import logging
import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import numpy as np

from cascade.files import read_lines, replacing
from cascade.search.compiled import compiled
from cascade.search.row_cache import RowCache
from cascade.text.tokens import BLANK_ID

log = logging.getLogger(__name__)

LOWEST = -99.0
"""log10 that stands for a probability of 0."""
MISSING = -7.0
"""log10 probability of a token that the file lacks, where it has no <unk> either."""
ROWS_PER_BLOCK = 20_000
_TWICE = "an n-gram for the second time"
ARRAYS = ("keys", "log_probs", "backoffs", "next", "links")
"""What an .npz file holds of a model, beside the tokens' symbols."""


class ArpaSection(NamedTuple):
    """A n-grams of one order."""

    tokens: np.ndarray
    """(A, k) oldest token first."""
    log10_probs: np.ndarray
    log10_backoffs: np.ndarray
    lines: np.ndarray
    """(A,) line numbers, for errors."""


class NgramModel:
    """log p(token | state) and the states that follow; `start` is the state after <s>."""

    def __init__(self, sections: Sequence[ArpaSection], vocab_size: int) -> None:
        """Build the tree of orders 1, 2, ...; order 1 holds 1 .. V + 1, in this order.

        Raises:
          ValueError: an n-gram that is there twice, or whose context is not there.
        """
        self.vocab_size, self._base = vocab_size, vocab_size + 2
        self._keys = np.empty(0, np.int64)
        log_probs, backoffs, sizes = [], [np.zeros(1)], [1]
        for tokens, log10_probs, log10_backoffs, lines in sections:
            nodes = np.zeros(len(tokens), np.int64)
            for column in tokens.T[:-1]:
                places, known = self._find(nodes, column)
                if not known.all():
                    raise ValueError(f"line {lines[~known][0]}: the context of this n-gram is no n-gram of the file")
                nodes = places + 1
            keys = nodes * self._base + tokens[:, -1]
            ascending = np.argsort(keys, kind="stable")
            keys = keys[ascending]
            twice = lines[ascending][1:][keys[1:] == keys[:-1]]
            if len(twice):
                raise ValueError(f"line {twice[0]}: {_TWICE}")
            self._keys = np.append(self._keys, keys)
            log_probs.append(log10_probs[ascending])
            backoffs.append(log10_backoffs[ascending])
            sizes.append(len(keys))
        num_contexts = sum(sizes[:-1])
        self._log_probs = (np.concatenate(log_probs) * math.log(10.0)).astype(np.float32)
        self._backoffs = (np.concatenate(backoffs)[:num_contexts] * math.log(10.0)).astype(np.float32)
        self._index()
        self._link_states(sizes)
        self._compile()

    def _index(self) -> None:
        """What follows from the keys."""
        self._tokens = (self._keys % self._base).astype(np.int32)
        self._first = np.searchsorted(self._keys, np.arange(len(self._backoffs) + 1) * self._base)
        self.kernels: ModuleType | None = None
        """ngram_numba, where it is installed; None: plain numpy."""

    def _compile(self) -> None:
        """What follows from all arrays."""
        self.start = int(self._next[self.vocab_size])
        self.kernels = compiled("ngram_numba", "the n-gram model")
        if self.kernels is not None:
            contexts = (self._first, np.append(self._links, 0), np.append(self._backoffs, 0))
            self._contexts = self.kernels.records(self.kernels.CONTEXT, *contexts)
            self._arcs = self.kernels.records(self.kernels.ARC, self._tokens, self._log_probs)

    @cached_property
    def _kept(self) -> RowCache:
        return RowCache(len(self._backoffs), self._base, self._dense)

    def _rows(self, states: np.ndarray, width: int, weight: float = 1.0) -> np.ndarray:
        """(rows, width) scores times the weight: V of them, or V + 2 with </s> and <s>."""
        if self.kernels is None:
            return self._kept[states][:, :width] * np.float32(weight)
        return self.kernels.dense(states, self._contexts, self._arcs, width, weight)

    def save(self, path: str | Path, symbols: Sequence[str]) -> None:
        """Write the arrays (.npz), which load in a moment; `symbols` as `read_arpa`."""
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, symbols=np.array(symbols), **{name: getattr(self, f"_{name}") for name in ARRAYS})

    @classmethod
    def load(cls, path: str | Path, symbols: Sequence[str]) -> NgramModel:
        """The model that `save` wrote.

        Raises:
          ValueError: damaged, no such file, or one of other tokens.
        """
        model = cls.__new__(cls)
        try:
            with np.load(path, allow_pickle=False) as file:
                known = file["symbols"].tolist()
                arrays = {name: file[name] for name in ARRAYS}
            _check_sizes(**arrays)
        except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged or no n-gram model ({error}): make it again") from error
        if known != list(symbols):
            raise ValueError(f"{path} is of other tokens than the model's: train the n-gram with its tokenizer")
        vars(model).update({f"_{name}": array for name, array in arrays.items()})
        model.vocab_size, model._base = len(symbols), len(symbols) + 2
        model._index()
        model._compile()
        return model

    def scores(self, states: np.ndarray, weight: float = 1.0) -> np.ndarray:
        """(rows,) states -> (rows, V) float32 natural log-probabilities of the next token, times the weight; 0 for the
        blank."""
        return self._rows(states, self.vocab_size, weight)

    def final(self, states: np.ndarray) -> np.ndarray:
        """(rows,) states -> (rows,) float32 natural log-probabilities of </s>."""
        return self._rows(states, self._base)[:, self.vocab_size]

    def advance(self, states: np.ndarray, tokens: np.ndarray, silent: int = BLANK_ID) -> np.ndarray:
        """(rows,) states and tokens -> (rows,) the states after them; tokens up to `silent` leave a state as it is."""
        if self.kernels is not None:
            return self.kernels.advance(states, tokens, self._contexts, self._arcs, self._next, silent)
        after, rows = states.copy(), np.flatnonzero(tokens > silent)
        nodes = states[rows]
        while len(rows):
            places, known = self._find(nodes, tokens[rows])
            after[rows[known]] = self._next[places[known]]
            rows, nodes = rows[~known], self._links[nodes[~known]]
        return after

    def _find(self, nodes: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of n-grams among the keys, and which of them are there."""
        keys = nodes.astype(np.int64) * self._base + tokens
        places = self._keys.searchsorted(keys)
        return places, self._keys.take(places, mode="clip") == keys

    def _link_states(self, sizes: Sequence[int]) -> None:
        """Find the next state of every n-gram, and every context's longest shorter state, to which it backs off."""
        self._next = np.zeros(len(self._keys), np.int32)
        self._links = np.zeros(len(self._backoffs), np.int32)
        is_state = (np.diff(self._first) > 0) | (self._backoffs != 0)
        begin = 0
        for k, size in enumerate(sizes[1:], 1):
            places = np.arange(begin, begin + size)
            if k > 1:
                self._next[places] = self.advance(self._links[self._keys[places] // self._base], self._tokens[places])
            if k < len(sizes) - 1:
                self._links[places + 1] = self._next[places]
                self._next[places] = np.where(is_state[places + 1], places + 1, self._next[places])
            begin += size

    def _dense(self, states: np.ndarray) -> np.ndarray:
        """(rows, V + 2) scores: those of the next shorter context, and what this one knows."""
        scores = np.zeros((len(states), self._base), np.float32)
        longer = states > 0
        if longer.any():
            scores[longer] = self._kept[self._links[states[longer]]]
        starts = self._first[states]
        lens = self._first[states + 1] - starts
        scores += self._backoffs[states, None]
        arcs = np.repeat(starts - (np.cumsum(lens) - lens), lens) + np.arange(lens.sum())
        scores[np.repeat(np.arange(len(states)), lens), self._tokens[arcs]] = self._log_probs[arcs]
        scores[:, 0] = 0.0
        return scores


def _check_sizes(
    keys: np.ndarray, log_probs: np.ndarray, backoffs: np.ndarray, next: np.ndarray, links: np.ndarray
) -> None:
    """
    Raises:
      ValueError: arrays of a file that do not belong together.
    """
    states = np.concatenate((next, links))
    if (
        not keys.shape == log_probs.shape == next.shape or backoffs.shape != links.shape
        or states.min() < 0 or states.max() >= len(links)
    ):
        raise ValueError("its arrays do not belong together")


def read_ngram(path: str | Path, symbols: Sequence[str]) -> NgramModel:
    """Read a model from an ARPA file or from arrays (.npz); raises as `read_arpa` and `NgramModel.load`."""
    return (NgramModel.load if Path(path).suffix == ".npz" else read_arpa)(path, symbols)


def read_arpa(path: str | Path, symbols: Sequence[str]) -> NgramModel:
    """Read an ARPA file (plain, .gz, .xz) for a model with these token symbols, blank and <unk> first.

    Tokens that the file lacks get the probability of its <unk>, or MISSING, with a warning.

    Raises:
      ValueError: damaged, no ARPA file, or one with other tokens; with the line.
    """
    file = _ArpaFile(Path(path), symbols)
    sections = file.sections()
    try:
        return NgramModel([file.complete(sections[0], symbols), *sections[1:]], len(symbols))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


class _ArpaFile:
    """The lines of an ARPA file, with what is needed to name the one that is wrong."""

    def __init__(self, path: Path, symbols: Sequence[str]) -> None:
        self._path, self._lines, self._number = path, read_lines(path), 0
        self._ids = {symbol.encode(): token for token, symbol in enumerate(symbols) if token}
        self._vocab_size = len(symbols)
        self._ids |= {b"<unk>": 1, b"<UNK>": 1, b"</s>": len(symbols), b"<s>": len(symbols) + 1}

    def _fail(self, problem: str, number: int | None = None) -> NoReturn:
        raise ValueError(f"{self._path} line {number or self._number}: {problem}")

    def _line(self) -> bytes:
        """The next line that is not empty, stripped; b"" at the end."""
        for line in self._lines:
            self._number += 1
            if line.strip():
                return line.strip()
        return b""

    def sections(self) -> list[ArpaSection]:
        """Orders 1, 2, ..."""
        while (line := self._line()) != rb"\data\ "[:-1]:
            if not line:
                self._fail(r"the file has no line \data\ before its end: it is no ARPA file")
        sizes: list[int] = []
        while match := re.fullmatch(rb"ngram\s+(\d+)\s*=\s*(\d+)", line := self._line()):
            if int(match[1]) != len(sizes) + 1:
                self._fail(f"expected 'ngram {len(sizes) + 1}=', got {line.decode()!r}")
            sizes.append(int(match[2]))
        if not sizes:
            self._fail(f"expected 'ngram 1=', got {_shown(line)}")
        sections = []
        for order, size in enumerate(sizes, 1):
            if line != rf"\{order}-grams:".encode():
                self._fail(rf"expected \{order}-grams:, got {_shown(line)}")
            sections.append(self._section(order, size))
            line = self._line()
        if line != rb"\end\ "[:-1]:
            self._fail(rf"expected \end\ after {sizes[-1]} n-grams of order {len(sizes)}, got {_shown(line)}")
        return sections

    def _section(self, order: int, size: int) -> ArpaSection:
        blocks: list[list[np.ndarray]] = []
        for begin in range(0, max(size, 1), ROWS_PER_BLOCK):
            wanted, first = min(size - begin, ROWS_PER_BLOCK), self._number + 1
            rows = [line.split() for line in islice(self._lines, wanted)]
            lens = np.fromiter(map(len, rows), np.int64, len(rows))
            for place in np.flatnonzero((lens <= order) | (lens > order + 2))[:1]:
                problem = f"expected a probability, {order} words and perhaps a weight, got {_shown(rows[place])}"
                self._fail(problem, first + place)
            self._number += len(rows)
            if len(rows) < wanted:
                self._fail(f"the file ends after {begin + len(rows)} of {size} n-grams of order {order}")
            tokens = np.empty((len(rows), order), np.int64)
            for column in range(order):
                words = [row[column + 1] for row in rows]
                tokens[:, column] = np.fromiter(map(self._ids.get, words, repeat(0)), np.int64, len(rows))
            probs = self._numbers([row[0] for row in rows], first)
            backoffs = self._numbers([row[-1] if len(row) == order + 2 else b"0" for row in rows], first)
            for place in np.flatnonzero(probs > 1e-3)[:1]:
                self._fail("a log10 probability above 0", first + place)
            for place, column in np.argwhere(tokens == 0)[:1]:
                word = _shown(rows[place][column + 1])
                self._fail(f"{word} is no token of the model: train the n-gram with its tokenizer", first + place)
            lines = np.arange(first, first + len(rows))
            blocks.append([tokens, np.minimum(probs, 0.0), backoffs, lines])
        return ArpaSection(*map(np.concatenate, zip(*blocks, strict=True)))

    def _numbers(self, values: list[bytes], first: int) -> np.ndarray:
        numbers = np.fromiter(map(_number, values), np.float64, len(values))
        for place in np.flatnonzero(np.isnan(numbers))[:1]:
            self._fail(f"{_shown(values[place])} is no number", first + place)
        return np.clip(numbers, LOWEST, -LOWEST)

    def complete(self, unigrams: ArpaSection, symbols: Sequence[str]) -> ArpaSection:
        """Order 1 with a row for each of 1 .. V + 1."""
        tokens = unigrams.tokens[:, 0]
        ascending = np.argsort(tokens, kind="stable")
        for place in ascending[1:][np.diff(tokens[ascending]) == 0][:1]:
            self._fail(_TWICE, unigrams.lines[place])
        rows = np.full((3, self._vocab_size + 1), [[math.nan], [0.0], [0.0]])
        rows[:, tokens - 1] = unigrams.log10_probs, unigrams.log10_backoffs, unigrams.lines
        missing = np.isnan(rows[0])
        missing[0] = missing[-1] = False
        if missing.any():
            names = ", ".join([*symbols, "</s>"][token] for token in np.flatnonzero(missing)[:3] + 1)
            dots = ", ..." if missing.sum() > 3 else ""
            log.warning(
                "%s lacks %d of the model's %d tokens (%s%s): they count as unknown words in it", self._path,
                missing.sum(), self._vocab_size, names, dots,
            )
        rows[0, -1] = LOWEST
        rows[0] = np.where(np.isnan(rows[0]), MISSING if np.isnan(rows[0, 0]) else rows[0, 0], rows[0])
        return ArpaSection(np.arange(1, self._vocab_size + 2)[:, None], rows[0], rows[1], rows[2].astype(np.int64))


def _number(value: bytes) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def _shown(line: bytes | Sequence[bytes]) -> str:
    text = line if isinstance(line, bytes) else b" ".join(line)
    return repr(text[:60].decode(errors="replace")) if text else "an empty line or the end"
