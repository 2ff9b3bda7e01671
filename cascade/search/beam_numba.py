"""Modified beam search on the CPU: matrix products and predictor by torch, everything else by compiled kernels.

Same search and same results as the torch code of modified_beam_search.py, in a fraction of its time:

- A hypothesis is a chain of entries (token, frame, log-prob, the entry before), so that keeping it copies nothing.
- What the predictor said is kept in slots. A slot belongs to the predictor's context (its last labels), or for a
  recurrent predictor to (the slot before, the label), and is looked up before the predictor is run.
- Hypotheses of a stream that share a slot share a row of the joiner; places without a hypothesis have none.

Everything is exact: slots and merges compare labels, hashes only find the candidates.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cascade.models.predictor import ContextPredictor, LstmState
from cascade.models.state import map_state, select_streams, state_tensors
from cascade.search.beam_kernels import (
    Entries,
    Places,
    Slots,
    advance_frame,
    gather_rows,
    slots_of_rows,
    write_history,
)
from cascade.search.hypothesis import TOKEN

_MAX_SLOTS = 4096
"""Slots kept besides those in use: 8 MB at D = 512. When they are full, those not in use are forgotten."""


class _Block:
    """N streams with B hypotheses on their way through frames that all of them have.

    Args:
      search: the ModifiedBeamSearch.
      state: its BeamState.
      num_frames: T of the frames to come.
      factor: of the rolling hash.
    """

    def __init__(self, search, state, num_frames: int, factor: int) -> None:
        self.search, self.state, self.factor = search, state, factor
        num_streams, beam = state.log_probs.shape
        size = num_streams * beam
        self.places = Places(
            state.log_probs.double().numpy().copy(), state.hashes.numpy().copy(),
            state.num_tokens.numpy().copy(), -1 - np.arange(size).reshape(num_streams, beam),
            np.zeros((num_streams, beam), np.int64),
        )
        capacity = size * num_frames
        self.entries = Entries(*(np.empty(capacity, np.int64) for _ in range(3)), np.empty(capacity))
        self.old = state.history.flatten(0, 1).contiguous().numpy()
        self.old_tokens = np.ascontiguousarray(self.old[:, TOKEN])
        self.counts = np.zeros(2, np.int64)
        self.by_context = isinstance(search.predictor, ContextPredictor)
        self.num_slots = min(size * (num_frames + 1), _MAX_SLOTS + 2 * size)
        flat = map_state(lambda tensor: tensor.flatten(0, 1), state.predictor_state)
        self._make_slots(state.predictor_out.flatten(0, 1), flat)

    def _make_slots(self, row_out: Tensor, row_states: NamedTuple) -> None:
        """A new table with what the N * B rows need."""
        size, num_slots = row_out.shape[0], self.num_slots
        self.slot_out = row_out.new_empty(num_slots, row_out.shape[1])
        self.slot_states = map_state(lambda tensor: tensor.new_empty(num_slots, *tensor.shape[1:]), row_states)
        labels = row_states.labels.contiguous().numpy() if self.by_context else np.zeros((size, 2), np.int64)
        index = np.full(1 << (2 * num_slots).bit_length(), -1, np.int64)
        self.table = Slots(
            np.zeros((num_slots, labels.shape[1]), np.int64), index,
            np.zeros(num_slots, np.int64), np.zeros(num_slots, np.int64),
        )
        live = np.flatnonzero(self.places.log_probs.reshape(-1) > -np.inf)
        slots, kept, count = self.places.slots.reshape(-1), [], 0
        slots[:] = 0
        if self.by_context:
            count = slots_of_rows(self.table, labels, live, slots)
            kept = np.zeros(count, np.int64)
            kept[slots[live]] = live
        else:
            slots[live], kept, count = np.arange(len(live)), live, len(live)
        self.counts[1] = count
        kept = torch.from_numpy(np.asarray(kept, np.int64))
        self.slot_out[:count] = row_out.index_select(0, kept)
        for tensor, values in zip(state_tensors(self.slot_states), state_tensors(row_states), strict=True):
            tensor[:count] = values.index_select(0, kept)
        if self.by_context:  # the keys are the states
            self.slot_states = type(row_states)(torch.from_numpy(self.table.keys))

    def rows(self) -> tuple[Tensor, NamedTuple]:
        """Output of the predictor after each of the N * B hypotheses, and its states."""
        slots = torch.from_numpy(self.places.slots.reshape(-1))
        return self.slot_out.index_select(0, slots), select_streams(self.slot_states, slots)

    def run(self, encoder_out: Tensor) -> None:
        """Search through frames (N, T, D)."""
        search, places = self.search, self.places
        num_streams, num_frames, dim = encoder_out.shape
        size = num_streams * search.beam
        hidden = encoder_out.new_empty(size, dim)
        logits = encoder_out.new_empty(2, size, search.num_symbols)
        rows = np.zeros((num_streams, search.beam), np.int64)
        new = Places(np.empty(search.beam), *(np.empty(search.beam, np.int64) for _ in range(4)))
        frames, first = encoder_out.transpose(0, 1).contiguous().numpy(), self.state.num_frames.numpy()
        weight, bias = search.weight[: search.num_symbols].t(), search.bias[: search.num_symbols]
        unk = -1 if search.unk_id is None else search.unk_id
        hidden_rows = hidden.numpy()
        for frame in range(num_frames):
            num_rows = gather_rows(frames[frame], self.slot_out.numpy(), places, rows, hidden_rows)
            inputs = hidden[:num_rows].sigmoid_().mul_(2.0).sub_(1.0)  # tanh, see tanh_of_sum
            torch.addmm(bias, inputs, weight, out=logits[0, :num_rows])
            torch.log_softmax(logits[0, :num_rows], dim=-1, out=logits[1, :num_rows])
            if self.counts[1] + size > self.num_slots:
                self._make_slots(*self.rows())
            start = int(self.counts[1])
            advance_frame(
                logits[1].numpy(), rows, places, new, self.entries, self.table, self.counts, self.old_tokens,
                first + frame, self.by_context, unk, self.factor,
            )
            self._predict(start, int(self.counts[1]))

    def _predict(self, start: int, end: int) -> None:
        """Run the predictor for the slots from start to end."""
        if start == end:
            return
        if self.by_context:
            self.slot_out[start:end] = self.search.predictor.forward_context(self.slot_states.labels[start:end])
            return
        parents = torch.from_numpy(self.table.parents[start:end])
        labels = torch.from_numpy(self.table.labels[start:end])
        out, states = self.search.predictor.step(labels, select_streams(self.slot_states, parents))
        self.slot_out[start:end] = out
        for tensor, values in zip(state_tensors(self.slot_states), state_tensors(states), strict=True):
            tensor[start:end] = values

    def fields(self) -> dict[str, Tensor | NamedTuple]:
        """The fields of the new BeamState that this block knows; log_probs (N, B) float64 without the offset."""
        places, shape = self.places, self.places.slots.shape
        places.num_tokens[places.log_probs == -np.inf] = 0
        history = np.zeros((shape[0] * shape[1], 3, int(places.num_tokens.max())))
        write_history(places, self.entries, self.old, history)
        predictor_out, states = self.rows()
        return {
            "log_probs": torch.from_numpy(places.log_probs),
            "hashes": torch.from_numpy(places.hashes),
            "num_tokens": torch.from_numpy(places.num_tokens),
            "history": torch.from_numpy(history).unflatten(0, shape),
            "predictor_out": predictor_out.unflatten(0, shape),
            "predictor_state": map_state(lambda tensor: tensor.unflatten(0, shape), states),
        }


def advance(search, state, encoder_out: Tensor, factor: int) -> dict[str, Tensor | NamedTuple]:
    """Search through frames (N, T, D) that all N streams have: what `_advance_in_torch` does.

    Args:
      search: the ModifiedBeamSearch; state: its BeamState. factor: of the rolling hash over tokens.
    Returns:
      the fields of the new BeamState, log_probs (N, B) without the offset.
    """
    block = _Block(search, state, encoder_out.shape[1], factor)
    block.run(encoder_out)
    return block.fields()


def compile_kernels(dtype: torch.dtype) -> None:
    """Compile, or load what an earlier process compiled, so that no stream waits for it."""

    def step(labels: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        return torch.zeros(len(labels), 1, dtype=dtype), state

    ones, zeros = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64)
    search = SimpleNamespace(
        beam=1, num_symbols=2, weight=torch.tensor([[0.0], [1.0]], dtype=dtype), bias=torch.zeros(2, dtype=dtype),
        unk_id=None, predictor=SimpleNamespace(step=step),
    )
    state = SimpleNamespace(
        log_probs=ones[0] * 0, hashes=zeros, num_tokens=zeros, num_frames=zeros[0], predictor_out=ones,
        history=torch.zeros(1, 1, 3, 0, dtype=torch.float64), predictor_state=LstmState(ones, ones),
    )
    advance(search, state, ones, 1)
    table = Slots(zeros.numpy().copy(), np.full(2, -1), zeros.numpy()[0], zeros.numpy()[0])
    slots_of_rows(table, zeros.numpy(), np.zeros(1, np.int64), np.zeros(1, np.int64))
