"""A model directory with random weights, which has the size and the pace of a trained model and no sense.

    python tools/random_model.py --config egs/librispeech/conf/data.yaml egs/librispeech/conf/teacher.yaml \
        egs/librispeech/conf/student.yaml --out exp/random

Benchmarks of compute need no more. The tokens are of made-up words. The blank's bias is set so that noise makes the
model say a symbol in a tenth of the frames, 2.5 a second, as speech does; else it would say one in all of them or none.
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
from cascade.search.methods import DecodingOptions  # noqa: E402
from cascade.text.tokens import train_tokenizer  # noqa: E402

SHARE = 0.1
NOISE_SECONDS = 30


def made_up_words(rng: np.random.Generator, count: int = 3000) -> list[str]:
    """Words of one to four syllables, enough for a vocabulary of any usual size."""
    syllables = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("", "n", "s")]
    return ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(count)]


def noise_features(config: Config, rng: np.random.Generator) -> torch.Tensor:
    """(T, F) frames of noise that swells and fades."""
    rate = config.features.sampling_rate
    time = np.arange(NOISE_SECONDS * rate) / rate
    samples = 0.1 * rng.standard_normal(len(time)) * np.abs(np.sin(3 * time) * np.sin(17 * time))
    return torch.as_tensor(compute_fbank(samples.astype(np.float32), config.features))


def set_pace(model: CascadedTransducer, features: torch.Tensor) -> float:
    """Lower the blank's bias until a tenth of the frames say something; returns the share that does."""
    options = DecodingOptions(mode="streaming")
    encoder_out, lens = (each.numpy() for each in encode_batch(model, features[None], torch.tensor([len(features)]),
                                                               options))
    low, high = -50.0, 50.0
    for _ in range(20):
        penalty = (low + high) / 2
        ((said,),) = GreedySearch(TorchEngine(model), penalty, unk_id=1).decode(encoder_out, lens)
        share = len(said.tokens) / lens[0]
        low, high = (penalty, high) if share < SHARE else (low, penalty)
    model.joiner.output.bias.data[0] -= penalty
    return share


def make_random_model(config: Config, folder: Path) -> float:
    """Write the model directory; returns the share of frames in which it says something."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    words = made_up_words(rng)
    sentences = [" ".join(words[start : start + 10]) for start in range(0, len(words), 10)]
    tokenizer = train_tokenizer(sentences, config.tokens, folder / "tokens")
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer.vocab_size).eval()
    features = noise_features(config, rng)
    model.encoder.set_feature_stats(features.mean(0), features.std(0))
    model.joiner.output.bias.data[1] = -1e4  # <unk> counts as blank
    share = set_pace(model, features)
    save_config(config, folder / "config.yaml")
    save_file(model_values(model, config, 1), folder / "averaged.pt")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write it")
    arguments = parser.parse_intermixed_args()
    share = make_random_model(config_from_arguments(arguments), arguments.out)
    print(f"{arguments.out}: random weights, a symbol in {100 * share:.0f} % of the frames")


if __name__ == "__main__":
    run_program(main)
