"""Exported files in onnxruntime: arrays in, arrays out, bound by position as sherpa-onnx binds them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

STREAMING, LOOK_AHEAD, FULL = "encoder-streaming.onnx", "encoder-look-ahead.onnx", "encoder-full.onnx"
NONCAUSAL = "encoder-noncausal.onnx"
DECODER, JOINER = "decoder.onnx", "joiner.onnx"


def int8_name(name: str) -> str:
    """The file beside a float32 one that computes in 8 bits, as sherpa-onnx's users know it."""
    return name.removesuffix(".onnx") + ".int8.onnx"


def onnx_session(path: Path) -> Any:
    """An onnxruntime session on one CPU thread.

    Raises:
      ImportError: onnxruntime is missing.
      ValueError: it cannot load the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("running ONNX files needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each of onnxruntime's is a class of its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or not for this onnxruntime ({reason}): export again") from error


def run_session(session: Any, *values: np.ndarray) -> list[np.ndarray]:
    """Outputs in order, for inputs in order."""
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, values, strict=True)))


def zero_inputs(session: Any, first: int, batch_size: int, num_frames: int) -> list[np.ndarray]:
    """Zeros for the inputs from the one with index `first` on: the states of `batch_size` new streams.

    Args:
      num_frames: the length of axes, behind the first one, that the graph leaves open.
    """
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    return [
        np.zeros((batch_size, *(size if isinstance(size, int) else num_frames for size in state.shape[1:])),
                 types[state.type])
        for state in session.get_inputs()[first:]
    ]  # fmt: skip


class OnlineSession:
    """An online encoder, driven as sherpa-onnx drives it, by its metadata."""

    def __init__(self, path: Path) -> None:
        self._session = onnx_session(path)
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        self.step_frames = int(self.metadata["decode_chunk_len"])
        """Feature frames of one step."""

    def initial_state(self, batch_size: int) -> list[np.ndarray]:
        """Zeros in the shapes that the metadata describe."""
        names = ("num_heads", "left_context_len", "head_dim", "intermediate_size", "csgu_kernel_size", "hidden_size")
        heads, left, head_dim, intermediate, kernel, hidden = (int(self.metadata[name]) for name in names)
        cache = (heads, left, head_dim)
        convolution = (intermediate // 2, kernel - 1)
        fusion = (2 * hidden, int(self.metadata["merge_conv_kernel"]) - 1)
        shapes = (cache, cache, convolution, fusion) * int(self.metadata["num_hidden_layers"])
        layers = [np.zeros((batch_size, *shape), np.float32) for shape in shapes]
        return [*layers, np.zeros(batch_size, np.int64)]

    def step(self, features: np.ndarray, states: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """(N, step_frames, F) features -> (N, step_frames / 4, C) and the new states."""
        encoder_out, *states = run_session(self._session, features, *states)
        return encoder_out, states


class NoncausalSession:
    """The non-causal encoder on causal output: block by block behind a left context, or over whole segments.

    It is loaded with its first use: mode streaming does without.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _session(self) -> Any:
        return onnx_session(self._path)

    @property
    def left_frames(self) -> int:
        return int(self._session.get_modelmeta().custom_metadata_map["left_context_len"])

    def initial_state(self, batch_size: int) -> list[np.ndarray]:
        """The state of new streams: zeros."""
        return zero_inputs(self._session, 2, batch_size, self.left_frames)

    def step(
        self, causal_out: np.ndarray, lens: np.ndarray, states: list[np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """One block (N, T, C), (N,) int64 valid frames -> (N, T, C) and the new states."""
        encoder_out, *states = run_session(self._session, causal_out, lens, *states)
        return encoder_out, states

    def whole(self, causal_out: np.ndarray, lens: np.ndarray) -> np.ndarray:
        """Whole segments (N, T, C), (N,) int64 valid frames -> (N, T, C): one block each, and nothing before it."""
        return self.step(causal_out, lens, zero_inputs(self._session, 2, len(lens), 0))[0]


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The float32 weights of an ONNX file by name; what is no such weight is left out.

    onnxruntime does not hand them out, and the package onnx is not needed where files only run. Numbers of the fields
    are those of onnx.proto: graph 7, its initializers 5; of these dims 1, data_type 2 (float 1), name 8, raw_data 9.
    """
    weights = {}
    for number, graph in _fields(memoryview(path.read_bytes())):
        for inner, tensor in _fields(graph) if number == 7 else ():
            if inner == 5:
                parts = list(_fields(tensor))
                values = dict(parts)
                if values.get(2) == 1 and 9 in values:
                    shape = [value for field, value in parts if field == 1]
                    # copied: inside the file they are not aligned, and every product with them would copy them again
                    weights[bytes(values[8]).decode()] = np.frombuffer(values[9], "<f4").reshape(shape).copy()
    return weights


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields: whole numbers, or bytes.

    Raises:
      ValueError: the message is none.
    """
    place = 0

    def whole_number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        number, kind = divmod(whole_number(), 8)
        if kind == 0:
            yield number, whole_number()
            continue
        size = {1: 8, 5: 4}.get(kind) or (whole_number() if kind == 2 else 0)
        if not size and kind != 2:
            raise ValueError("not an ONNX file")
        yield number, message[place : place + size]
        place += size
