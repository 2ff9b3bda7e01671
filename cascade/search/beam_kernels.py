"""The compiled part of modified beam search on the CPU: what a frame does beside the matrix products.

Arrays have N streams of B places. See beam_numba.py for the shape of the whole.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np

from cascade.search.hypothesis import FRAME, LOG_PROB, TOKEN

_BLOCK = 16
"""Continuations that are looked at together."""


class Places(NamedTuple):
    """The B places of N streams, arrays of (N, B)."""

    log_probs: np.ndarray
    """float64; -inf: no hypothesis in this place."""
    hashes: np.ndarray
    num_tokens: np.ndarray
    ends: np.ndarray
    """The last entry; -1 - i: row i of the old history, nothing said since."""
    slots: np.ndarray


class Entries(NamedTuple):
    """Tokens said since the start, a tree: several hypotheses may go on from one entry."""

    before: np.ndarray
    token: np.ndarray
    frame: np.ndarray
    log_prob: np.ndarray


class Slots(NamedTuple):
    """A hash table of what the predictor said: S slots, keys of K labels, open addressing."""

    keys: np.ndarray
    """(S, K) int64"""
    index: np.ndarray
    """(P,) slot or -1; P is a power of two above 2 S."""
    parents: np.ndarray
    """(S,) the slot whose predictor state leads here"""
    labels: np.ndarray
    """(S,) by this label."""


_kernel = numba.njit(cache=True)


@_kernel
def _same_tokens(first, second, num_tokens, entries, old_tokens):
    """Compare two chains of `num_tokens` tokens that end in these entries."""
    while num_tokens > 0 and first != second:
        num_tokens -= 1
        if first >= 0:
            token, first = entries.token[first], entries.before[first]
        else:
            token = np.int64(old_tokens[-1 - first, num_tokens])
        if second >= 0:
            other, second = entries.token[second], entries.before[second]
        else:
            other = np.int64(old_tokens[-1 - second, num_tokens])
        if token != other:
            return False
    return True


@_kernel
def _find_slot(table, key, num_slots):
    """The slot of this key (K,); a new one, number num_slots, where there is none yet."""
    mixed = np.uint64(1469598103934665603)
    for label in key:
        mixed = (mixed ^ np.uint64(label)) * np.uint64(1099511628211)
        mixed ^= mixed >> np.uint64(29)
    mask = table.index.shape[0] - 1
    place = np.int64(mixed & np.uint64(mask))
    while True:
        slot = table.index[place]
        if slot < 0:
            table.index[place] = num_slots
            table.keys[num_slots] = key
            return num_slots
        same = True
        for i in range(key.shape[0]):
            if table.keys[slot, i] != key[i]:
                same = False
                break
        if same:
            return slot
        place = (place + 1) & mask


@_kernel
def gather_rows(frame_out, slot_out, places, rows, hidden):
    """Write encoder + predictor, times two, of the different (stream, slot) into hidden; returns how many.

    frame_out: (N, D) one frame; slot_out: (S, D); rows: (N, B) gets the row of each live place.
    """
    num_streams, beam = rows.shape
    num_rows = 0
    for n in range(num_streams):
        for b in range(beam):
            if places.log_probs[n, b] == -np.inf:
                continue
            slot, row = places.slots[n, b], -1
            for other in range(b):
                if places.slots[n, other] == slot and places.log_probs[n, other] > -np.inf:
                    row = rows[n, other]
                    break
            if row < 0:
                row = num_rows
                num_rows += 1
                for d in range(frame_out.shape[1]):
                    total = frame_out[n, d] + slot_out[slot, d]
                    hidden[row, d] = total + total
            rows[n, b] = row
    return num_rows


@_kernel
def _select(log_softmax, places, rows, n, best, parents, symbols):
    """The best B continuations of stream n, best first, into best, parents and symbols; returns how many there are.

    Of equal ones, that of the hypothesis in the better place comes first, then the lower symbol: strict comparisons.
    """
    beam, count, worst = best.shape[0], 0, -np.inf
    for b in range(beam):
        base = places.log_probs[n, b]
        if base == -np.inf:
            continue
        values, num_symbols = log_softmax[rows[n, b]], log_softmax.shape[1]
        for start in range(0, num_symbols, _BLOCK):
            end = min(start + _BLOCK, num_symbols)
            highest = values[start]  # most blocks hold nothing of interest: a maximum is a vectorised pass
            for k in range(start + 1, end):
                highest = values[k] if values[k] > highest else highest
            if not base + highest > worst:
                continue
            for k in range(start, end):
                total = base + values[k]
                if total > worst:
                    if count < beam:
                        count += 1
                    i = count - 1
                    while i > 0 and best[i - 1] < total:
                        best[i], parents[i], symbols[i] = best[i - 1], parents[i - 1], symbols[i - 1]
                        i -= 1
                    best[i], parents[i], symbols[i] = total, b, k
                    if count == beam:
                        worst = best[beam - 1]
    return count


@_kernel
def _merge(new, count, grows, entries, old_tokens):
    """Add up equal token sequences among the first `count` places; the best stays, the others become -inf."""
    for i in range(count):
        if new.log_probs[i] == -np.inf:
            continue
        merged = 0.0
        for j in range(i + 1, count):
            if (
                new.log_probs[j] > -np.inf
                and new.hashes[j] == new.hashes[i]
                and new.num_tokens[j] == new.num_tokens[i]
                and _same_tokens(new.ends[i], new.ends[j], new.num_tokens[i], entries, old_tokens)
            ):
                merged += math.exp(new.log_probs[j] - new.log_probs[i])
                new.log_probs[j] = -np.inf
                if grows[i] and not grows[j]:  # it said nothing now: what the predictor says is known
                    grows[i], new.slots[i] = False, new.slots[j]
        if merged > 0.0:
            new.log_probs[i] += math.log1p(merged)


@_kernel
def advance_frame(log_softmax, rows, places, new, entries, table, counts, old_tokens, frames, by_context, unk, factor):
    """Take every stream through one frame.

    Args:
      log_softmax: (R, V) of the rows that gather_rows made.
      new: Places of one stream, arrays of (B,), room to work.
      counts: [entries, slots] in use; both grow. Slots from the old number on need the predictor.
      old_tokens: (N * B, U) tokens said before entries began.
      frames: (N,) the number of this frame in each stream.
      by_context: whether keys are the last labels; (slot, label) otherwise.
      unk: a symbol that counts as blank, -1: none. factor: of the rolling hash.
    """
    num_streams, beam = rows.shape
    best, parents = np.empty(beam), np.empty(beam, np.int64)
    symbols, grows = np.empty(beam, np.int64), np.empty(beam, np.bool_)
    width = table.keys.shape[1]
    key = np.empty(width, np.int64)
    for n in range(num_streams):
        count = _select(log_softmax, places, rows, n, best, parents, symbols)
        new.log_probs[:] = -np.inf
        for i in range(count):
            parent, symbol = parents[i], symbols[i]
            new.log_probs[i] = best[i]
            new.hashes[i], new.num_tokens[i] = places.hashes[n, parent], places.num_tokens[n, parent]
            new.ends[i], new.slots[i] = places.ends[n, parent], places.slots[n, parent]
            grows[i] = symbol != 0 and symbol != unk
            if grows[i]:
                entry = counts[0]
                counts[0] = entry + 1
                entries.before[entry], entries.token[entry] = new.ends[i], symbol
                entries.frame[entry], entries.log_prob[entry] = frames[n], log_softmax[rows[n, parent], symbol]
                new.hashes[i] = new.hashes[i] * factor + symbol
                new.num_tokens[i] += 1
                new.ends[i] = entry
        _merge(new, count, grows, entries, old_tokens)
        for i in range(count):
            if new.log_probs[i] > -np.inf and grows[i]:
                slot, symbol = new.slots[i], symbols[i]
                if by_context:
                    for k in range(width - 1):
                        key[k] = table.keys[slot, k + 1]
                else:
                    key[0] = slot
                key[width - 1] = symbol
                place = _find_slot(table, key, counts[1])
                if place == counts[1]:
                    table.parents[place], table.labels[place] = slot, symbol
                    counts[1] = place + 1
                new.slots[i] = place
        places.log_probs[n] = new.log_probs
        for i in range(count):
            places.hashes[n, i], places.num_tokens[n, i] = new.hashes[i], new.num_tokens[i]
            places.ends[n, i], places.slots[n, i] = new.ends[i], new.slots[i]


@_kernel
def write_history(places, entries, old, history):
    """Read the chains of the live places into history (N * B, 3, U), after the old (N * B, 3, U_old)."""
    num_streams, beam = places.ends.shape
    for n in range(num_streams):
        for b in range(beam):
            if places.log_probs[n, b] == -np.inf:
                continue
            end, count, row = places.ends[n, b], places.num_tokens[n, b], n * beam + b
            while end >= 0:
                count -= 1
                history[row, TOKEN, count] = entries.token[end]
                history[row, FRAME, count] = entries.frame[end]
                history[row, LOG_PROB, count] = entries.log_prob[end]
                end = entries.before[end]
            for i in range(count):
                for part in range(3):
                    history[row, part, i] = old[-1 - end, part, i]


@_kernel
def slots_of_rows(table, labels, live, slots):
    """Enter the labels (N * B, K) of the live rows into an empty table; returns the number of slots."""
    count = 0
    for row in live:
        slots[row] = _find_slot(table, labels[row], count)
        count = max(count, slots[row] + 1)
    return count
