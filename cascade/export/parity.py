"""Do the exported graphs compute what PyTorch computes? onnxruntime runs each of them on random input."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cascade.config.options import SUBSAMPLING
from cascade.export.onnx import DECODER, FULL, JOINER, LOOK_AHEAD, MODES, NONCAUSAL, STREAMING
from cascade.export.sessions import NoncausalSession, OnlineSession, onnx_session, run_session, zero_inputs
from cascade.export.wrappers import Geometry
from cascade.models.predictor import LstmPredictor
from cascade.models.transducer import CascadedTransducer, Mode

TOLERANCE = 1e-4
"""Largest allowed difference from PyTorch in float64: float32 through all layers stays well below."""


def stream_together(encoder: OnlineSession, streams: list[Tensor]) -> list[Tensor]:
    """Run streams of different age in one batch: stream i begins at step i, and leaves when it ends.

    Args:
      streams: (T_i, F) features each; what is left over after whole steps is dropped.
    Returns:
      (T_i // 4, C) each.
    """
    size = encoder.step_frames
    num_steps = [stream.shape[0] // size for stream in streams]
    states = [encoder.initial_state(1) for _ in streams]
    outputs: list[list[np.ndarray]] = [[] for _ in streams]
    for step in range(max(start + count for start, count in enumerate(num_steps))):
        live = [index for index, count in enumerate(num_steps) if index <= step < index + count]
        if not live:
            continue
        features = np.stack([streams[i][(step - i) * size : (step - i + 1) * size].numpy() for i in live])
        joined = [np.concatenate(arrays) for arrays in zip(*(states[i] for i in live), strict=True)]
        encoder_out, joined = encoder.step(features, joined)
        for row, i in enumerate(live):
            outputs[i].append(encoder_out[row])
            states[i] = [array[row : row + 1] for array in joined]
    return [torch.from_numpy(np.concatenate(parts)) for parts in outputs]


def encode_whole(model: CascadedTransducer, features: list[Tensor], mode: Mode, geometry: Geometry) -> list[Tensor]:
    """PyTorch, in the model's type, on whole utterances (T_i, F), padded into one batch -> (T_i // 4, C) each."""
    encoder, lens = model.encoder, torch.tensor([frames.shape[0] for frames in features])
    padded = pad_sequence(features, batch_first=True).to(encoder.feature_mean.dtype)
    with torch.inference_mode():
        out, out_lens = encoder.forward_causal(padded, lens, geometry.chunk_frames, geometry.left_frames)
        if mode != "streaming":
            block = geometry.block_frames if mode == "look_ahead" else None
            out = encoder.forward_noncausal(out, out_lens, block, geometry.left_frames)
    return [row[:length] for row, length in zip(out, out_lens.tolist(), strict=True)]


def random_features(model: CascadedTransducer, lengths: Iterable[int], seed: int) -> list[Tensor]:
    """(T_i, F) float32 noise with the mean and spread of the training features."""
    generator = _generator(seed)
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


def noncausal_difference(path: Path, model: CascadedTransducer, geometry: Geometry) -> float:
    """Streams in blocks, the last ones shorter, and whole segments; both in padded batches of frames of unit size."""
    session, block = NoncausalSession(path), geometry.block_frames
    lens = torch.tensor([geometry.left_frames + 3 * block + 1, block, 5])
    frames = torch.randn(3, int(lens.max()), model.joiner.encoder_proj.in_features, generator=_generator(5))
    state, outputs = session.initial_state(3), []
    for start in range(0, frames.shape[1], block):
        part = frames[:, start : start + block]
        out, state = session.step(part.numpy(), (lens - start).clamp(0, part.shape[1]).numpy(), state)
        outputs.append(out)
    theirs = (np.concatenate(outputs, axis=1), session.whole(frames.numpy(), lens.numpy()))
    with torch.inference_mode():
        arguments = ((block, geometry.left_frames), (None, None))
        encode, frames = model.encoder.forward_noncausal, frames.to(model.encoder.feature_mean.dtype)
        ours = [encode(frames, lens, *contexts) for contexts in arguments]
    valid = torch.arange(frames.shape[1]) < lens[:, None]
    return _difference([out[valid] for out in ours], [torch.from_numpy(out)[valid] for out in theirs])


def offline_difference(path: Path, model: CascadedTransducer, geometry: Geometry) -> float:
    """Padded batches, also of audio shorter than one encoder frame."""
    session, differences = onnx_session(path), []
    for lengths in ((203, 322, 7), (3,), (SUBSAMPLING * geometry.left_frames + 101, 2)):
        features = random_features(model, lengths, seed=2)
        lens = torch.tensor(lengths)
        padded = pad_sequence(features, batch_first=True)
        out, out_lens = run_session(session, padded.numpy(), lens.numpy())
        rows = [torch.from_numpy(row[:length]) for row, length in zip(out, out_lens, strict=True)]
        differences.append(_difference(encode_whole(model, features, "full", geometry), rows))
    return max(differences)


def decoder_difference(path: Path, model: CascadedTransducer) -> float:
    """Random labels, of a predictor that sees the last ones only also the first ones of sherpa-onnx: -1, and 0 last."""
    session, predictor = onnx_session(path), model.predictor
    if isinstance(predictor, LstmPredictor):
        labels, difference = torch.randint(0, model.vocab_size, (5, 7), generator=_generator(3)), 0.0
        labels[0], state, theirs = 0, predictor.initial_state(7), zero_inputs(session, 1, 7, 0)
        for said in labels:
            with torch.inference_mode():
                ours, state = predictor.step(said, state)
            out, *theirs = run_session(session, said.numpy(), *theirs)
            difference = max(difference, _difference([ours], [torch.from_numpy(out)]))
        return difference
    size = predictor.context_size
    labels = torch.randint(0, model.vocab_size, (7, size), generator=_generator(3))
    labels[:3] = torch.zeros(3, size, dtype=torch.int64)
    labels[1, :-1] = -1
    labels[2, -1] = model.vocab_size - 1
    said = labels[:, -1].clone()
    start = predictor.initial_state(7)._replace(labels=torch.cat((said[:, None], labels[:, :-1]), 1).clamp(min=0))
    with torch.inference_mode():
        ours = predictor.step(said, start)[0]
    return _difference([ours], [torch.from_numpy(out) for out in run_session(session, labels.numpy())])


def joiner_difference(path: Path, model: CascadedTransducer, blank_penalty: float) -> float:
    joiner, generator = model.joiner, _generator(4)
    frames, vectors = (
        torch.randn(5, layer.in_features, generator=generator) for layer in (joiner.encoder_proj, joiner.output)
    )
    with torch.inference_mode():
        dtype = joiner.output_weight.dtype
        ours = joiner(joiner.project_encoder(frames.to(dtype)), vectors.to(dtype))
        ours[:, 0] -= blank_penalty
    theirs = run_session(onnx_session(path), frames.numpy(), vectors.numpy())
    return _difference([ours], [torch.from_numpy(out) for out in theirs])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def graph_differences(
    folder: Path, model: CascadedTransducer, geometry: Geometry, blank_penalty: float = 0.0
) -> dict[str, float]:
    """File name -> largest difference between onnxruntime and PyTorch in float64.

    Against float32 it would be twice as large: whole utterances and steps round their positions differently.

    Raises:
      ValueError: one is above TOLERANCE.
    """
    model = copy.deepcopy(model).double()
    measures = {STREAMING: online_difference, LOOK_AHEAD: online_difference, NONCAUSAL: noncausal_difference,
                FULL: offline_difference}  # fmt: skip
    differences = {
        name: measure(folder / name, model, geometry) for name, measure in measures.items() if (folder / name).is_file()
    }
    differences[DECODER] = decoder_difference(folder / DECODER, model)
    differences[JOINER] = joiner_difference(folder / JOINER, model, blank_penalty)
    for name, difference in differences.items():
        logging.info("%-24s differs from PyTorch by at most %.1e", name, difference)
    wrong = [f"{name} by {value:.1e}" for name, value in differences.items() if not value <= TOLERANCE]
    if wrong:
        raise ValueError(f"the exported files differ from PyTorch, {TOLERANCE} is allowed: {', '.join(wrong)}")
    return differences
