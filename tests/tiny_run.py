"""A model directory with random weights and a few recordings of noise, for tests of programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from cascade.checkpoint import epoch_path, model_values, save_file
from cascade.config.load import load_config, save_config
from cascade.config.options import Config
from cascade.models.build import build_model
from cascade.text.tokens import train_tokenizer

TEXTS = ("one two", "three", "two three four five", "")
SECONDS = (1.3, 0.45, 2.07, 0.8)
OVERRIDES = [
    "model.d_model=16", "model.subsampling_channels=4", "model.joiner_dim=16", "tokens.kind=word",
    *(f"model.{name}.{value}" for name in ("causal", "noncausal")
      for value in ("num_layers=2", "num_heads=2", "feedforward_dim=16", "kernel_size=5")),
]


def call(monkeypatch, program, *arguments) -> None:
    """Run a program's `main` with these words, and leave torch's settings as they were."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        program.main()
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def tiny_config(predictor: str = "tied_reduced", *overrides: str) -> Config:
    model = [f"model.predictor.kind={predictor}", "model.predictor.hidden_dim=16"]
    return load_config([], [*OVERRIDES, *model, *overrides])


def make_model_dir(
    folder: Path, predictor: str = "tied_reduced", epochs: int = 2, overrides: Sequence[str] = ()
) -> Path:
    """averaged.pt, epoch-N.pt, config.yaml and tokens/ in `folder`."""
    folder.mkdir(parents=True)
    config = tiny_config(predictor, *overrides)
    tokenizer = train_tokenizer(TEXTS, config.tokens, folder / "tokens")
    save_config(config, folder / "config.yaml")
    for epoch in range(1, epochs + 1):
        torch.manual_seed(epoch)
        model = build_model(dataclasses.replace(config, seed=epoch), tokenizer.vocab_size)
        model.joiner.encoder_proj.weight.data *= 4.0  # so that the best symbol changes from frame to frame
        model.joiner.output.weight.data *= 4.0
        model.joiner.output.bias.data[:2] -= torch.tensor([2.0, 20.0])  # <unk> would count as blank
        model.encoder.set_feature_stats(torch.full((80,), -8.0), torch.full((80,), 4.0))
        save_file(model_values(model, config, epoch), epoch_path(folder, epoch))
    save_file(model_values(model, config, epochs), folder / "averaged.pt")
    return folder


def make_manifest(folder: Path) -> Path:
    """MANIFEST.jsonl of noise, with one recording that is not audio."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, lines = np.random.default_rng(1), []
    for number, (text, seconds) in enumerate(zip(TEXTS, SECONDS, strict=True)):
        samples = 0.2 * generator.standard_normal(int(seconds * 16000)) * np.sin(np.arange(int(seconds * 16000)) / 3000)
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        lines.append({"id": f"utt-{number}", "path": f"{number}.wav", "text": text, "speaker": f"speaker-{number % 2}"})
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    lines.append({"id": "broken", "path": "broken.wav", "text": "one"})
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
