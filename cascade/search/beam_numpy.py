"""What a frame of a search does beside the matrix product, in plain numpy: the reference of `beam_numba`.

N streams have the rows (N,) of a store with B places each; see `rows.Places` and `rows.Chains`.
"""

from __future__ import annotations

import math

import numpy as np

from cascade.product import Product as Product
from cascade.search.rows import Chains, Places


def join_rows(
    frame: np.ndarray, slot_out: np.ndarray, rows: np.ndarray, places: Places, joined: np.ndarray, hidden: np.ndarray
) -> int:
    """Write tanh(encoder + predictor) of the different (stream, slot) into `hidden`.

    Args:
      frame: (N, D) encoder output; slot_out: (S, D) of the predictor.
      joined: (N, B) gets the row of `hidden` for each live place, 0 for the others.
    Returns:
      how many rows there are.
    """
    live = places.log_probs[rows] > -np.inf
    streams = np.broadcast_to(np.arange(len(rows))[:, None], live.shape)[live]
    keys, joined_live = np.unique(streams * len(slot_out) + places.slots[rows][live], return_inverse=True)
    joined[...] = 0
    joined[live] = joined_live
    out = hidden[: len(keys)]
    np.add(frame[keys // len(slot_out)], slot_out[keys % len(slot_out)], out=out)
    np.tanh(out, out=out)
    return len(keys)


def log_sums(logits: np.ndarray, silent: int, sums: np.ndarray, label_sums: np.ndarray) -> None:
    """Write the log-sum-exp (R,) of (R, V) logits: over all symbols, and over labels alone.

    silent: a symbol that counts as blank, -1: none.
    """
    blanks = [0] if silent < 0 else [0, silent]
    label_sums[...] = sums[...] = label_log_sums(logits, blanks)
    for blank in blanks:
        sums[...] = np.logaddexp(sums, logits[:, blank])


def weigh(
    scores: np.ndarray, blank_weight: float, logits: np.ndarray, sums: np.ndarray, label_sums: np.ndarray,
    joined: np.ndarray, live: np.ndarray, silent: int, values: np.ndarray, value_rows: np.ndarray,
) -> None:  # fmt: skip
    """Write what `choose` ranks continuations by where scorers have a say.

    Args:
      scores: (L, V) of the L live places. blank_weight: see `scorer`.
      logits, sums, label_sums, joined: see `log_sums` and `choose`.
      live: (N, B) places with a hypothesis.
      values: (L, V), written; value_rows: (N, B), written: the row of each live place.
    """
    shared = joined[live]
    np.subtract(logits[shared], sums[shared, None].astype(logits.dtype), out=values)
    blanks = [0] if silent < 0 else [0, silent]
    blank_values = values[:, blanks] * values.dtype.type(1.0 + blank_weight)
    values += (blank_weight * (label_sums - sums)[shared, None]).astype(logits.dtype)
    values += scores
    values[:, blanks] = blank_values
    value_rows[...] = 0
    value_rows[live] = np.arange(len(values))


def say(
    scores: np.ndarray, blank_weight: float, logits: np.ndarray, sums: np.ndarray, said: np.ndarray, silent: int,
    symbols: np.ndarray, log_probs: np.ndarray, totals: np.ndarray,
) -> None:  # fmt: skip
    """What greedy search says where scorers have a say.

    Args:
      scores: (K, V) of the K rows of the logits (R, V) that say a label, `said`.
      blank_weight, sums, silent: see `weigh`.
      symbols: (R,), those of `said` are written.
      log_probs, totals: (R,), written: the transducer's log-probability, and the same with what scorers add.
    """
    ranked = logits[said] + scores
    ranked[:, 0] = ranked[:, silent] = -np.inf
    labels = symbols[said] = ranked.argmax(axis=1)
    log_probs[...] = logits[np.arange(len(logits)), symbols] - sums
    totals[...] = (1.0 + blank_weight) * log_probs
    blank_probs = np.exp(logits[said, 0] - sums[said])  # with <unk> at most 2/3, because a label is likelier
    if silent > 0:
        blank_probs += np.exp(logits[said, silent] - sums[said])
    added = blank_weight * np.log1p(-blank_probs) + scores[np.arange(len(said)), labels]
    totals[said] = log_probs[said] + added


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """(R, V) -> (R,) float64."""
    highest = logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits - highest).sum(axis=1)).astype(np.float64) + highest[:, 0]


def label_log_sums(logits: np.ndarray, blanks: list[int]) -> np.ndarray:
    """(R, V) -> (R,) float64 log-sum-exp of the labels alone."""
    labels = logits.copy()
    labels[:, blanks] = -np.inf
    return log_sum_exp(labels)


def choose(
    values: np.ndarray, shifts: np.ndarray, value_rows: np.ndarray, logits: np.ndarray, sums: np.ndarray,
    joined: np.ndarray, rows: np.ndarray, places: Places, chains: Chains, count: int, numbers: np.ndarray, silent: int,
    multiplier: int, parents: np.ndarray, symbols: np.ndarray, grows: np.ndarray,
) -> int:  # fmt: skip
    """Replace the hypotheses by the best B of each stream's B * V continuations, equal token sequences added up.

    Args:
      values, shifts, value_rows: what they are ranked by: log P of a symbol is values[value_rows[n, b]] less the row's
        shift, with (N, B) value_rows, (R, V) values and (R,) shifts.
      logits, sums, joined: the same of the transducer alone.
      chains: with `count` entries in use.
      numbers: (N,) the number of this frame in each stream.
      silent: a symbol that counts as blank, -1: none. multiplier: of the rolling hash over tokens.
      parents, symbols, grows: (N, B), written: the place a hypothesis comes from, its symbol now (0: none), and whether
        its slot must follow: places.slots is the parent's where it must, its own elsewhere.
    Returns:
      entries in use.
    """
    (num_streams, beam), num_symbols = joined.shape, values.shape[1]
    old = Places(*(array[rows] for array in places))
    totals = old.log_probs[:, :, None] + (values[value_rows] - shifts[value_rows][:, :, None])
    best, index = _best(totals.reshape(num_streams, -1), beam)
    parents[...], symbols[...] = np.divmod(index, num_symbols)
    joined = np.take_along_axis(joined, parents, axis=1)
    log_probs = logits[joined, symbols] - sums[joined]
    symbols[(symbols == silent) | (best == -np.inf)] = 0
    grows[...] = symbols != 0
    new = Places(*(np.take_along_axis(array, parents, axis=1) for array in old))
    new.log_probs[...] = best
    new.acoustic[...] += log_probs
    new.hashes[grows] = new.hashes[grows] * multiplier + symbols[grows]
    new.num_tokens[...] += grows
    entries = np.arange(count, count + np.count_nonzero(grows))
    streams = np.nonzero(grows)[0]
    fields = (new.ends[grows], symbols[grows], numbers[streams], log_probs[grows])
    for array, entered in zip(chains, fields, strict=True):
        array[entries] = entered
    new.ends[grows] = entries
    _merge(new, grows, chains)
    for array, values in zip(places, new, strict=True):
        array[rows] = values
    return count + len(entries)


def _best(totals: np.ndarray, beam: int) -> tuple[np.ndarray, np.ndarray]:
    """The best of each row of (N, W): values and indices (N, B), best first, of equal ones the lowest index; -inf and 0
    where there are fewer."""
    num_streams, width = totals.shape
    wanted = min(beam, width)
    lowest = np.partition(totals, width - wanted, axis=1)[:, width - wanted, None]
    streams, index = np.nonzero((totals >= lowest) & (totals > -np.inf))
    order = np.lexsort((-totals[streams, index], streams))  # stable: of equal ones the lowest index
    streams, index = streams[order], index[order]
    place = np.arange(len(streams)) - np.searchsorted(streams, streams)
    streams, index, place = (array[place < beam] for array in (streams, index, place))
    best, indices = np.full((num_streams, beam), -np.inf), np.zeros((num_streams, beam), np.int64)
    best[streams, place], indices[streams, place] = totals[streams, index], index
    return best, indices


def _merge(new: Places, grows: np.ndarray, chains: Chains) -> None:
    """Add up equal token sequences: the best of them stays, with its own timestamps, the others' places are free."""
    live = new.log_probs > -np.inf
    equal = (new.hashes[:, :, None] == new.hashes[:, None, :]) & live[:, :, None] & live[:, None, :]
    equal &= new.num_tokens[:, :, None] == new.num_tokens[:, None, :]
    sums: dict[tuple[int, int], list[float]] = {}
    for n, i, j in zip(*(axis.tolist() for axis in np.nonzero(np.triu(equal, 1))), strict=True):
        if not (live[n, i] and live[n, j] and _same_tokens(new.ends.item(n, i), new.ends.item(n, j), chains)):
            continue
        merged = sums.setdefault((n, i), [0.0, 0.0])
        for k, array in enumerate((new.log_probs, new.acoustic)):
            merged[k] += math.exp(array[n, j] - array[n, i])
        live[n, j], new.log_probs[n, j] = False, -np.inf
        if grows[n, i] and not grows[n, j]:  # it said nothing now: what the predictor says is known
            grows[n, i], new.slots[n, i] = False, new.slots[n, j]
    for (n, i), merged in sums.items():
        new.log_probs[n, i] += math.log1p(merged[0])
        new.acoustic[n, i] += math.log1p(merged[1])
    grows &= live


def _same_tokens(first: int, second: int, chains: Chains) -> bool:
    """Whether two chains of the same length say the same."""
    while first != second:
        if chains.token[first] != chains.token[second]:
            return False
        first, second = chains.before.item(first), chains.before.item(second)
    return True
