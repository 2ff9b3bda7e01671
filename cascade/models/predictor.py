"""Prediction networks: LSTM, stateless, and tied-and-reduced (TAR).

All map labels to joiner-wide vectors, position 0 standing for "nothing said yet". `forward` takes whole label
sequences; `step` takes one label and an explicit state whose tensors have the hypotheses on the first axis. Blank (0)
and -1 are zero vectors on the input side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.config.options import PredictorConfig
from cascade.models.dropout import Dropout


class LstmState(NamedTuple):
    hidden: Tensor
    """(N, layers, H)"""
    cell: Tensor
    """(N, layers, H)"""


class ContextState(NamedTuple):
    labels: Tensor
    """(N, context_size) int64, oldest first."""


def embed(labels: Tensor, matrix: Tensor) -> Tensor:
    """Rows of `matrix` (V, D); blank and -1 give zeros."""
    return functional.embedding(labels.clamp(min=0), matrix) * (labels > 0).unsqueeze(-1)


class LstmPredictor(nn.Module):
    """The teacher's predictor: embedding, LSTM, projection to the joiner."""

    context_size = 1

    def __init__(self, vocab_size: int, joiner_dim: int, config: PredictorConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.lstm = nn.LSTM(config.embedding_dim, config.hidden_dim, config.num_layers, batch_first=True)
        self.out = nn.Linear(config.hidden_dim, joiner_dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, labels: Tensor) -> Tensor:
        """(N, U) -> (N, U + 1, D)."""
        x = embed(functional.pad(labels, (1, 0)), self.embedding.weight)
        return self.out(self.dropout(self.lstm(x)[0]))

    def initial_state(self, batch_size: int) -> LstmState:
        zeros = self.out.weight.new_zeros(batch_size, self.lstm.num_layers, self.lstm.hidden_size)
        return LstmState(zeros, zeros.clone())

    def step(self, labels: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        """(N,) labels -> (N, D) and the new state; the first label is blank."""
        x = embed(labels, self.embedding.weight)
        hidden, cell = [], []
        # nn.LSTM reorders its weights at every call on CPUs, four times the cost of one step.
        for layer, weights in enumerate(self.lstm.all_weights):
            x, c = torch.lstm_cell(x, (state.hidden[:, layer], state.cell[:, layer]), *weights)
            hidden.append(x)
            cell.append(c)
        return self.out(x), LstmState(torch.stack(hidden, dim=1), torch.stack(cell, dim=1))


class ContextPredictor(nn.Module):
    """A predictor that sees the last `context_size` labels only; subclasses map them to vectors."""

    def __init__(self, context_size: int) -> None:
        super().__init__()
        self.context_size = context_size

    def forward_context(self, context: Tensor) -> Tensor:
        """(..., context_size) labels, oldest first -> (..., D)."""
        raise TypeError(f"{type(self).__name__} must define forward_context")

    def forward(self, labels: Tensor, before: Tensor | None = None) -> Tensor:
        """(N, U) -> (N, U + 1, D); before: (N, context_size) labels that came earlier, blanks if None."""
        if before is None:
            before = labels.new_zeros(len(labels), self.context_size)
        padded = torch.cat((before, labels), dim=1)
        return self.forward_context(padded.unfold(1, self.context_size, 1))

    def initial_state(self, batch_size: int) -> ContextState:
        device = next(self.parameters()).device
        return ContextState(torch.zeros(batch_size, self.context_size, dtype=torch.int64, device=device))

    def step(self, labels: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        """(N,) labels -> (N, D) and the new state; the first label is blank."""
        context = torch.cat((state.labels[:, 1:], labels.unsqueeze(1)), dim=1)
        return self.forward_context(context), ContextState(context)


class StatelessPredictor(ContextPredictor):
    """Embedding and a convolution over the last labels (Ghodsi et al. 2020), projected to the joiner."""

    def __init__(self, vocab_size: int, joiner_dim: int, config: PredictorConfig) -> None:
        super().__init__(config.context_size)
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.position_weight = nn.Parameter(torch.randn(config.context_size, config.embedding_dim))
        self.out = nn.Linear(config.embedding_dim, joiner_dim)
        self.dropout = Dropout(config.dropout)

    def forward_context(self, context: Tensor) -> Tensor:
        x = (embed(context, self.embedding.weight) * self.position_weight).sum(dim=-2)
        return self.out(self.dropout(functional.relu(x)))


class TiedReducedPredictor(ContextPredictor):
    """The tied-and-reduced predictor of Botros et al., "Tied & Reduced RNN-T Decoder" (2109.07513).

    With E the (V, D) embedding, y_1 .. y_N the last labels (newest first) and p_{h,n} position vectors:

        s_{h,n} = <E[y_n], p_{h,n}>
        o = 1 / (H N) * sum_h sum_n s_{h,n} E[y_n]
        g = swish(layer_norm(W o + b))

    E is the joiner's output matrix; g enters the joiner as it is. There is no softmax, so the heads enter only as
    their sum sum_h p_{h,n}, and the forward pass costs the same for every H.
    """

    def __init__(self, joiner_output: nn.Linear, config: PredictorConfig) -> None:
        super().__init__(config.context_size)
        # In a tuple, the layer is not registered a second time: E is one parameter, one checkpoint entry.
        self._tied = (joiner_output,)
        dim = joiner_output.in_features
        self.position = nn.Parameter(torch.randn(config.num_heads, config.context_size, dim))
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def embedding(self) -> Tensor:
        """(V, D) the matrix shared with the joiner."""
        return self._tied[0].weight

    def forward_context(self, context: Tensor) -> Tensor:
        x = embed(context, self.embedding)  # (..., N, D), oldest first
        position = self.position.sum(dim=0).flip(0)  # (N, D), oldest first
        score = (x * position).sum(dim=-1, keepdim=True)  # sum_h s_{h,n}
        x = (score * x).sum(dim=-2) / math.prod(self.position.shape[:2])
        return self.dropout(functional.silu(self.norm(self.linear(x))))


Predictor = LstmPredictor | StatelessPredictor | TiedReducedPredictor


def build_predictor(config: PredictorConfig, joiner_output: nn.Linear) -> Predictor:
    """The predictor of this kind, in front of a joiner with this output layer (D -> V)."""
    if config.kind == "tied_reduced":
        return TiedReducedPredictor(joiner_output, config)
    kinds = {"lstm": LstmPredictor, "stateless": StatelessPredictor}
    return kinds[config.kind](joiner_output.out_features, joiner_output.in_features, config)
