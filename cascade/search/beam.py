"""Modified beam search: at most one symbol per frame, equal token sequences merged; utterances and hypotheses batched.

All B hypotheses of all N streams are rows of one tensor. At every frame the search takes the best B of the B * V
continuations of each stream, then adds up (log-add) the probabilities of those that are the same token sequence,
reached by saying the last token earlier or later: the order of sherpa-onnx and icefall. Resumable like `GreedySearch`.
Of equal scores, the continuation of the hypothesis in the better place wins, then the lower symbol, so blank first; of
equal sequences and of equal final scores, the one in the better place. (What is equal in exact arithmetic may differ by
rounding: the torch code adds in the model's precision, the compiled one in float64.)
The torch code here runs on any device; on the CPU `beam_numba` does the same in a fraction of the time.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.models.state import map_state, select_streams
from cascade.search.hypothesis import (
    FRAME,
    LOG_PROB,
    TOKEN,
    Hypothesis,
    check_encoder_out,
    grow_history,
    hypothesis_from_history,
    join_search_states,
    predictor_context_size,
    tanh_of_sum,
)

_HASH_MULTIPLIER = 6364136223846793005
"""Of the rolling 64-bit hash over a token sequence. Equal hashes are only candidates: tokens are compared too."""
_BLOCK = 16
"""Continuations are pre-selected by the best of each block of 16; V is padded to a multiple of it."""
_HISTORY_STEP = 16
"""Frames between two enlargements of the history."""
BACKENDS = ("auto", "torch", "numba")


@cache
def _numba_module(dtype: torch.dtype) -> ModuleType | None:
    """beam_numba, compiled, or None (with one warning) where numba is missing or cannot compile."""
    try:
        from cascade.search import beam_numba

        beam_numba.compile_kernels(dtype)
        return beam_numba
    except ImportError:
        logging.getLogger(__name__).warning("numba is not installed: beam search uses plain torch, which is slower")
    except Exception as error:  # a compiler can fail in many ways; torch gives the same hypotheses
        logging.getLogger(__name__).warning("numba failed (%s): beam search uses plain torch, which is slower", error)
    return None


class BeamState(NamedTuple):
    """State of a beam search over N streams with B hypotheses; every tensor has the stream first."""

    log_probs: Tensor
    """(N, B) float32 log-probabilities relative to log_prob_offset; -inf: no hypothesis in this place."""
    log_prob_offset: Tensor
    """(N,) float64, so that float32 stays exact enough over hours."""
    hashes: Tensor
    """(N, B) int64 hash of each token sequence."""
    num_tokens: Tensor
    """(N, B) int64."""
    num_frames: Tensor
    """(N,) int64 encoder frames seen."""
    history: Tensor
    """(N, B, 3, U) float64: token, frame and log-probability; zeros after num_tokens."""
    predictor_out: Tensor
    """(N, B, D) what the predictor says after each token sequence."""
    predictor_state: NamedTuple
    """The predictor's own state, tensors of (N, B, ...)."""


class ModifiedBeamSearch:
    """Keep the best `beam` token sequences of every stream.

    Args:
      model: has `predictor` (initial_state, step) and `joiner` (output_weight, output_bias).
      beam: hypotheses B per stream.
      blank_penalty: subtracted from the blank's logit; positive values give fewer deletions.
      unk_id: this token is treated as a blank (sherpa-onnx's rule for `<unk>`); None: no such token.
      backend: torch, any device | numba, CPU only | auto: numba on the CPU where it is installed, else torch.
    Raises:
      ValueError: beam below 1; an unknown backend, or numba where it cannot be had.
    """

    def __init__(
        self, model: torch.nn.Module, beam: int = 4, blank_penalty: float = 0.0, unk_id: int | None = None,
        backend: str = "auto",
    ) -> None:
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {' | '.join(BACKENDS)}, got {backend!r}")
        self.beam = beam
        self.predictor = model.predictor
        self.context_size = predictor_context_size(model)
        self.unk_id = unk_id
        weight, bias = model.joiner.output_weight.detach(), model.joiner.output_bias.detach().clone()
        bias[0] -= blank_penalty
        self.num_symbols = weight.shape[0]
        compilable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
        self._numba = _numba_module(weight.dtype) if compilable and backend != "torch" else None
        if backend == "numba" and self._numba is None:
            raise ValueError("backend numba needs a float model on the CPU and the package numba: pip install numba")
        padding = -weight.shape[0] % _BLOCK  # symbols that no frame can have
        self.weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))
        self.bias = torch.nn.functional.pad(bias, (0, padding), value=-torch.inf)
        self._earlier = torch.ones(beam, beam, dtype=torch.bool, device=weight.device).tril(-1)

    @torch.inference_mode()
    def init(self, batch_size: int) -> BeamState:
        """The state of `batch_size` streams that have heard nothing: one live hypothesis each."""
        device, rows = self.weight.device, batch_size * self.beam
        blanks = torch.zeros(rows, dtype=torch.int64, device=device)
        predictor_out, predictor_state = self.predictor.step(blanks, self.predictor.initial_state(rows))
        counts = blanks.view(batch_size, self.beam)
        log_probs = torch.full(counts.shape, -torch.inf, dtype=self.weight.dtype, device=device)
        log_probs[:, 0] = 0.0
        return BeamState(
            log_probs=log_probs,
            log_prob_offset=torch.zeros(batch_size, dtype=torch.float64, device=device),
            hashes=counts,
            num_tokens=counts,
            num_frames=torch.zeros(batch_size, dtype=torch.int64, device=device),
            history=torch.zeros(batch_size, self.beam, 3, 0, dtype=torch.float64, device=device),
            predictor_out=predictor_out.unflatten(0, counts.shape),
            predictor_state=map_state(lambda tensor: tensor.unflatten(0, counts.shape), predictor_state),
        )

    @torch.inference_mode()
    def advance(self, state: BeamState, encoder_out: Tensor, encoder_out_lens: Tensor) -> BeamState:
        """Search on through a chunk.

        Args:
          encoder_out: (N, T, D) frames projected to the joiner; what lies after a length is ignored.
          encoder_out_lens: (N,) int64 frames of each stream in this chunk, 0 to T.
        """
        check_encoder_out(encoder_out, encoder_out_lens, state.num_frames.shape[0])
        if encoder_out.shape[0] == 0:
            return state
        # Longest first: the streams that still have frames are always the first rows, finished ones cost nothing.
        order = encoder_out_lens.argsort(descending=True, stable=True)
        lens = encoder_out_lens[order].tolist()
        state = select_streams(state, order)
        encoder_out = encoder_out.index_select(0, order)
        finished, frame, live = [], 0, len(lens)
        while live > 0:
            num_frames = lens[live - 1]  # of the shortest live stream
            if num_frames > frame:
                state = self._advance_together(state, encoder_out[:live, frame:num_frames])
                frame = num_frames
            still_live = sum(length > frame for length in lens)
            finished.append(map_state(lambda tensor, start=still_live: tensor[start:], state))
            state = map_state(lambda tensor, end=still_live: tensor[:end], state)
            live = still_live
        return select_streams(join_search_states(*finished[::-1]), order.argsort())

    def results(self, state: BeamState) -> list[Hypothesis]:
        """The best hypothesis of each stream so far."""
        return [hypotheses[0] for hypotheses in self.n_best(state)]

    def n_best(self, state: BeamState) -> list[list[Hypothesis]]:
        """All live hypotheses of each stream, best `Hypothesis.score` first."""
        log_probs = (state.log_probs.double() + state.log_prob_offset[:, None]).tolist()
        results = []
        for history, counts, scores in zip(state.history.cpu(), state.num_tokens.tolist(), log_probs, strict=True):
            hypotheses = [
                hypothesis_from_history(rows, count, score, self.context_size)
                for rows, count, score in zip(history, counts, scores, strict=True)
                if score > -torch.inf
            ]
            results.append(sorted(hypotheses, key=lambda hypothesis: -hypothesis.score))
        return results

    def _advance_together(self, state: BeamState, encoder_out: Tensor) -> BeamState:
        """Search through frames (N, T, D) that all streams have."""
        num_frames = encoder_out.shape[1]
        if self._numba is not None:
            fields = self._numba.advance(self, state, encoder_out, _HASH_MULTIPLIER)
        else:
            fields = self._advance_in_torch(state, encoder_out)
        offset = fields["log_probs"].amax(dim=1)
        fields["log_probs"] = (fields["log_probs"] - offset[:, None]).to(state.log_probs.dtype)
        return BeamState(
            **fields,
            log_prob_offset=state.log_prob_offset + offset,
            num_frames=state.num_frames + num_frames,
        )

    def _advance_in_torch(self, state: BeamState, encoder_out: Tensor) -> dict[str, Tensor | NamedTuple]:
        """The fields of the state after frames (N, T, D); log_probs (N, B) without the offset."""
        num_streams, num_frames, _ = encoder_out.shape
        rows, doubled = _Rows(state, self.beam), 2.0 * encoder_out
        for frame in range(num_frames):
            if frame % _HISTORY_STEP == 0:
                steps = min(_HISTORY_STEP, num_frames - frame)
                rows.history = grow_history(rows.history, int(rows.num_tokens.max()) + steps)
            log_probs, parents, symbols, symbol_log_probs = self._best_continuations(rows, doubled[:, frame])
            emits = (symbols != 0) & (log_probs > -torch.inf)
            if self.unk_id is not None:
                emits &= symbols != self.unk_id
            rows.log_probs = log_probs
            parents = (parents + rows.first).view(-1)
            rows.say(parents, emits.view(-1), symbols.view(-1), symbol_log_probs.view(-1), frame)
            self._merge(rows)
            rows.predict(self.predictor)
        shape = (num_streams, self.beam)
        return {
            "log_probs": rows.log_probs,
            "hashes": rows.hashes.view(shape),
            "num_tokens": rows.num_tokens.view(shape),
            "history": rows.history.unflatten(0, shape),
            "predictor_out": rows.predictor_out.unflatten(0, shape),
            "predictor_state": map_state(lambda tensor: tensor.unflatten(0, shape), rows.predictor_state),
        }

    def _best_continuations(self, rows: _Rows, doubled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best B of each stream's B * V continuations, best first.

        Args:
          doubled: (N, D) one frame, times two.
        Returns:
          (N, B) each: total log-prob, hypothesis it continues, symbol, log-prob of the symbol alone.
        """
        num_streams, num_symbols = doubled.shape[0], self.weight.shape[0]
        hidden = tanh_of_sum(doubled[:, None], rows.predictor_out.view(num_streams, self.beam, -1))
        logits = torch.nn.functional.linear(hidden.view(num_streams * self.beam, -1), self.weight, self.bias)
        totals = torch.log_softmax(logits, dim=-1).view(num_streams, self.beam, num_symbols)
        totals += rows.log_probs[:, :, None]  # float32 log-softmax, in place
        log_probs, index = _top(totals.view(num_streams, -1), self.beam)
        parents = index.div(num_symbols, rounding_mode="floor")
        return log_probs, parents, index - parents * num_symbols, log_probs - rows.log_probs.gather(1, parents)

    def _merge(self, rows: _Rows) -> None:
        """Add up the probabilities of equal token sequences.

        The best of them stays, with its own timestamps; the places of the others are free (-inf).
        """
        log_probs = rows.log_probs
        hashes = rows.hashes.view(log_probs.shape)
        equal = (hashes[:, :, None] == hashes[:, None, :]) & self._earlier & (log_probs > -torch.inf)[:, :, None]
        streams, later, earlier = equal.nonzero(as_tuple=True)  # (N, B, B), best hypotheses first in both
        if streams.numel() == 0:
            return
        tokens, first = rows.history[:, TOKEN], streams * self.beam
        same = (tokens.index_select(0, first + later) == tokens.index_select(0, first + earlier)).all(dim=1)
        if not bool(same.all()):  # a collision of hashes
            equal[streams, later, earlier] = same
            first, later, earlier = first[same], later[same], earlier[same]
        group = equal | equal.transpose(1, 2)
        group.diagonal(dim1=1, dim2=2).fill_(True)
        merged = log_probs[:, None, :].masked_fill(~group, -torch.inf).logsumexp(dim=2)
        rows.log_probs = merged.masked_fill_(equal.any(dim=2), -torch.inf)
        rows.drop(first + later, first + earlier)


class _Rows:
    """A BeamState while frames run: N * B rows in one dimension, replaced field by field."""

    def __init__(self, state: BeamState, beam: int) -> None:
        num_streams = state.num_frames.shape[0]
        self.first = (torch.arange(num_streams, device=state.num_frames.device) * beam)[:, None]
        self.num_frames = state.num_frames.double().repeat_interleave(beam)
        self.log_probs = state.log_probs  # (N, B)
        self.hashes = state.hashes.reshape(-1)
        self.num_tokens = state.num_tokens.reshape(-1)
        self.history = state.history.flatten(0, 1)  # (N * B, 3, U)
        self.predictor_out = state.predictor_out.flatten(0, 1)
        self.predictor_state = map_state(lambda tensor: tensor.flatten(0, 1), state.predictor_state)
        # Between `say` and `predict`: where a row's predictor comes from, and which rows must run it.
        self._parents = self._grows = self._symbols = torch.empty(0)

    def say(self, parents: Tensor, emits: Tensor, symbols: Tensor, log_probs: Tensor, frame: int) -> None:
        """Let row i continue row parents[i], by symbols[i] where emits[i] and by nothing elsewhere."""
        self._parents, self._grows, self._symbols = parents, emits, symbols
        hashes = self.hashes.index_select(0, parents)
        self.hashes = torch.where(emits, hashes * _HASH_MULTIPLIER + symbols, hashes)
        places = self.num_tokens.index_select(0, parents)
        self.num_tokens = places + emits
        self.history = self.history.index_select(0, parents)
        assert (TOKEN, FRAME, LOG_PROB) == (0, 1, 2)
        entry = torch.stack((symbols.double(), self.num_frames + frame, log_probs.double()), dim=1)  # (N * B, 3)
        entry.masked_fill_(~emits[:, None], 0.0)  # a row that says nothing writes zeros behind its last token
        self.history.scatter_(2, places[:, None, None].expand(-1, 3, 1), entry[:, :, None])

    def drop(self, dropped: Tensor, kept: Tensor) -> None:
        """Rows dropped[i] and kept[i] hold the same tokens. One of the two often said nothing now, so that what the
        predictor says after these tokens is known already."""
        knows = self._grows[kept] & ~self._grows[dropped]
        donors, takers = dropped[knows], kept[knows]
        self._parents[takers] = self._parents[donors]
        self._grows[takers] = False
        self._grows[dropped] = False

    def predict(self, predictor: torch.nn.Module) -> None:
        """Bring the predictor's outputs and states to what the rows hold now; only new sequences run it."""
        self.predictor_out = self.predictor_out.index_select(0, self._parents)
        self.predictor_state = select_streams(self.predictor_state, self._parents)
        grown = self._grows.nonzero().squeeze(1)
        if grown.numel() == 0:
            return
        labels = self._symbols.index_select(0, grown)
        grown_out, grown_state = predictor.step(labels, select_streams(self.predictor_state, grown))
        self.predictor_out.index_copy_(0, grown, grown_out)
        for tensor, values in zip(self.predictor_state, grown_state, strict=True):
            tensor.index_copy_(0, grown, values)


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of (N, W), W a multiple of 16, and their indices: best first, of equal ones the lowest index.

    They lie in the best blocks, which is faster than topk over all. Block b holds the elements b, b + W/16, b + 2W/16,
    ..., so that the maximum over a block is a vectorised pass.
    """
    num_streams, width = values.shape
    num_blocks, wanted = width // _BLOCK, min(count + 1, width)  # one more shows whether it is as good as the last
    if num_blocks <= 2 * count:
        best, index = values.topk(wanted, dim=1)
    else:
        blocks = values.view(num_streams, _BLOCK, num_blocks).amax(dim=1).topk(wanted, dim=1, sorted=False).indices
        offsets = torch.arange(0, width, num_blocks, device=values.device)
        candidates = (blocks[:, None, :] + offsets[:, None]).view(num_streams, -1)  # (N, 16 * wanted)
        best, index = values.gather(1, candidates).topk(wanted, dim=1)
        index = candidates.gather(1, index)
    if bool((best[:, 1:] - best[:, :-1] == 0).any()):  # topk takes any of equal ones; -inf - -inf is nan
        best, index = values.sort(dim=1, descending=True, stable=True)
    return best[:, :count], index[:, :count]


def modified_beam_search(
    model: torch.nn.Module,
    encoder_out: Tensor,
    encoder_out_lens: Tensor,
    beam: int = 4,
    *,
    blank_penalty: float = 0.0,
    unk_id: int | None = None,
) -> list[Hypothesis]:
    """Decode whole utterances: (N, T, D) projected encoder frames and their lengths (N,) -> N best hypotheses.

    For the n-best list use `ModifiedBeamSearch`: `n_best` of its state.
    """
    search = ModifiedBeamSearch(model, beam, blank_penalty, unk_id)
    return search.results(search.advance(search.init(encoder_out.shape[0]), encoder_out, encoder_out_lens))
