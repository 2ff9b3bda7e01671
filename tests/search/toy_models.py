"""Tiny transducers that speak the search's interface: predictor.initial_state/step, joiner.output_weight/bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cascade.config.options import PredictorConfig
from cascade.models.predictor import build_predictor

REAL = ("real_lstm", "real_stateless", "real_tied_reduced")
"""Kinds of ToyTransducer whose predictor is the package's own."""

class ContextState(NamedTuple):
    labels: Tensor  # (B, context_size) int64, oldest first


class RecurrentState(NamedTuple):
    hidden: Tensor  # (B, D)
    cell: Tensor  # (B, D)


class StatelessPredictor(nn.Module):
    def __init__(self, vocab_size: int, dim: int, context_size: int = 2) -> None:
        super().__init__()
        self.context_size, self.num_calls, self.num_rows = context_size, 0, 0
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mixing = nn.Parameter(torch.randn(context_size, dim))
        self.projection = nn.Linear(dim, dim)

    def initial_state(self, batch_size: int) -> ContextState:
        return ContextState(torch.zeros(batch_size, self.context_size, dtype=torch.int64))

    def step(self, labels: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        self.num_calls, self.num_rows = self.num_calls + 1, self.num_rows + labels.shape[0]
        labels = torch.cat([state.labels[:, 1:], labels[:, None]], dim=1)
        embedded = self.embedding(labels) * (labels > 0)[:, :, None]
        return self.projection(torch.relu((embedded * self.mixing).sum(dim=1))), ContextState(labels)


class RecurrentPredictor(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.cell = nn.LSTMCell(dim, dim)

    def initial_state(self, batch_size: int) -> RecurrentState:
        zeros = self.embedding.weight.new_zeros(batch_size, self.embedding.embedding_dim)
        return RecurrentState(zeros, zeros)

    def step(self, labels: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        hidden, cell = self.cell(self.embedding(labels), tuple(state))
        return hidden, RecurrentState(hidden, cell)


class Joiner(nn.Module):
    def __init__(self, vocab_size: int, dim: int, blank_bias: float) -> None:
        super().__init__()
        self.output_weight = nn.Parameter(torch.randn(vocab_size, dim))
        self.output_bias = nn.Parameter(torch.randn(vocab_size) * 0.1)
        self.output_bias.data[0] += blank_bias

    def forward(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        return torch.tanh(encoder_out + predictor_out) @ self.output_weight.T + self.output_bias


class ToyTransducer(nn.Module):
    """Random weights; `kind` is stateless | lstm, the toys of this file, or one of REAL."""

    def __init__(self, kind: str, vocab_size: int, dim: int = 8, blank_bias: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocab_size = vocab_size
        if kind in REAL:
            self.joiner = Joiner(vocab_size, dim, blank_bias)
            output = nn.Linear(dim, vocab_size, bias=False)
            output.weight = self.joiner.output_weight
            sizes = {"embedding_dim": dim, "hidden_dim": dim, "num_layers": 2, "context_size": 2, "num_heads": 2}
            self.predictor = build_predictor(PredictorConfig(kind=kind.removeprefix("real_"), **sizes), output)
        else:
            self.predictor = (StatelessPredictor if kind == "stateless" else RecurrentPredictor)(vocab_size, dim)
            self.joiner = Joiner(vocab_size, dim, blank_bias)
        self.encoder = nn.Module()  # an engine looks at its features only
        self.encoder.register_buffer("feature_mean", torch.zeros(1))
        self.double().eval().requires_grad_(False)


def random_encoder_out(batch_size: int, num_frames: int, dim: int = 8, seed: int = 0) -> Tensor:
    """(N, T, D) float64."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(batch_size, num_frames, dim, generator=generator, dtype=torch.float64)


def brute_force(model: nn.Module, encoder_out: Tensor, blanks: tuple[int, ...] = (0,)) -> dict[tuple[int, ...], float]:
    """Log-probability of every token sequence over (T, D), summed over all its paths, one Python step at a time."""
    scores: dict[tuple[int, ...], Tensor] = {(): torch.zeros((), dtype=torch.float64)}
    for frame in encoder_out:
        following: dict[tuple[int, ...], list[Tensor]] = {}
        for tokens, score in scores.items():
            out, state = model.predictor.step(torch.zeros(1, dtype=torch.int64), model.predictor.initial_state(1))
            for token in tokens:
                out, state = model.predictor.step(torch.tensor([token]), state)
            log_probs = model.joiner(frame[None], out).log_softmax(dim=-1)[0]
            for symbol, log_prob in enumerate(log_probs):
                longer = tokens if symbol in blanks else (*tokens, symbol)
                following.setdefault(longer, []).append(score + log_prob)
        scores = {tokens: torch.stack(parts).logsumexp(dim=0) for tokens, parts in following.items()}
    return {tokens: float(score) for tokens, score in scores.items()}


class PlainHypothesis(NamedTuple):
    tokens: tuple[int, ...]
    timestamps: tuple[int, ...]
    token_log_probs: tuple[float, ...]
    log_prob: float


def plain_beam_search(
    model: nn.Module, encoder_out: Tensor, beam: int, blank_penalty: float = 0.0, blanks: tuple[int, ...] = (0,)
) -> tuple[list[PlainHypothesis], int]:
    """Modified beam search over (T, D) in plain Python: the live hypotheses and how many were merged into others."""
    hypotheses, num_merged = [PlainHypothesis((), (), (), 0.0)], 0
    for frame in range(encoder_out.shape[0]):
        candidates = []
        for hypothesis in hypotheses:
            out, state = model.predictor.step(torch.zeros(1, dtype=torch.int64), model.predictor.initial_state(1))
            for token in hypothesis.tokens:
                out, state = model.predictor.step(torch.tensor([token]), state)
            logits = model.joiner(encoder_out[None, frame], out)[0].clone()
            logits[0] -= blank_penalty
            for symbol, log_prob in enumerate(logits.log_softmax(dim=-1).tolist()):
                total = hypothesis.log_prob + log_prob
                if symbol in blanks:
                    candidates.append(hypothesis._replace(log_prob=total))
                else:
                    candidates.append(PlainHypothesis(
                        (*hypothesis.tokens, symbol), (*hypothesis.timestamps, frame),
                        (*hypothesis.token_log_probs, log_prob), total,
                    ))
        merged: dict[tuple[int, ...], PlainHypothesis] = {}
        for candidate in sorted(candidates, key=lambda item: -item.log_prob)[:beam]:
            best = merged.setdefault(candidate.tokens, candidate)
            if best is not candidate:
                log_prob = float(torch.tensor([best.log_prob, candidate.log_prob], dtype=torch.float64).logsumexp(0))
                merged[candidate.tokens] = best._replace(log_prob=log_prob)
                num_merged += 1
        hypotheses = list(merged.values())
    return hypotheses, num_merged
