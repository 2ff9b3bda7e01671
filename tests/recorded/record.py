"""Record what this version's models are and say; later versions must load them and say the same.

    python -m tests.recorded.record NAME      # makes tests/recorded/NAME; recorded folders are never made anew

A folder has two model directories of random weights, the exported files of one of them and said.json: the words and
their times that each says in each mode and search.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cascade.provenance import git_commit
from cascade.recognizer import Recognizer
from cascade.search.methods import METHODS, STREAMING_MODES

FOLDER = Path(__file__).parent
PREDICTORS = ("tied_reduced", "lstm")
EXPORTED = "tied_reduced"


def noise() -> np.ndarray:
    """(num_samples,) int16: 2.5 s of noise whose loudness changes."""
    rng = np.random.RandomState(7)  # the same numbers with every numpy
    loudness = np.repeat(rng.uniform(0, 8000, 25), 1600)
    return (loudness * rng.uniform(-1, 1, 40000)).astype(np.int16)


def said(folder: Path) -> Iterator[tuple[str, str]]:
    """What the models of a folder say: (model, mode, search) in one text, the words with their starts in another."""
    for model in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        for mode in STREAMING_MODES:
            for method in METHODS:
                stream = Recognizer(folder / model, mode=mode, method=method).stream()
                stream.accept(noise(), 16000)
                words = [f"{word.word}@{word.start:.2f}" for word in stream.finish().words]
                yield f"{model} {mode} {method}", " ".join(words)


def main(name: str) -> None:
    from cascade.bin import export_onnx
    from tests.tiny_run import make_model_dir

    folder = FOLDER / name
    for predictor in PREDICTORS:
        make_model_dir(folder / predictor, predictor, epochs=1, overrides=["model.predictor.embedding_dim=16"])
        (folder / predictor / "epoch-1.pt").unlink()
    sys.argv = ["export_onnx", "--exp-dir", str(folder / EXPORTED), "--out", str(folder / "exported")]
    export_onnx.main()
    for path in (folder / "exported").iterdir():  # what sherpa-onnx alone reads, and the folder's own README
        if path.name in ("encoder-full.onnx", "encoder-look-ahead.onnx", "README.md"):
            path.unlink()
    texts = {"commit": git_commit(), **dict(said(folder))}
    (folder / "said.json").write_text(json.dumps(texts, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
