"""A PyTorch model as a search sees it: arrays, predictor and joiner on the CPU. Whole utterances are decoded here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cascade.config.options import ENCODER_FRAME_MS
from cascade.models.encoder_rows import EncoderRows
from cascade.models.predictor import ContextPredictor, StatelessPredictor, TiedReducedPredictor
from cascade.models.state import fill_state, state_tensors
from cascade.product import Product

State = tuple[np.ndarray, ...]


class TorchPredictor:
    """A predictor on the CPU that takes and gives arrays; a state that is labels stays an array."""

    def __init__(self, predictor: Any, product: type[Product] = Product) -> None:
        self._predictor = predictor
        self._state_type = type(predictor.initial_state(0))
        self.context_size = int(getattr(predictor, "context_size", None) or 1)
        self._by_context = isinstance(predictor, ContextPredictor)
        self._context_vectors = _context_vectors(predictor, product)

    def initial(self, n: int) -> tuple[np.ndarray, State]:
        with torch.inference_mode():
            state = tuple(tensor.numpy() for tensor in self._predictor.initial_state(n))
        return self.step(np.zeros(n, np.int64), state)

    def step(self, labels: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        if self._by_context:
            context = np.concatenate((state[0][:, 1:], labels[:, None]), axis=1)
            return self._context_vectors(context), (context,)
        with torch.inference_mode():
            tensors = self._state_type(*map(torch.from_numpy, state))
            out, tensors = self._predictor.step(torch.from_numpy(labels), tensors)
            return out.numpy(), tuple(tensor.numpy() for tensor in tensors)

    def with_product(self, product: type[Product]) -> TorchPredictor:
        multiplies = isinstance(self._predictor, StatelessPredictor)  # the others' matrices are not used row by row
        return TorchPredictor(self._predictor, product) if multiplies else self


def _context_vectors(predictor: Any, product: type[Product]) -> Callable[[np.ndarray], np.ndarray]:
    """`forward_context` for arrays (n, K) of labels that are not negative.

    In numpy for the package's own predictors: some ten small torch operations per frame cost twice as much.
    """
    if isinstance(predictor, StatelessPredictor):
        embedding, position, weight, bias = _arrays(
            predictor.embedding.weight, predictor.position_weight, predictor.out.weight, predictor.out.bias
        )
        embedding, out = _without_blank(embedding), product(weight, bias)

        def stateless(context: np.ndarray) -> np.ndarray:
            x = np.einsum("nkd,kd->nd", embedding[context], position)
            return out(np.maximum(x, 0.0, out=x))

        return stateless
    if isinstance(predictor, TiedReducedPredictor):
        linear, norm, eps = predictor.linear, predictor.norm, predictor.norm.eps
        embedding, position, weight, bias, scale, shift = _arrays(
            predictor.embedding, predictor.position, linear.weight, linear.bias, norm.weight, norm.bias
        )
        embedding = _without_blank(embedding)
        scores = embedding @ position.sum(axis=0)[::-1].T / math.prod(position.shape[:2])  # (V, K), oldest first
        projected, places = embedding @ weight.T, np.arange(scores.shape[1])  # W sum s E = sum s W E

        def tied_reduced(context: np.ndarray) -> np.ndarray:
            x = np.einsum("nk,nkd->nd", scores[context, places], projected[context])
            x += bias
            x -= x.mean(axis=1, keepdims=True)
            x *= scale / np.sqrt(np.einsum("nd,nd->n", x, x)[:, None] / x.shape[1] + eps)
            x += shift
            return x / (1.0 + np.exp(-x))

        return tied_reduced

    def in_torch(context: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return predictor.forward_context(torch.from_numpy(context)).numpy()

    return in_torch


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def _without_blank(embedding: np.ndarray) -> np.ndarray:
    """(V, D) with zeros for the blank."""
    return embedding * (np.arange(len(embedding)) > 0)[:, None]


class TorchRows(EncoderRows):
    """The rows of an encoder in PyTorch, computed and kept without gradients."""

    join, leave, advance = map(torch.inference_mode(), (EncoderRows.join, EncoderRows.leave, EncoderRows.advance))


class TorchEngine:
    """A model as searches and streams see it (`stream.engine.Engine`): arrays in, arrays out.

    Encoders run where the model is; predictor and joiner run on the CPU, partly on copies of their weights: when the
    model's change, make another engine.
    """

    whole_chunks = False

    def __init__(self, model: Any) -> None:
        self._encoder, self._like = model.encoder, model.encoder.feature_mean
        self.num_mel_bins = len(self._like)
        predictor, joiner = model.predictor, model.joiner
        if joiner.output_weight.device.type != "cpu":  # copied together: their matrix may be tied
            predictor, joiner = copy.deepcopy(nn.ModuleList((predictor, joiner))).to("cpu")
        self._joiner, self.predictor = joiner, TorchPredictor(predictor)
        self.weight, self.bias = _arrays(joiner.output_weight, joiner.output_bias)

    def causal_rows(self, left: int) -> TorchRows:
        return self._rows(partial(self._encoder.initial_state, left=left), self._encoder.forward_chunk)

    def block_rows(self, left: int) -> TorchRows:
        return self._rows(partial(self._encoder.initial_block_state, left=left), self._encoder.forward_block)

    def _rows(self, initial: Callable[[int], Any], forward: Callable[..., tuple[Tensor, Any]]) -> TorchRows:
        like = initial(0)

        def step(frames: np.ndarray, lens: np.ndarray, state: Any) -> tuple[np.ndarray, list[Tensor]]:
            valid = None if (lens == frames.shape[1]).all() else self._on_device(lens)
            out, state = forward(self._on_device(frames, self._like.dtype), fill_state(like, state), valid)
            return out.cpu().numpy(), state_tensors(state)

        return TorchRows(lambda n: state_tensors(initial(n)), step)

    def _on_device(self, array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(array).to(self._like.device, dtype)

    @torch.inference_mode()
    def full(self, causal_out: np.ndarray, lens: np.ndarray) -> np.ndarray:
        out = self._encoder.forward_noncausal(self._on_device(causal_out), self._on_device(lens), None, None)
        return out.cpu().numpy()

    @torch.inference_mode()
    def project(self, encoder_out: np.ndarray) -> np.ndarray:
        return self._joiner.project_encoder(torch.from_numpy(encoder_out)).numpy()


@torch.inference_mode()
def encode_batch(model: Any, features: Tensor, feature_lens: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Whole utterances through the pass and the contexts that `options` name; see `CascadedTransducer.encode`.

    Features may lie on any device, what comes out lies on the model's.
    """
    return model.encode(
        features.to(model.device),
        feature_lens.to(model.device),
        options.mode,
        chunk_frames=options.chunk_ms // ENCODER_FRAME_MS,
        left_frames=options.left_context_ms // ENCODER_FRAME_MS,
        block_frames=options.look_ahead_ms // ENCODER_FRAME_MS if options.mode == "look_ahead" else None,
    )


def n_best_batch(model: Any, search: Any, features: Tensor, feature_lens: Tensor, options: Any) -> list[list[Any]]:
    """Decode whole utterances as if they were streamed: the masks hide what a stream would not have heard.

    Args:
      features: (N, T, F) log-mel fbank, not normalised; feature_lens: (N,) valid frames.
      options: the DecodingOptions.
    Returns:
      N lists of hypotheses, best first; those of greedy search have one.
    """
    encoder_out, encoder_out_lens = encode_batch(model, features, feature_lens, options)
    return search.decode(encoder_out.cpu().numpy(), encoder_out_lens.cpu().numpy())


def decode_batch(*arguments: Any) -> list[Any]:
    """The best hypothesis of each utterance; see `n_best_batch`."""
    return [hypotheses[0] for hypotheses in n_best_batch(*arguments)]
