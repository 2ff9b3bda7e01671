"""Hotwords: phrases that a search prefers, as a scorer over Aho-Corasick automata (CACM 18(6), 1975) in arrays.

A phrase of n tokens is worth boost * sum over d = 1 .. n of (1 + ln d). A text is worth the largest sum over phrases in
it that do not overlap: a phrase inside a longer one that was said adds nothing, and one that begins a longer one keeps
its worth if the longer one breaks off. Only whole words count: `cat` is not in `catalog`.

A node stands for the longest end of the text so far that begins a phrase. It has three values:

    ended    what this end is worth if its last word is whole
    open     the same without the phrases that end with it, because its last word goes on
    granted  the bonus it has: the last phrase of the sum may be one that has only begun

A token from node q to node c adds (ended or open)(q) - granted(q), by whether it begins a word, and granted(c) -
open(c). So the bonus of a phrase that breaks off is taken back; `final` does that where a segment ends. Then the bonus
of a text is its worth, but where phrases overlap crosswise (`new york` and `york city`) each keeps its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cascade.config.options import DecodingConfig
from cascade.search.row_cache import RowCache
from cascade.text.normal import WORD_MARK, begins_word, is_unspaced
from cascade.text.tokens import BLANK_ID, UNKNOWN_ID, UNKNOWN_SURFACE, Tokenizer

DEFAULT_SCALE = DecodingConfig.hotword_scale
"""Boost of a phrase that names none; README.md beside this file has what it brings and costs."""
_OWN_BOOST = re.compile(r"\s:(\S+)\s*$")


class Phrase(NamedTuple):
    """The tokens of a phrase and its boost."""

    tokens: tuple[int, ...]
    boost: float


class Nodes(NamedTuple):
    """The nodes (A,) of automata; a root, the empty end, is its own parent and link."""

    parents: np.ndarray
    tokens: np.ndarray
    """What leads from the parent to the node."""
    links: np.ndarray
    """The node of the next shorter end."""
    ended: np.ndarray
    open: np.ndarray
    granted: np.ndarray


class WordEdges:
    """Where words begin, by the tokens on both sides."""

    def __init__(self, symbols: Sequence[str]) -> None:
        self.begins = np.array([
            [symbol[0] == WORD_MARK or begins_word(previous, symbol[0]) for symbol in symbols]
            for previous in ("a", "\u4e00")
        ])  # fmt: skip
        """(2, V): whether a token begins a word after a letter; after a character of a script without spaces."""
        self.unspaced = np.array([is_unspaced(symbol[-1]) or _is_byte(symbol) for symbol in symbols], np.int64)
        """(V,) the row of `begins` after this token."""


@lru_cache(maxsize=8)
def build_automaton(phrases: tuple[Phrase, ...], edges: WordEdges) -> Nodes:
    """The automaton of a list, node 0 its root; of equal phrases the highest boost counts."""
    children: list[dict[int, int]] = [{}]
    parents, tokens, depths, boosts, whole = [0], [0], [0], [0.0], [0.0]
    for phrase in phrases:
        node = 0
        for depth, token in enumerate(phrase.tokens, 1):
            parent, node = node, children[node].setdefault(token, len(parents))
            if node == len(parents):
                for values, value in zip((children, parents, tokens, depths, boosts, whole),
                                         ({}, parent, token, depth, 0.0, 0.0), strict=True):  # fmt: skip
                    values.append(value)
            boosts[node] = max(boosts[node], phrase.boost)
        whole[node] = max(whole[node], phrase.boost)
    worth = np.append(0.0, np.cumsum(1.0 + np.log(np.arange(1, max(depths) + 1)))).tolist()
    links, ended, opened, granted = [0] * len(parents), [0.0] * len(parents), [0.0] * len(parents), [0.0] * len(parents)
    for node in sorted(range(1, len(parents)), key=depths.__getitem__):
        parent, token = parents[node], tokens[node]
        if parent:
            link = links[parent]
            while link and token not in children[link]:
                link = links[link]
            links[node] = children[link].get(token, 0)
        begins = edges.begins[edges.unspaced[tokens[parent]], token]
        opened[node] = ended[node] = granted[node] = (ended if begins else opened)[parent]
        path, end = [node], node
        while path[-1]:
            path.append(parents[path[-1]])
        while end:  # the phrases that end here, whole or not, each after the best that can stand before it
            first = path[depths[end] - 1]
            ended[node] = max(ended[node], opened[first] + whole[end] * worth[depths[end]])
            granted[node] = max(granted[node], opened[first] + boosts[end] * worth[depths[end]])
            end = links[end]
    return Nodes(*map(np.array, (parents, tokens, links, ended, opened, granted)))


class Hotwords:
    """A scorer for one list of phrases, which all streams have, and for lists of single streams.

    A state is a node; the lists lie one behind the other in one array of nodes. `<unk>` counts as blank.

    Args:
      phrases: each may end with its own boost, `new york :2.5`; they take the form of transcripts.
      scale: the boost of the others.
    Raises:
      ValueError: a phrase that the model's tokens cannot say, a boost that is no positive number, a text instead of a
        list.
    """

    blank_weight = 0.0

    def __init__(self, tokenizer: Tokenizer, phrases: Sequence[str] = (), scale: float = DEFAULT_SCALE) -> None:
        self._tokenizer, self._scale, self._vocab_size = tokenizer, scale, tokenizer.vocab_size
        self._edges = WordEdges([tokenizer.id_to_symbol(token) for token in range(tokenizer.vocab_size)])
        self._sizes: dict[int, int] = {}  # nodes of each list by its root
        self._nodes = Nodes(*(np.zeros(0, np.int64) for _ in range(3)), *(np.zeros(0) for _ in range(3)))
        self._phrases = encode_phrases(tokenizer, phrases, scale)
        self.start = self.hold(())
        """State of a stream without a list of its own."""

    def hold(self, phrases: Sequence[str]) -> int:
        """The state in which a stream starts that has these phrases too, until `release` forgets the list."""
        added = build_automaton((*self._phrases, *encode_phrases(self._tokenizer, phrases, self._scale)), self._edges)
        root, size = 0, len(added.parents)
        for other in sorted(self._sizes):
            if other - root >= size:
                break
            root = other + self._sizes[other]
        if root + size > len(self._nodes.parents):
            larger = max(root + size, 2 * len(self._nodes.parents))
            self._nodes = Nodes(*(np.resize(array, larger) for array in self._nodes))
        for name, array, values in zip(Nodes._fields, self._nodes, added, strict=True):
            array[root : root + size] = values + root if name in ("parents", "links") else values
        self._sizes[root] = size
        self._index()
        return root

    def release(self, start: int) -> None:
        """Forget the list of this start; no hypothesis may be in its states."""
        del self._sizes[start]
        self._index()

    def _index(self) -> None:
        """Sort the arcs by node and token."""
        children = np.concatenate([np.arange(root + 1, root + size) for root, size in self._sizes.items()])
        keys = self._nodes.parents[children] * self._vocab_size + self._nodes.tokens[children]
        order = np.argsort(keys)
        self._keys, self._children = keys[order], children[order]
        self._rows = RowCache(len(self._nodes.parents), self._vocab_size, self._dense)

    def initial(self, n: int) -> np.ndarray:
        return np.full(n, self.start, np.int64)

    def score(self, state: np.ndarray) -> np.ndarray:
        return self._rows[state]

    def advance(self, state: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        state = state[parents]
        rows = np.flatnonzero((tokens != BLANK_ID) & (tokens != UNKNOWN_ID))
        ends = state[rows]
        while len(rows) and len(self._keys):
            keys = ends * self._vocab_size + tokens[rows]
            places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            known = self._keys[places] == keys
            state[rows[known]] = self._children[places[known]]
            shorter = self._nodes.links[ends]
            at_root = ~known & (shorter == ends)
            state[rows[at_root]] = ends[at_root]
            on = ~known & ~at_root
            rows, ends = rows[on], shorter[on]
        return state

    def final(self, state: np.ndarray) -> np.ndarray:
        return (self._nodes.ended[state] - self._nodes.granted[state]).astype(np.float32)

    def _dense(self, states: np.ndarray) -> np.ndarray:
        """(rows, V) scores: from the root on, arcs of longer ends overwrite those of shorter ones."""
        nodes, chain = self._nodes, [states]
        while (nodes.links[chain[-1]] != chain[-1]).any():
            chain.append(nodes.links[chain[-1]])
        scores = np.zeros((len(states), self._vocab_size))
        for ends in reversed(chain):
            starts = np.searchsorted(self._keys, ends * self._vocab_size)
            lens = np.searchsorted(self._keys, (ends + 1) * self._vocab_size) - starts
            arcs = np.repeat(starts - (np.cumsum(lens) - lens), lens) + np.arange(lens.sum())
            reached = self._children[arcs]
            rows = np.repeat(np.arange(len(states)), lens)
            scores[rows, nodes.tokens[reached]] = nodes.granted[reached] - nodes.open[reached]
        begins = self._edges.begins[self._edges.unspaced[nodes.tokens[states]]]
        scores += np.where(begins, nodes.ended[states][:, None], nodes.open[states][:, None])
        return (scores - nodes.granted[states][:, None]).astype(np.float32)


def read_hotwords(path: str | Path) -> list[str]:
    """The phrases of a file, one a line, each with its boost if it names one.

    Raises:
      ValueError: the file is not UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8 ({error}): convert it") from error
    return [line for line in lines if line.strip()]


def encode_phrases(tokenizer: Tokenizer, phrases: Iterable[str], scale: float) -> list[Phrase]:
    """The token sequences that say these phrases: two for one that needs no space before it.

    Raises:
      ValueError: as `Hotwords`.
    """
    if isinstance(phrases, str):
        raise ValueError(f"hotwords are a list of phrases, got one text: {phrases!r}")
    encoded = []
    for line in phrases:
        text, boost = _own_boost(line, scale)
        tokens = tokenizer.encode(text)
        if UNKNOWN_ID in tokens:
            unknown = ", ".join(sorted(tokenizer.unknown_characters(text)))
            raise ValueError(f"hotword {text.strip()!r} has what the model's tokens cannot say: {unknown}")
        if not tokens:
            raise ValueError(f"hotword {text.strip()!r} is nothing that a transcript says: take it out")
        encoded.append(Phrase(tuple(tokens), boost))
        if tokenizer.kind != "word" and is_unspaced(tokenizer.normalize(text)[0]):
            before = len(tokenizer.encode(UNKNOWN_SURFACE))  # nothing joins with it
            inside = tokenizer.encode(UNKNOWN_SURFACE + text.strip())[before:]
            encoded.append(Phrase(tuple(inside), boost))
    return encoded


def _own_boost(line: str, scale: float) -> tuple[str, float]:
    """A line's phrase and boost."""
    own = _OWN_BOOST.search(line)
    if own is None:
        return line, scale
    try:
        boost = float(own[1])
    except ValueError:
        boost = math.nan
    if not 0 < boost < math.inf:
        raise ValueError(f"hotword {line.strip()!r}: after ' :' stands its boost, a positive number, as in 'word :2.5'")
    return line[: own.start()], boost


def _is_byte(symbol: str) -> bool:
    """True for a piece of byte fallback: what comes after it is not known to be in the same word."""
    return re.fullmatch("<0x[0-9A-F]{2}>", symbol) is not None
