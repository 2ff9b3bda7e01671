"""Greedy transducer search over a batch of streams, at most one symbol per 40 ms frame.

`GreedySearch` is resumable: `init` -> `advance` for every chunk -> `results`. `greedy_search` does all three for whole
utterances, so what is decoded chunk by chunk and what is decoded at once run the same code.
"""

from __future__ import annotations

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
    predictor_context_size,
    tanh_of_sum,
)

_FRAMES_AT_ONCE = 4
"""Most frames say nothing: this many are looked at together, and those after the first symbol again."""


class GreedyState(NamedTuple):
    """State of a greedy search over N streams; the stream is the first dimension of every tensor."""

    log_probs: Tensor
    """(N,) float64 log-probability of all that was decided, blanks included."""
    num_tokens: Tensor
    """(N,) int64."""
    num_frames: Tensor
    """(N,) int64 encoder frames seen."""
    history: Tensor
    """(N, 3, U) float64: token, frame and log-probability; zeros after num_tokens."""
    predictor_out: Tensor
    """(N, D) what the predictor says after the tokens so far."""
    predictor_state: NamedTuple
    """The predictor's own state, tensors of (N, ...)."""


class GreedySearch:
    """Take the best symbol of every frame; of equal ones the lowest, so blank first, as beam search does.

    Args:
      model: has `predictor` (initial_state, step) and `joiner` (output_weight, output_bias).
      blank_penalty: subtracted from the blank's logit; positive values give fewer deletions.
      unk_id: this token is treated as a blank (sherpa-onnx's rule for `<unk>`); None: no such token.
    """

    def __init__(self, model: torch.nn.Module, blank_penalty: float = 0.0, unk_id: int | None = None) -> None:
        self.predictor = model.predictor
        self.context_size = predictor_context_size(model)
        self.weight = model.joiner.output_weight.detach()
        self.bias = model.joiner.output_bias.detach().clone()
        self.bias[0] -= blank_penalty
        self.unk_id = unk_id

    @torch.inference_mode()
    def init(self, batch_size: int) -> GreedyState:
        """The state of `batch_size` streams that have heard nothing."""
        blanks = torch.zeros(batch_size, dtype=torch.int64, device=self.weight.device)
        predictor_out, predictor_state = self.predictor.step(blanks, self.predictor.initial_state(batch_size))
        return GreedyState(
            log_probs=blanks.double(),
            num_tokens=blanks,
            num_frames=blanks,
            history=torch.zeros(batch_size, 3, 0, dtype=torch.float64, device=self.weight.device),
            predictor_out=predictor_out,
            predictor_state=predictor_state,
        )

    @torch.inference_mode()
    def advance(self, state: GreedyState, encoder_out: Tensor, encoder_out_lens: Tensor) -> GreedyState:
        """Search on through a chunk.

        Args:
          encoder_out: (N, T, D) frames projected to the joiner; what lies after a length is ignored.
          encoder_out_lens: (N,) int64 frames of each stream in this chunk, 0 to T.
        """
        check_encoder_out(encoder_out, encoder_out_lens, state.num_tokens.shape[0])
        if encoder_out.shape[0] == 0:
            return state
        num_chunk_frames = int(encoder_out_lens.max())
        log_probs, num_tokens = state.log_probs.clone(), state.num_tokens.clone()
        predictor_out = state.predictor_out.clone()
        predictor_state = map_state(torch.Tensor.clone, state.predictor_state)
        history = grow_history(state.history, int(num_tokens.max()) + num_chunk_frames).clone()
        doubled, lens = 2.0 * encoder_out, encoder_out_lens[:, None]
        streams = torch.arange(len(lens), device=lens.device)[:, None]
        ahead = torch.arange(min(_FRAMES_AT_ONCE, num_chunk_frames), device=lens.device)
        place = torch.zeros_like(lens)  # (N, 1) the next frame of each stream
        while bool((place < lens).any()):
            frames = place + ahead  # (N, W)
            inside = frames < lens
            frame_out = doubled[streams, frames.clamp(max=num_chunk_frames - 1)]
            hidden = tanh_of_sum(frame_out, predictor_out[:, None])
            logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
            best, symbols = self.choose(torch.log_softmax(logits, dim=-1), state.num_frames[:, None] + frames)
            emits = (symbols != 0) & inside
            if self.unk_id is not None:
                emits &= symbols != self.unk_id
            # What was said so far holds up to the first frame that says more; the frames after it wait for it.
            taken = inside & (emits.cumsum(dim=1) - emits.long() == 0)
            log_probs += best.double().masked_fill(~taken, 0.0).sum(dim=1)
            place = place + taken.sum(dim=1, keepdim=True)
            grown, index = (emits & taken).nonzero(as_tuple=True)  # one frame per stream at most
            if grown.numel() == 0:
                continue
            labels, places = symbols[grown, index], num_tokens[grown]
            history[grown, TOKEN, places] = labels.double()
            history[grown, FRAME, places] = (state.num_frames[grown] + frames[grown, index]).double()
            history[grown, LOG_PROB, places] = best[grown, index].double()
            num_tokens[grown] = places + 1
            grown_out, grown_state = self.predictor.step(labels, select_streams(predictor_state, grown))
            predictor_out.index_copy_(0, grown, grown_out)
            for tensor, values in zip(predictor_state, grown_state, strict=True):
                tensor.index_copy_(0, grown, values)
        return GreedyState(
            log_probs=log_probs,
            num_tokens=num_tokens,
            num_frames=state.num_frames + encoder_out_lens,
            history=history[:, :, : int(num_tokens.max())],
            predictor_out=predictor_out,
            predictor_state=predictor_state,
        )

    def choose(self, log_probs: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Symbols for (N, W, V) at frames (N, W) from the stream's start -> log-probs and symbols (N, W)."""
        return log_probs.max(dim=-1)

    def results(self, state: GreedyState) -> list[Hypothesis]:
        """The hypothesis of each stream so far."""
        counts, log_probs = state.num_tokens.tolist(), state.log_probs.tolist()
        return [
            hypothesis_from_history(history, count, log_prob, self.context_size)
            for history, count, log_prob in zip(state.history.cpu(), counts, log_probs, strict=True)
        ]


def greedy_search(
    model: torch.nn.Module,
    encoder_out: Tensor,
    encoder_out_lens: Tensor,
    *,
    blank_penalty: float = 0.0,
    unk_id: int | None = None,
) -> list[Hypothesis]:
    """Decode whole utterances: (N, T, D) projected encoder frames and their lengths (N,) -> N hypotheses."""
    search = GreedySearch(model, blank_penalty, unk_id)
    return search.results(search.advance(search.init(encoder_out.shape[0]), encoder_out, encoder_out_lens))
