"""`beam_numpy` compiled: the same functions of the same arrays, loops instead of whole-array steps.

float32 exponentials are a polynomial that the compiler vectorises, equal to the library's to about one unit in the last
place; float64 takes the library's.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba.extending import intrinsic, overload

from cascade.product_numba import Product as Product
from cascade.search.rows import Chains, Places

_BLOCK = 16
"""Continuations that are looked at together."""
_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first one times n has no rounding
_LOWEST = np.float32(-87.0)  # e to this is still a normal number
_TERMS = tuple(np.float32(1 / math.factorial(n)) for n in range(8))
_ONE, _HALF, _TWO = np.float32(1.0), np.float32(0.5), np.float32(2.0)

_kernel = numba.njit(cache=True, error_model="numpy")
# Sums may be reordered, which lets them be vectorised; logits are no nan.
_vector_kernel = numba.njit(cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "nnan", "contract", "arcp"})


@intrinsic
def _float_of_bits(typing_context, bits):
    """The float32 with these int32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(numba.types.float32))

    return numba.types.float32(numba.types.int32), generate


def _exp(x):
    """e^x for x <= 0."""
    return math.exp(x)


@overload(_exp, inline="always")
def _exp_of_type(x):
    if x != numba.types.float32:
        return lambda x: math.exp(x)

    def exp_float32(x):
        x = max(x, _LOWEST)
        n = np.int32(x * _LOG2_E - _HALF)  # the nearest whole number: conversion drops the fraction
        power = np.float32(n)
        r = x - power * _LN_2_HIGH - power * _LN_2_LOW  # |r| <= ln(2) / 2
        y = _TERMS[7]
        y = y * r + _TERMS[6]
        y = y * r + _TERMS[5]
        y = y * r + _TERMS[4]
        y = y * r + _TERMS[3]
        y = y * r + _HALF
        y = y * r + _ONE
        y = y * r + _ONE
        return y * _float_of_bits((n + np.int32(127)) << np.int32(23))

    return exp_float32


@_vector_kernel
def _tanh_of_sum(first, second, out):
    """tanh(a + b) = sign (1 - e) / (1 + e) with e = exp(-2 |a + b|)."""
    for d in range(len(out)):
        x = first[d] + second[d]
        e = _exp(-(abs(x) + abs(x)))
        one = first.dtype.type(1.0)
        y = (one - e) / (one + e)
        out[d] = y if x >= 0 else -y


@_kernel
def join_rows(frame, slot_out, rows, places, joined, hidden):
    """See beam_numpy.join_rows."""
    num_rows = 0
    for n in range(joined.shape[0]):
        log_probs, slots = places.log_probs[rows[n]], places.slots[rows[n]]
        for b in range(joined.shape[1]):
            joined[n, b] = 0
            if log_probs[b] == -np.inf:
                continue
            row = -1
            for other in range(b):
                if slots[other] == slots[b] and log_probs[other] > -np.inf:
                    row = joined[n, other]
                    break
            if row < 0:
                row = num_rows
                num_rows += 1
                _tanh_of_sum(frame[n], slot_out[slots[b]], hidden[row])
            joined[n, b] = row
    return num_rows


@_vector_kernel
def _highest(values):
    highest = values[0]
    for k in range(1, len(values)):
        highest = max(highest, values[k])
    return highest


@_vector_kernel
def _sum_of_exp(logits, highest):
    """Of all but the blank."""
    total = _exp(logits[1] - highest)
    for k in range(2, len(logits)):
        total += _exp(logits[k] - highest)
    return total


@_kernel
def _log_add(first, second):
    high, low = max(first, second), min(first, second)
    return high if low == -np.inf else high + math.log1p(math.exp(low - high))


@_kernel
def log_sums(logits, silent, sums, label_sums):
    """See beam_numpy.log_sums."""
    for r in range(logits.shape[0]):
        row = logits[r]
        if silent >= 0:
            said = row[silent]
            row[silent] = -np.inf
        highest = _highest(row[1:])
        label_sums[r] = highest + math.log(_sum_of_exp(row, highest))
        sums[r] = _log_add(label_sums[r], row[0])
        if silent >= 0:
            row[silent] = said
            sums[r] = _log_add(sums[r], said)


@_kernel
def weigh(scores, blank_weight, logits, sums, label_sums, joined, live, silent, values, value_rows):
    """See beam_numpy.weigh."""
    count = 0
    for n in range(joined.shape[0]):
        for b in range(joined.shape[1]):
            value_rows[n, b] = 0
            if not live[n, b]:
                continue
            row = joined[n, b]
            shift = logits.dtype.type(sums[row])
            added = logits.dtype.type(blank_weight * (label_sums[row] - sums[row]))
            for k in range(logits.shape[1]):
                values[count, k] = logits[row, k] - shift + added + scores[count, k]
            factor = logits.dtype.type(1.0 + blank_weight)
            values[count, 0] = (logits[row, 0] - shift) * factor
            if silent >= 0:
                values[count, silent] = (logits[row, silent] - shift) * factor
            value_rows[n, b] = count
            count += 1


@_kernel
def say(scores, blank_weight, logits, sums, said, silent, symbols, log_probs, totals):
    """See beam_numpy.say."""
    for row in range(len(sums)):
        log_probs[row] = logits[row, symbols[row]] - sums[row]
        totals[row] = (1.0 + blank_weight) * log_probs[row]
    for place in range(len(said)):
        row, label = said[place], 1
        best = -logits.dtype.type(np.inf)
        for k in range(1, logits.shape[1]):
            total = logits[row, k] + scores[place, k]
            if total > best and k != silent:
                best, label = total, k
        blank_prob = math.exp(logits[row, 0] - sums[row])
        if silent > 0:
            blank_prob += math.exp(logits[row, silent] - sums[row])
        symbols[row], log_probs[row] = label, logits[row, label] - sums[row]
        totals[row] = log_probs[row] + (blank_weight * math.log1p(-blank_prob) + scores[place, label])


@_kernel
def _best(values, shifts, value_rows, base, best, parents, symbols):
    """The best B continuations of one stream, best first; returns how many there are.

    Of equal ones, that of the hypothesis in the better place comes first, then the lower symbol: strict comparisons.
    """
    beam, count, worst = len(best), 0, -np.inf
    for b in range(beam):
        if base[b] == -np.inf:
            continue
        row, shift, num_symbols = values[value_rows[b]], shifts[value_rows[b]], values.shape[1]
        for start in range(0, num_symbols, _BLOCK):
            end = min(start + _BLOCK, num_symbols)
            if not base[b] + (_highest(row[start:end]) - shift) > worst:  # most blocks hold nothing of interest
                continue
            for k in range(start, end):
                total = base[b] + (row[k] - shift)
                if total > worst:
                    count = min(count + 1, beam)
                    i = count - 1
                    while i > 0 and best[i - 1] < total:
                        best[i], parents[i], symbols[i] = best[i - 1], parents[i - 1], symbols[i - 1]
                        i -= 1
                    best[i], parents[i], symbols[i] = total, b, k
                    if count == beam:
                        worst = best[beam - 1]
    return count


@_kernel
def _same_tokens(first, second, chains):
    while first != second:
        if chains.token[first] != chains.token[second]:
            return False
        first, second = chains.before[first], chains.before[second]
    return True


@_kernel
def _merge(new, count, grows, chains):
    """Add up equal token sequences among the first `count` places of one stream; the best stays."""
    for i in range(count):
        if new.log_probs[i] == -np.inf:
            continue
        merged, acoustic = 0.0, 0.0
        for j in range(i + 1, count):
            if (
                new.log_probs[j] > -np.inf
                and new.hashes[j] == new.hashes[i]
                and new.num_tokens[j] == new.num_tokens[i]
                and _same_tokens(new.ends[i], new.ends[j], chains)
            ):
                merged += math.exp(new.log_probs[j] - new.log_probs[i])
                acoustic += math.exp(new.acoustic[j] - new.acoustic[i])
                new.log_probs[j] = -np.inf
                if grows[i] and not grows[j]:  # it said nothing now: what the predictor says is known
                    grows[i], new.slots[i] = False, new.slots[j]
                grows[j] = False
        if merged > 0.0:
            new.log_probs[i] += math.log1p(merged)
            new.acoustic[i] += math.log1p(acoustic)


@_kernel
def choose(
    values, shifts, value_rows, logits, sums, joined, rows, places, chains, count, numbers, silent, multiplier,
    parents, symbols, grows,
):  # fmt: skip
    """See beam_numpy.choose."""
    beam = joined.shape[1]
    floats, whole = np.empty((2, beam)), np.empty((4, beam), np.int64)
    new, best = Places(floats[0], floats[1], whole[0], whole[1], whole[2], whole[3]), np.empty(beam)
    for n in range(len(rows)):
        row = rows[n]
        num_best = _best(values, shifts, value_rows[n], places.log_probs[row], best, parents[n], symbols[n])
        for i in range(num_best):
            b, symbol = parents[n, i], symbols[n, i]
            log_prob = logits[joined[n, b], symbol] - sums[joined[n, b]]
            new.log_probs[i], new.acoustic[i] = best[i], places.acoustic[row, b] + log_prob
            new.hashes[i], new.num_tokens[i] = places.hashes[row, b], places.num_tokens[row, b]
            new.ends[i], new.slots[i] = places.ends[row, b], places.slots[row, b]
            grows[n, i] = symbol != 0 and symbol != silent
            if grows[n, i]:
                chains.before[count], chains.token[count] = new.ends[i], symbol
                chains.frame[count], chains.log_prob[count] = numbers[n], log_prob
                new.hashes[i] = new.hashes[i] * multiplier + symbol
                new.num_tokens[i] += 1
                new.ends[i] = count
                count += 1
            else:
                symbols[n, i] = 0
        _merge(new, num_best, grows[n], chains)
        places.log_probs[row] = -np.inf
        for i in range(num_best):
            places.log_probs[row, i], places.acoustic[row, i] = new.log_probs[i], new.acoustic[i]
            places.hashes[row, i], places.num_tokens[row, i] = new.hashes[i], new.num_tokens[i]
            places.ends[row, i], places.slots[row, i] = new.ends[i], new.slots[i]
        parents[n, num_best:], symbols[n, num_best:], grows[n, num_best:] = 0, 0, False
    return count


def compile_kernels(dtype: np.dtype) -> None:
    """Compile, or load what an earlier process compiled, so that no stream waits for it."""
    zero, sums, values = np.zeros((1, 1), np.int64), np.zeros(1), np.zeros((1, 2), dtype)
    places = Places(np.zeros((1, 1)), np.zeros((1, 1)), zero, zero.copy(), zero - 1, zero.copy())
    chains, grows = Chains(*(np.zeros(1, np.int64) for _ in range(3)), sums), np.zeros((1, 1), bool)
    join_rows(values, values, zero[0], places, zero.copy(), values.copy())
    log_sums(values, -1, sums, sums.copy())
    Product(values, values[0, :1])(values)
    weigh(values, 0.0, values, sums, sums, zero, grows, -1, values.copy(), zero.copy())
    say(values, 0.0, values, sums, zero[0], -1, zero[0].copy(), sums.copy(), sums.copy())
    choose(values, sums, zero, values, sums, zero, zero[0], places, chains, 0, zero[0], -1, 1, zero.copy(), zero.copy(),
           grows)  # fmt: skip
