"""A model directory with random weights, which has the size and the pace of a trained model and no sense.

    python tools/random_model.py --config egs/librispeech/conf/data.yaml egs/librispeech/conf/teacher.yaml \\
        egs/librispeech/conf/student.yaml --wav DIR --out exp/random

Benchmarks of compute need no more. The tokens are of made-up words. The blank's bias is set so that the model says a
symbol in a tenth of the frames of these recordings, 2.5 a second; else it would say one in all of them or none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.audio.fbank import compute_fbank  # noqa: E402
from cascade.bin.cli import add_config_arguments, config_from_arguments, run_program  # noqa: E402
from cascade.checkpoint import model_values, save_file  # noqa: E402
from cascade.config.load import save_config  # noqa: E402
from cascade.config.options import Config  # noqa: E402
from cascade.models.build import build_model  # noqa: E402
from cascade.models.torch_engine import TorchEngine, encode_batch  # noqa: E402
from cascade.models.transducer import CascadedTransducer  # noqa: E402
from cascade.search.greedy import GreedySearch  # noqa: E402
from cascade.search.methods import DEFAULT_CHUNK_MS, DecodingOptions, default_left_context_ms  # noqa: E402
from cascade.text.tokens import train_tokenizer  # noqa: E402
from tools.bench_serve import read_turns  # noqa: E402

SHARE, PASSES = 0.1, ("streaming", "look_ahead")


def made_up_words(rng: np.random.Generator, count: int = 3000) -> list[str]:
    """Words of one to four syllables, enough for a vocabulary of any usual size."""
    syllables = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("", "n", "s")]
    return ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(count)]


def set_pace(model: CascadedTransducer, config: Config, features: torch.Tensor) -> float:
    """Lower the blank's bias until the pass that says more says something in a tenth of the frames; that share."""
    lens, engine = torch.tensor([len(features)]), TorchEngine(model)
    left = default_left_context_ms(config, DEFAULT_CHUNK_MS)
    passes = [
        encode_batch(model, features[None], lens, DecodingOptions(mode=mode, left_context_ms=left)) for mode in PASSES
    ]
    low, high = -50.0, 50.0
    for _ in range(20):
        penalty = (low + high) / 2
        search = GreedySearch(engine, penalty, unk_id=1)
        said = [search.decode(out.numpy(), lens.numpy())[0][0].tokens for out, lens in passes]
        share = max(map(len, said)) / int(passes[0][1])
        low, high = (penalty, high) if share < SHARE else (low, penalty)
    model.joiner.output.bias.data[0] -= penalty
    return share


def make_random_model(config: Config, folder: Path, samples: np.ndarray) -> float:
    """Write the model directory; returns the share of these samples' frames in which it says something.

    samples: (num_samples,) int16 speech.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    words = made_up_words(rng)
    sentences = [" ".join(words[start : start + 10]) for start in range(0, len(words), 10)]
    tokenizer = train_tokenizer(sentences, config.tokens, folder / "tokens")
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer.vocab_size).eval()
    features = torch.as_tensor(compute_fbank(samples.astype(np.float32) / 32768, config.features))
    model.encoder.set_feature_stats(features.mean(0), features.std(0))
    model.joiner.output.bias.data[1] = -100.0  # <unk> counts as blank; -1e4 would round coarser than the export allows
    share = set_pace(model, config, features)
    save_config(config, folder / "config.yaml")
    save_file(model_values(model, config, 1), folder / "averaged.pt")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write it")
    parser.add_argument("--wav", type=Path, nargs="+", required=True, metavar="PATH", help="recordings or folders")
    arguments = parser.parse_intermixed_args()
    samples = np.concatenate(read_turns(arguments.wav, limit=4))
    share = make_random_model(config_from_arguments(arguments), arguments.out, samples)
    print(f"{arguments.out}: random weights, a symbol in {100 * share:.0f} % of the frames")


if __name__ == "__main__":
    run_program(main)
