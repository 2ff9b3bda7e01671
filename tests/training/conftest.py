import contextlib
import importlib
import io
import json
import os
import sys
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch

from cascade.bin.cli import run_program

WORDS = ["ONE", "TWO", "THREE", "FOUR"]
OPTIONS = [
    "model.d_model=16", "model.subsampling_channels=2", "model.joiner_dim=12", "tokens.kind=word",
    *(f"model.{name}.{value}" for name in ("causal", "noncausal")
      for value in ("num_layers=1", "num_heads=2", "feedforward_dim=16", "kernel_size=3")),
    "model.predictor.context_size=2", "model.predictor.num_heads=2", "model.predictor.hidden_dim=8",
    "model.predictor.embedding_dim=8", "context.chunk_frames=[2,4]", "context.left_chunks=[4,-1]",
    "context.block_chunks=[2,-1]", "data.speed_factors=[1.0]", "data.batch_duration=4.0", "data.num_buckets=2",
    "loss.prune_range=3", "loss.warmup_steps=3", "loss.ctc_scale=0.3", "training.num_epochs=2",
    "training.average_last=2", "training.warmup_steps=4", "training.log_every_steps=2",
]


class Done(NamedTuple):
    returncode: int
    stderr: str


def run(*words, check=True):
    """Run one program as a user would, but in this process: importing torch anew takes longer than the program."""
    module = importlib.import_module(f"cascade.bin.{words[0]}")
    errors, code, argv = io.StringIO(), 0, sys.argv
    sys.argv = [module.__file__, *map(str, words[1:])]
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stderr(errors):
            run_program(module.main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    assert not check or code == 0, errors.getvalue()
    return Done(code, errors.getvalue())


class Fork:
    """One program in a fork of this process, so that signals and limits can end it; `before` is called in it first."""

    def __init__(self, *words, before=lambda: None):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        code = 99
        try:
            before()
            done = run(*words, check=False)
            with open(writer, "w") as file:
                file.write(done.stderr)
            code = done.returncode
        finally:
            os._exit(code)

    def wait(self) -> Done:
        """Exit code (-N: ended by signal N) and stderr (nothing of a killed one)."""
        with open(self.reader) as file:
            errors = file.read()
        return Done(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), errors)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Stages 0 to 2 on a dozen seconds of modulated noise: a folder with data/, fbank/ and tokens/."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    manifests = folder / "manifests"
    manifests.mkdir()
    for split, count in (("train", 11), ("dev", 3), ("test", 2)):
        lines = []
        for number in range(count):
            name, words = f"{split}-{number}", generator.choice(WORDS, generator.integers(1, 4))
            time = np.arange(int(generator.integers(11000, 20000))) / 16000
            samples = 0.1 * generator.standard_normal(len(time)) * (1.2 + np.sin(20 * time))
            soundfile.write(manifests / f"{name}.wav", samples, 16000)
            lines.append({"id": name, "path": f"{name}.wav", "text": " ".join(words), "speaker": str(number % 3)})
        (manifests / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("prepare_data", "--manifest-dir", manifests, "--out", folder / "data", *OPTIONS)
    run("compute_features", "--data", folder / "data", "--out", folder / "fbank", "--num-jobs", 1, *OPTIONS)
    run("train_tokens", "--data", folder / "data", "--out", folder / "tokens", *OPTIONS)
    return folder


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A finished model directory with a tied-and-reduced predictor; only to be read."""
    exp_dir = tmp_path_factory.mktemp("trained") / "model"
    run("train", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", exp_dir, "--threads", 1,
        *OPTIONS)
    return exp_dir


@pytest.fixture
def train(corpus):
    """train(exp_dir, *words): the training program on the tiny corpus."""

    def call(exp_dir, *words, check=True):
        inputs = ["--data", corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", exp_dir, "--threads", 1]
        return run("train", *inputs, *OPTIONS, *words, check=check)

    return call
