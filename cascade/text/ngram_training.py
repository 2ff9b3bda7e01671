"""n-gram language models over tokens: counted, smoothed (modified Kneser-Ney) and pruned in arrays, written as ARPA.

An n-gram w_1 .. w_k is one integer in base V + 2 with its newest token first: w_k is the most significant digit. Digits
are token ids; V stands for </s>, V + 1 for <s>, 0 (the blank, which no text has) for nothing. Sorted, all n-grams that
end in w_2 .. w_k are neighbours, and `key // base` of w_1 .. w_k (w_1 the last digit) is the key of w_2 .. w_k: the
highest order's sorted keys hold all lower orders and their continuation counts.

Smoothing (Chen & Goodman, TR-10-98, 1998): p(w | h) = (c(h w) - D(c)) / c(h) + backoff(h) p(w | h'), where h' is h
without its oldest token and backoff(h) the share of c(h) that the discounts D_1, D_2, D_3+ set free. c counts the text
in the highest order and for n-grams that begin with <s>; in lower orders it is the number of different tokens that
precede the n-gram. Order 1 is interpolated with 1 / V, over V - 1 tokens and </s>.

Pruning goes by counts. An entropy criterion (Stolcke, cs/0006025) is worse at equal size: what it takes out falls back
on lower orders that Kneser-Ney estimates for what the higher ones never saw.
"""

from __future__ import annotations

import gzip
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade.config.options import ConfigError
from cascade.files import read_lines, replacing
from cascade.text.tokens import Tokenizer

log = logging.getLogger(__name__)

BEGIN, END = "<s>", "</s>"
WORDS_PER_BLOCK = 2_000_000
CACHED_WORDS = 1_000_000
LINES_PER_BLOCK = 100_000
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Discounts of an order whose counts of counts give none (kenlm's values)."""


@dataclass
class NgramOrder:
    """The A n-grams of one order, ascending by key."""

    keys: np.ndarray
    text_counts: np.ndarray
    """(A,) how often the text has the n-gram."""
    counts: np.ndarray
    """(A,) c of the formula above."""
    probs: np.ndarray | None = None
    backoffs: np.ndarray | None = None
    kept: np.ndarray | None = None
    """(A,) False where pruning took the n-gram out."""


def train_ngram(
    texts: Sequence[str | Path], tokenizer: Tokenizer, order: int, prune: Sequence[int] = (0,)
) -> list[NgramOrder]:
    """Train a model on text files (plain, .gz, .xz; one sentence a line).

    Args:
      prune: for orders 1 (always 0), 2, ...: n-grams that the text has at most so often are taken out; the last value
        holds for higher orders too.
    Returns:
      Orders 0 (one n-gram without tokens), 1, ..., `order`.
    Raises:
      ConfigError: an option that no model can have.
      ValueError: a text that cannot be read, or none at all.
    """
    base, longest = tokenizer.vocab_size + 2, 1
    while base ** (longest + 1) < 2**63:
        longest += 1
    if not 1 <= order <= longest:
        raise ConfigError(f"the order must be 1 to {longest} with {tokenizer.vocab_size} tokens, got {order}")
    if prune[0] != 0 or list(prune) != sorted(prune):
        raise ConfigError(f"pruning counts must begin with 0 and must not fall, got {' '.join(map(str, prune))}")
    keys, text_counts = count_ngrams(token_blocks(texts, tokenizer), order, base)
    if not len(keys):
        raise ValueError(f"no text to train the n-gram model on in {', '.join(map(str, texts))}")
    orders = split_orders(keys, text_counts, order, base)
    estimate(orders, base, [*prune, *[prune[-1]] * order])
    for k, level in enumerate(orders[1:], 1):
        log.info("order %d: %d n-grams, %d kept", k, len(level.keys), level.kept.sum())
    return orders


class _WordTokens(dict[str, int]):
    """Word -> row of a table of token sequences, which grows with every new word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens, self._lens = array("q"), array("q")
        for mark, token in ((" " + END, tokenizer.vocab_size), (" " + BEGIN, tokenizer.vocab_size + 1)):
            self._add(mark, [token])

    def _add(self, word: str, tokens: list[int]) -> int:
        self._tokens.extend(tokens)
        self._lens.append(len(tokens))
        self[word] = len(self)
        return self[word]

    def __missing__(self, word: str) -> int:
        return self._add(word, self._tokenizer.encode(word))

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """Token ids of all words, one after the other."""
        rows = np.fromiter(map(self.__getitem__, words), np.int64, len(words))
        table, lens = np.array(self._tokens), np.array(self._lens)
        starts = (np.cumsum(lens) - lens)[rows]
        lens = lens[rows]
        ends = np.cumsum(lens)
        return table[np.repeat(starts - (ends - lens), lens) + np.arange(ends[-1])]


def token_blocks(texts: Iterable[str | Path], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the texts in arrays of token ids, V + 1 before and V after each sentence; no sentence is cut in two.

    Every distinct word is encoded once: tokens do not cross spaces.
    """
    cache, words = _WordTokens(tokenizer), []
    num_sentences = num_words = 0
    for path in texts:
        for number, line in enumerate(read_lines(path), 1):
            try:
                sentence = tokenizer.normalize(line.decode()).split()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not UTF-8 ({error}): convert it") from error
            if sentence:
                words += [" " + BEGIN, *sentence, " " + END]
                num_sentences += 1
                num_words += len(sentence)
            if len(words) > WORDS_PER_BLOCK:
                yield cache.encode(words)
                words = []
                if len(cache) > CACHED_WORDS:
                    cache = _WordTokens(tokenizer)
    if words:
        yield cache.encode(words)
    log.info("%d sentences, %d words", num_sentences, num_words)


def count_ngrams(blocks: Iterable[np.ndarray], order: int, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the n-grams that end at each token: `order` tokens, or all from <s> on, with zeros for what is missing.

    Blocks are sorted and counted one by one, then merged with those of about their size: memory is that of the distinct
    n-grams, and each is moved a logarithmic number of times.

    Returns:
      (A,) distinct keys, ascending, and (A,) their counts, both int64.
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens in blocks:
        parts.append(np.unique(_keys(tokens, order, base), return_counts=True))
        while len(parts) > 1 and len(parts[-2][0]) < 2 * len(parts[-1][0]):
            parts.append(_merge(parts.pop(), parts.pop()))
    while len(parts) > 1:
        parts.append(_merge(parts.pop(), parts.pop()))
    return parts[0] if parts else (np.empty(0, np.int64), np.empty(0, np.int64))


def _keys(tokens: np.ndarray, order: int, base: int) -> np.ndarray:
    keys, inside = tokens.copy(), tokens != base - 1
    for distance in range(1, order):
        earlier = np.zeros_like(tokens)
        earlier[distance:] = tokens[:-distance]
        earlier[~inside] = 0
        keys = keys * base + earlier
        inside &= earlier != base - 1
    return keys


def _merge(small: tuple[np.ndarray, np.ndarray], large: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    keys, counts = large
    places = np.searchsorted(keys, small[0])
    known = keys[np.minimum(places, len(keys) - 1)] == small[0]
    counts[places[known]] += small[1][known]
    return (
        np.insert(keys, places[~known], small[0][~known]),
        np.insert(counts, places[~known], small[1][~known]),
    )


def split_orders(keys: np.ndarray, text_counts: np.ndarray, order: int, base: int) -> list[NgramOrder]:
    """Orders 0 to `order` of the highest order's keys and counts; order 1 gets every token of the vocabulary."""
    orders, counts = [], text_counts
    for k in range(order, 0, -1):
        if k < order:
            lower = keys // base
            starts = np.flatnonzero(np.diff(lower, prepend=-1))
            whole = keys[starts] % base == 0  # it begins with <s>: nothing precedes it
            text_counts = np.add.reduceat(text_counts, starts)
            counts = np.where(whole, text_counts, np.diff(starts, append=len(keys)))
            keys = lower[starts]
        real = keys % base != 0  # not shorter than k
        orders.append(NgramOrder(keys[real], text_counts[real], counts[real]))
    unigrams = NgramOrder(np.arange(1, base), *np.zeros((2, base - 1), np.int64))
    unigrams.text_counts[orders[-1].keys - 1] = orders[-1].text_counts
    unigrams.counts[orders[-1].keys - 1] = orders[-1].counts
    unigrams.text_counts[-1] = unigrams.counts[-1] = 0  # <s> is never predicted
    count = np.ones(1, np.int64)
    return [NgramOrder(count * 0, count, count, probs=count / (base - 2)), unigrams, *orders[-2::-1]]


def estimate(orders: list[NgramOrder], base: int, prune: Sequence[int]) -> None:
    """Fill in probabilities and back-off weights, then take out the n-grams that the text has at most `prune` times.

    What an n-gram leaves behind goes to its context's back-off weight. The context and the suffix of an n-gram that is
    kept are kept too, because they are at least as frequent.
    """
    orders[-1].backoffs = np.ones(len(orders[-1].keys))
    for k, (lower, level) in enumerate(zip(orders, orders[1:], strict=False), 1):
        num_contexts = len(lower.keys)
        contexts = np.searchsorted(lower.keys, level.keys % base ** (k - 1))
        shorter = lower.probs[np.searchsorted(lower.keys, level.keys // base)]
        taken = discounts(level.counts)[np.minimum(level.counts, 3)]
        totals = np.bincount(contexts, level.counts, num_contexts)
        lower.backoffs = np.where(totals > 0, np.bincount(contexts, taken, num_contexts) / np.maximum(totals, 1), 1.0)
        level.probs = (level.counts - taken) / np.maximum(totals, 1)[contexts] + lower.backoffs[contexts] * shorter
        level.kept = (level.text_counts > prune[k - 1]) | (k == 1)
        if not level.kept.all():
            unseen = np.maximum(1.0 - np.bincount(contexts, shorter, num_contexts), 1e-12)
            free = unseen * lower.backoffs + np.bincount(contexts, level.probs * ~level.kept, num_contexts)
            lower.backoffs = free / (unseen + np.bincount(contexts, shorter * ~level.kept, num_contexts))
    orders[1].probs[-1] = 0.0  # of <s>


def discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts of counts of 0, 1, 2 and at least 3; FALLBACK_DISCOUNTS where few counts give no sound values."""
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if n.min() > 0:
        share = n[0] / (n[0] + 2 * n[1])
        estimated = np.array([j - (j + 1) * share * n[j] / n[j - 1] for j in (1, 2, 3)])
        if (estimated > 0).all() and (estimated <= [1, 2, 3]).all():
            return np.array([0.0, *estimated])
    return np.array([0.0, *FALLBACK_DISCOUNTS])


def write_arpa(orders: list[NgramOrder], tokenizer: Tokenizer, path: Path) -> None:
    """Write the n-grams that were kept, .gz packed; the same model gives the same bytes."""
    symbols = [tokenizer.id_to_symbol(token) for token in range(tokenizer.vocab_size)]
    names = np.array([*symbols, END, BEGIN], dtype=object)
    levels = [level for level in orders[1:] if level.kept.any()]
    with replacing(path) as temporary, ExitStack() as stack:
        file = stack.enter_context(open(temporary, "wb"))
        if path.suffix == ".gz":
            file = stack.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0))
        sizes = "".join(f"ngram {k}={level.kept.sum()}\n" for k, level in enumerate(levels, 1))
        file.write(f"\\data\\\n{sizes}".encode())
        for k, level in enumerate(levels, 1):
            file.write(f"\n\\{k}-grams:\n".encode())
            kept = np.flatnonzero(level.kept)
            for rows in np.split(kept, range(LINES_PER_BLOCK, len(kept), LINES_PER_BLOCK)):
                columns = [names[level.keys[rows] // len(names) ** place % len(names)] for place in range(k)]
                probs = np.log10(np.maximum(level.probs[rows], 1e-99)).tolist()
                weights = np.log10(level.backoffs[rows]).round(6).tolist()  # 0 where nothing follows
                lines = (
                    f"{prob:.6f}\t{' '.join(words)}" + (f"\t{weight:.6f}\n" if weight else "\n")
                    for prob, words, weight in zip(probs, zip(*columns, strict=True), weights, strict=True)
                )
                file.write("".join(lines).encode())
        file.write(b"\n\\end\\\n")
