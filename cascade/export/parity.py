"""Do the exported graphs compute what PyTorch computes? onnxruntime runs each of them on random input."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cascade.config.options import SUBSAMPLING
from cascade.export.onnx import DECODER, FULL, JOINER, LOOK_AHEAD, MODES, STREAMING
from cascade.export.wrappers import Geometry
from cascade.models.transducer import CascadedTransducer, Mode

TOLERANCE = 1e-4
"""Largest allowed difference from PyTorch in float64: float32 through all layers stays well below."""


def onnx_session(path: Path) -> Any:
    """An onnxruntime session on one CPU thread.

    Raises:
      ImportError: onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("running ONNX files needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, *values: Tensor) -> list[Tensor]:
    """Outputs in order, for inputs in order: graphs bind by position, as in sherpa-onnx."""
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.contiguous().numpy() for name, value in zip(names, values, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


class OnlineSession:
    """An online encoder in onnxruntime, driven as sherpa-onnx drives it: by its metadata and by position."""

    def __init__(self, path: Path) -> None:
        self._session = onnx_session(path)
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        self.step_frames = int(self.metadata["decode_chunk_len"])
        """Feature frames of one step."""

    def initial_state(self, batch_size: int) -> list[Tensor]:
        """Zeros in the shapes that the metadata describe."""
        names = ("num_heads", "left_context_len", "head_dim", "intermediate_size", "csgu_kernel_size", "hidden_size")
        heads, left, head_dim, intermediate, kernel, hidden = (int(self.metadata[name]) for name in names)
        cache = torch.zeros(batch_size, heads, left, head_dim)
        convolution = torch.zeros(batch_size, intermediate // 2, kernel - 1)
        fusion = torch.zeros(batch_size, 2 * hidden, int(self.metadata["merge_conv_kernel"]) - 1)
        layers = (cache, cache, convolution, fusion) * int(self.metadata["num_hidden_layers"])
        return [*layers, torch.zeros(batch_size, dtype=torch.int64)]

    def step(self, features: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(N, step_frames, F) features -> (N, step_frames / 4, D) and the new states."""
        encoder_out, *states = run_session(self._session, features, *states)
        return encoder_out, states


def stream_together(encoder: OnlineSession, streams: list[Tensor]) -> list[Tensor]:
    """Run streams of different age in one batch: stream i begins at step i, and leaves when it ends.

    Args:
      streams: (T_i, F) features each; what is left over after whole steps is dropped.
    Returns:
      (T_i // 4, D) each.
    """
    size = encoder.step_frames
    num_steps = [stream.shape[0] // size for stream in streams]
    states = [encoder.initial_state(1) for _ in streams]
    outputs: list[list[Tensor]] = [[] for _ in streams]
    for step in range(max(start + count for start, count in enumerate(num_steps))):
        live = [index for index, count in enumerate(num_steps) if index <= step < index + count]
        if not live:
            continue
        features = torch.stack([streams[i][(step - i) * size : (step - i + 1) * size] for i in live])
        joined = [torch.cat(tensors) for tensors in zip(*(states[i] for i in live), strict=True)]
        encoder_out, joined = encoder.step(features, joined)
        for row, i in enumerate(live):
            outputs[i].append(encoder_out[row])
            states[i] = [tensor[row : row + 1] for tensor in joined]
    return [torch.cat(parts) for parts in outputs]


def encode_whole(model: CascadedTransducer, features: list[Tensor], mode: Mode, geometry: Geometry) -> list[Tensor]:
    """PyTorch, in the model's type, on whole utterances (T_i, F), padded into one batch -> (T_i // 4, D) each."""
    lens = torch.tensor([frames.shape[0] for frames in features])
    padded = pad_sequence(features, batch_first=True).to(model.encoder.feature_mean.dtype)
    block = geometry.block_frames if mode == "look_ahead" else None
    with torch.inference_mode():
        out, out_lens = model.encode(padded, lens, mode, geometry.chunk_frames, geometry.left_frames, block)
    return [row[:length] for row, length in zip(out, out_lens.tolist(), strict=True)]


def random_features(model: CascadedTransducer, lengths: Iterable[int], seed: int) -> list[Tensor]:
    """(T_i, F) float32 noise with the mean and spread of the training features."""
    generator = torch.Generator().manual_seed(seed)
    mean, scale = model.encoder.feature_mean.float(), model.encoder.feature_scale.float()
    return [mean + torch.randn(length, mean.shape[0], generator=generator) / scale for length in lengths]


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest absolute difference; inf if a shape differs or a value is not a number."""
    largest = 0.0
    for left, right in zip(ours, theirs, strict=True):
        if left.shape != right.shape or not torch.isfinite(right).all():
            return float("inf")
        largest = max(largest, float((left.double() - right.double()).abs().max()) if left.numel() else 0.0)
    return largest


def online_difference(path: Path, model: CascadedTransducer, geometry: Geometry) -> float:
    """Three uneven streams, step by step in one batch, against whole utterances.

    They are longer than the left context and one step, so that the caches run over.
    """
    encoder = OnlineSession(path)
    steps = SUBSAMPLING * geometry.left_frames // encoder.step_frames
    features = random_features(model, (encoder.step_frames * count for count in (steps + 3, 1, steps + 5)), seed=1)
    whole = encode_whole(model, features, MODES[path.name], geometry)
    return _difference(whole, stream_together(encoder, features))


def offline_difference(path: Path, model: CascadedTransducer, geometry: Geometry) -> float:
    """Padded batches, also of audio shorter than one encoder frame."""
    session, differences = onnx_session(path), []
    for lengths in ((203, 322, 7), (3,), (SUBSAMPLING * geometry.left_frames + 101, 2)):
        features = random_features(model, lengths, seed=2)
        lens = torch.tensor(lengths)
        padded = pad_sequence(features, batch_first=True)
        out, out_lens = run_session(session, padded, lens)
        rows = [row[:length] for row, length in zip(out, out_lens.tolist(), strict=True)]
        differences.append(_difference(encode_whole(model, features, "full", geometry), rows))
    return max(differences)


def decoder_difference(path: Path, model: CascadedTransducer) -> float:
    """Random labels, and the first ones of sherpa-onnx: -1 everywhere, 0 last."""
    generator, size = torch.Generator().manual_seed(3), model.predictor.context_size
    labels = torch.randint(0, model.vocab_size, (7, size), generator=generator)
    labels[:3] = torch.zeros(3, size, dtype=torch.int64)
    labels[1, :-1] = -1
    labels[2, -1] = model.vocab_size - 1
    said = labels[:, -1].clone()
    start = model.predictor.initial_state(7)._replace(labels=torch.cat((said[:, None], labels[:, :-1]), 1).clamp(min=0))
    with torch.inference_mode():
        ours = model.predictor.step(said, start)[0]
    return _difference([ours], run_session(onnx_session(path), labels))


def joiner_difference(path: Path, model: CascadedTransducer, blank_penalty: float) -> float:
    generator, dim = torch.Generator().manual_seed(4), model.joiner.output_weight.shape[1]
    encoder_out, decoder_out = (torch.randn(5, dim, generator=generator) for _ in range(2))
    with torch.inference_mode():
        weight = model.joiner.output_weight
        ours = model.joiner(encoder_out.to(weight.dtype), decoder_out.to(weight.dtype))
        ours[:, 0] -= blank_penalty
    return _difference([ours], run_session(onnx_session(path), encoder_out, decoder_out))


def graph_differences(
    folder: Path, model: CascadedTransducer, geometry: Geometry, blank_penalty: float = 0.0
) -> dict[str, float]:
    """File name -> largest difference between onnxruntime and PyTorch in float64.

    Against float32 it would be twice as large: whole utterances and steps round their positions differently.

    Raises:
      ValueError: one is above TOLERANCE.
    """
    model = copy.deepcopy(model).double()
    differences = {name: online_difference(folder / name, model, geometry) for name in (STREAMING, LOOK_AHEAD)}
    differences[FULL] = offline_difference(folder / FULL, model, geometry)
    differences[DECODER] = decoder_difference(folder / DECODER, model)
    differences[JOINER] = joiner_difference(folder / JOINER, model, blank_penalty)
    for name, difference in differences.items():
        logging.info("%-24s differs from PyTorch by at most %.1e", name, difference)
    wrong = [f"{name} by {value:.1e}" for name, value in differences.items() if not value <= TOLERANCE]
    if wrong:
        raise ValueError(f"the exported files differ from PyTorch, {TOLERANCE} is allowed: {', '.join(wrong)}")
    return differences
