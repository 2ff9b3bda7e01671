"""Tiny models, exported once for all tests; chunk 2, block 4, left context 6 encoder frames."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cascade.audio.fbank import StreamingFbank
from cascade.checkpoint import load_model, model_values, save_file
from cascade.config.load import load_config, save_config
from cascade.config.options import Config
from cascade.export.onnx import build_graphs, write_files
from cascade.export.sherpa import synthetic_recordings
from cascade.export.wrappers import Geometry
from cascade.models.build import build_model
from cascade.models.transducer import CascadedTransducer
from cascade.text.tokens import Tokenizer, train_tokenizer

TEXTS = ["one two three", "four five six seven", "eight nine ten", "oh zero eleven twelve"]
GEOMETRY = Geometry(chunk_frames=2, block_frames=4, left_frames=6)
TINY = [
    "model.d_model=16", "model.subsampling_channels=4", "model.joiner_dim=24", "model.causal.num_layers=2",
    "model.noncausal.num_layers=1", "model.causal.num_heads=2", "model.causal.kernel_size=5",
    *(f"model.{name}.feedforward_dim=16" for name in ("causal", "noncausal")),
]
KINDS = {
    "tied, centred, byte tokens": [
        "model.noncausal.num_heads=2", "model.noncausal.kernel_size=7", "tokens.kind=char", "tokens.vocab_size=300",
        "tokens.byte_fallback=true",
    ],
    "stateless, left, other heads and kernel": [
        "model.noncausal.num_heads=4", "model.noncausal.kernel_size=9", "model.noncausal.convolution=left",
        "model.predictor.kind=stateless", "model.predictor.context_size=2", "model.predictor.embedding_dim=16",
        "tokens.kind=bpe", "tokens.vocab_size=30",
    ],
    "lstm": ["model.noncausal.num_heads=2", "model.predictor.kind=lstm", "model.predictor.hidden_dim=16"],
}


class Exported(NamedTuple):
    model: CascadedTransducer
    config: Config
    tokenizer: Tokenizer
    model_dir: Path
    folder: Path


def make_model_dir(folder: Path, kind: str, *overrides: str) -> Path:
    """averaged.pt, config.yaml and tokens/ of a model with random weights that says something at many frames."""
    config = load_config([], [*TINY, "tokens.kind=word", *KINDS[kind], *overrides])
    folder.mkdir()
    tokenizer = train_tokenizer(TEXTS, config.tokens, folder / "tokens")
    save_config(config, folder / "config.yaml")
    torch.manual_seed(1)
    model = build_model(config, tokenizer.vocab_size)
    fbank = StreamingFbank(config.features)
    features = torch.from_numpy(fbank.accept(synthetic_recordings((3.0,), 16000, seed=2).popitem()[1]))
    model.encoder.set_feature_stats(features.mean(dim=0), features.std(dim=0))
    model.joiner.encoder_proj.weight.data *= 4.0  # so that the best symbol changes from frame to frame
    model.joiner.output.weight.data *= 4.0
    model.joiner.output.bias.data[1] -= 20.0  # <unk> would count as blank
    with torch.no_grad():
        frames = model.eval().encode(features[None], torch.tensor([len(features)]), "full", 2, 6)[0]
        logits = model.joiner(frames, model.predictor(torch.zeros(1, 0, dtype=torch.int64)))[0]
        # Half of the first symbols are blanks.
        model.joiner.output.bias[0] += (logits[:, 1:].amax(dim=1) - logits[:, 0]).median()
    save_file(model_values(model, config, 1), folder / "averaged.pt")
    return folder


@pytest.fixture(scope="session", params=[kind for kind in KINDS if kind != "lstm"])
def exported(request, tmp_path_factory) -> Exported:
    """A model directory and a folder with its files."""
    model_dir = make_model_dir(tmp_path_factory.mktemp("export") / "student", request.param)
    model, config, tokenizer = load_model(model_dir)
    folder = model_dir.parent / "onnx"
    folder.mkdir()
    write_files(build_graphs(model, GEOMETRY), model_dir / "tokens", folder, {"chunk_ms": 80})
    return Exported(model, config, tokenizer, model_dir, folder)
