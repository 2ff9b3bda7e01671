"""Write the networks of `wrappers` as ONNX files with the metadata that sherpa-onnx reads."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cascade.config.options import ConfigError
from cascade.export.sessions import DECODER, FULL, JOINER, LOOK_AHEAD, NONCAUSAL, STREAMING
from cascade.export.wrappers import (
    Decoder,
    Geometry,
    JoinerNetwork,
    NoncausalEncoder,
    OfflineEncoder,
    OnlineEncoder,
    RecurrentDecoder,
)
from cascade.models.predictor import LstmPredictor
from cascade.models.transducer import CascadedTransducer, Mode

OPSET = 17
MODES: dict[str, Mode] = {STREAMING: "streaming", LOOK_AHEAD: "look_ahead", FULL: "full"}
"""Encoder file -> the pass it runs."""
TOKEN_FILES = ("tokens.txt", "bpe.vocab", "tokenizer.json", "tokens.model")
_TRACED_FRAMES = 50


@dataclass(frozen=True)
class Graph:
    """A network and how its graph's borders are called."""

    network: nn.Module
    inputs: dict[str, Tensor]
    """Example values: a batch of two, so that no size of 1 is taken for a constant."""
    outputs: tuple[str, ...]
    time_axes: dict[str, int] = field(default_factory=dict)
    """Inputs and outputs with another axis that is dynamic; the first one always is."""


def build_graphs(model: CascadedTransducer, geometry: Geometry, blank_penalty: float = 0.0) -> dict[str, Graph]:
    """File name -> graph; the blank penalty becomes part of the joiner's bias.

    A model with an LSTM predictor has no graphs that only sherpa-onnx would run.

    Raises:
      ConfigError: the features do not fit sherpa-onnx's states.
    """
    num_mel_bins = model.encoder.subsampling.num_mel_bins
    if num_mel_bins % 2:
        raise ConfigError(f"features.num_mel_bins must be even to be exported, got {num_mel_bins}")
    frames, vectors = (torch.zeros(2, layer.in_features) for layer in (model.joiner.encoder_proj, model.joiner.output))
    joiner = Graph(
        JoinerNetwork(model, blank_penalty), {"encoder_out": frames, "decoder_out": vectors}, ("logits",)
    )
    graphs = {
        STREAMING: _online_graph(OnlineEncoder(model, geometry, MODES[STREAMING])),
        NONCAUSAL: _noncausal_graph(NoncausalEncoder(model, geometry), frames.shape[1]),
    }
    if isinstance(model.predictor, LstmPredictor):
        states = model.predictor.initial_state(2)._asdict()
        inputs, outputs = {"labels": torch.zeros(2, dtype=torch.int64)} | states, [f"next_{name}" for name in states]
        return graphs | {DECODER: Graph(RecurrentDecoder(model), inputs, ("decoder_out", *outputs)), JOINER: joiner}
    labels = torch.zeros(2, model.predictor.context_size, dtype=torch.int64)
    offline = {"x": torch.zeros(2, _TRACED_FRAMES, num_mel_bins), "x_lens": torch.tensor([_TRACED_FRAMES, 30])}
    return graphs | {
        LOOK_AHEAD: _online_graph(OnlineEncoder(model, geometry, MODES[LOOK_AHEAD])),
        FULL: Graph(
            OfflineEncoder(model, geometry), offline, ("encoder_out", "encoder_out_lens"), {"x": 1, "encoder_out": 1}
        ),
        DECODER: Graph(Decoder(model), {"labels": labels}, ("decoder_out",)), JOINER: joiner,
    }  # fmt: skip


def _online_graph(encoder: OnlineEncoder) -> Graph:
    features = torch.zeros(2, encoder.step_frames, encoder.encoder.subsampling.num_mel_bins)
    inputs = {"x": features} | dict(zip(encoder.state_names, encoder.initial_state(2), strict=True))
    return Graph(encoder, inputs, ("encoder_out", *(f"next_{name}" for name in encoder.state_names)))


def _noncausal_graph(encoder: NoncausalEncoder, dim: int) -> Graph:
    frames = {"x": torch.zeros(2, _TRACED_FRAMES, dim), "x_lens": torch.tensor([_TRACED_FRAMES, 30])}
    inputs = frames | dict(zip(encoder.state_names, encoder.initial_state(2), strict=True))
    caches = [name for name in encoder.state_names if name.startswith(("key", "value"))]
    time_axes = {"x": 1, "encoder_out": 1} | dict.fromkeys((*caches, *(f"next_{name}" for name in caches)), 2)
    return Graph(encoder, inputs, ("encoder_out", *(f"next_{name}" for name in encoder.state_names)), time_axes)


def write_graph(graph: Graph, path: Path, fields: dict[str, str | int]) -> None:
    """Trace the network, write it to `path`, add its metadata and `fields`, check the file.

    Raises:
      ImportError: the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("writing ONNX files needs the package onnx: pip install onnx") from error
    names = [*graph.inputs, *graph.outputs]
    times = graph.time_axes
    axes = {name: {0: "N"} | ({times[name]: f"T_{name}"} if name in times else {}) for name in names}
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter announces its successor, and warns of each branch on a size that is constant here.
        warnings.simplefilter("ignore", category=DeprecationWarning)
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="Constant folding")
        torch.onnx.export(
            graph.network.eval(), tuple(graph.inputs.values()), str(path), opset_version=OPSET, dynamo=False,
            input_names=list(graph.inputs), output_names=list(graph.outputs), dynamic_axes=axes,
        )
    proto = onnx.load(str(path))
    metadata = graph.network.metadata() | fields
    onnx.helper.set_model_props(proto, {key: str(value) for key, value in metadata.items()})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def write_files(graphs: dict[str, Graph], tokens_dir: Path, out: Path, fields: dict[str, str | int]) -> None:
    """All graphs and the tokenizer's files (sherpa-onnx reads tokens.txt and bpe.vocab) into the folder `out`."""
    for name, graph in graphs.items():
        write_graph(graph, out / name, fields)
    for name in TOKEN_FILES:
        if (tokens_dir / name).is_file():
            shutil.copyfile(tokens_dir / name, out / name)
