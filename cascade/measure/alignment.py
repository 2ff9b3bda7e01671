"""Viterbi alignment of a given text: the best path through the lattice says where a model hears its words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.losses.best_path import best_symbol_frames
from cascade.losses.joiner_cells import JoinerInputs
from cascade.models.torch_engine import encode_batch
from cascade.models.transducer import CascadedTransducer
from cascade.search.hypothesis import Hypothesis
from cascade.search.methods import DecodingOptions


@torch.inference_mode()
def align_batch(
    model: CascadedTransducer, features: Tensor, feature_lens: Tensor, tokens: Sequence[Sequence[int]],
    options: DecodingOptions, rnnt_type: str,
) -> list[Hypothesis | None]:  # fmt: skip
    """Say the given tokens where the model finds them most probable.

    Args:
      features: (N, T, F) log-mel fbank, not normalised; feature_lens: (N,) valid frames.
      tokens: N token sequences, without blanks.
      options: the pass, its contexts and the blank penalty.
      rnnt_type: the topology that the model was trained with, regular | modified | constrained.
    Returns:
      per utterance a hypothesis as a search would return it (log_prob is that of the best path alone), or None where
      no path exists: more tokens than frames with at most one symbol per frame, or no frame at all.
    """
    encoder_out, encoder_out_lens = encode_batch(model, features, feature_lens, options)
    token_lens = torch.tensor([len(sequence) for sequence in tokens], dtype=torch.int64)
    symbols = torch.zeros(len(tokens), int(token_lens.max()), dtype=torch.int64)
    for row, sequence in enumerate(tokens):
        symbols[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    symbols = symbols.to(encoder_out.device)
    zeros = torch.zeros_like(encoder_out_lens)
    boundary = torch.stack((zeros, zeros, token_lens.to(zeros.device), encoder_out_lens), dim=1)
    bias = model.joiner.output_bias.clone()
    bias[0] -= options.blank_penalty
    inputs = JoinerInputs(encoder_out, model.predictor(symbols), model.joiner.output_weight, bias)
    best = best_symbol_frames(inputs, symbols, boundary, rnnt_type)
    context_size, hypotheses = model.predictor.context_size, []
    rows = zip(tokens, best.frames.tolist(), best.log_probs.tolist(), best.scores.tolist(), strict=True)
    for sequence, frames, log_probs, score in rows:
        count = len(sequence)
        hypotheses.append(
            Hypothesis(tuple(sequence), tuple(frames[:count]), tuple(log_probs[:count]), score, context_size)
            if score > -torch.inf else None
        )
    return hypotheses
