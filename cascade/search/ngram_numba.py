"""What `ngram.NgramModel` does for every hypothesis, compiled: rows so cheap that none are kept.

What is read together lies together: most of the time is spent waiting for memory.
"""

from __future__ import annotations

import numba
import numpy as np

CONTEXT = np.dtype([("first", np.int64), ("link", np.int32), ("backoff", np.float32)])
"""`first`: its first arc; the next record has the one behind its last. `link`: the state to which it backs off."""
ARC = np.dtype([("token", np.int32), ("log_prob", np.float32)])

_LOOK_BACK = 32
"""Rows among which equal states are looked for: hypotheses of one stream are often in the same."""

_kernel = numba.njit(cache=True, error_model="numpy")


def records(kind: np.dtype, *fields: np.ndarray) -> np.ndarray:
    """CONTEXT or ARC records of these arrays."""
    values = np.empty(len(fields[0]), kind)
    for name, array in zip(kind.names, fields, strict=True):
        values[name] = array
    return values


@_kernel
def _copy(source, target):
    for k in range(len(target)):
        target[k] = source[k]


@_kernel
def _add(value, target):
    for k in range(len(target)):
        target[k] += value


@_kernel
def _scale(factor, target):
    for k in range(len(target)):
        target[k] *= factor


@_kernel
def dense(states, contexts, arcs, width, weight):
    """See NgramModel._rows."""
    scores, shortest = np.empty((len(states), width), np.float32), np.zeros(width, np.float32)
    for arc in range(min(width - 1, contexts[1].first)):  # the empty context has all tokens
        shortest[arc + 1] = arcs[arc].log_prob
    chain = np.empty(8, np.int64)
    for row in range(len(states)):
        values, state, depth = scores[row], states[row], 0
        equal = row - 1
        while equal >= max(row - _LOOK_BACK, 0) and states[equal] != state:
            equal -= 1
        if equal >= max(row - _LOOK_BACK, 0):
            _copy(scores[equal], values)
            continue
        while state:
            if depth == len(chain):
                chain = np.append(chain, chain)
            chain[depth] = state
            state = contexts[state].link
            depth += 1
        _copy(shortest, values)
        for place in range(depth - 1, -1, -1):
            state = chain[place]
            _add(contexts[state].backoff, values)
            for arc in range(contexts[state].first, contexts[state + 1].first):
                if arcs[arc].token >= width:
                    break
                values[arcs[arc].token] = arcs[arc].log_prob
        _scale(np.float32(weight), values)
        values[0] = 0.0
    return scores


@_kernel
def advance(states, tokens, contexts, arcs, following, silent):
    """See NgramModel.advance."""
    after = states.copy()
    for row in range(len(states)):
        state, token = states[row], tokens[row]
        while token > silent:
            low, end = contexts[state].first, contexts[state + 1].first
            high = end
            while low < high:
                middle = (low + high) // 2
                if arcs[middle].token < token:
                    low = middle + 1
                else:
                    high = middle
            if low < end and arcs[low].token == token:
                after[row] = following[low]
                break
            state = contexts[state].link
    return after


def compile_kernels() -> None:
    """Compile, or load what an earlier process compiled, so that no stream waits for it."""
    zero = np.zeros(1, np.int64)
    contexts, arcs = records(CONTEXT, np.array([0, 1]), [0, 0], [0, 0]), records(ARC, [1], [0])
    dense(zero, contexts, arcs, 2, 1.0)
    advance(zero, zero + 1, contexts, arcs, np.zeros(1, np.int32), 0)
