#!/usr/bin/env python
"""Mix recorded noise into a test set: python tools/mix_noise.py --manifest TEST --noise-dir DIR --snr 20 10 --out OUT.

TEST is CUTS.jsonl.gz or MANIFEST.jsonl. OUT gets snr20.jsonl, snr10.jsonl, ... for `decode --manifest`, and their
recordings below snr20/, snr10/, ... An utterance has the same stretch of the same noise in all of them, drawn
by --seed and its name, repeated where it is shorter. The ratio is that of mean powers, speech where there is any by the
noise's stretch, in dB; what would leave the range of samples is scaled down as a whole.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.audio.io import read_audio  # noqa: E402
from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import check_values  # noqa: E402
from cascade.config.options import ConfigError  # noqa: E402
from cascade.corpus.cuts import Speech, read_speech  # noqa: E402
from cascade.corpus.manifests import Utterance, write_manifest  # noqa: E402
from cascade.corpus.synthetic.noise import mix_noise  # noqa: E402
from cascade.data.alignments import TimedWord, read_alignments  # noqa: E402
from cascade.data.audio_folder import find_audio  # noqa: E402
from cascade.files import replacing  # noqa: E402
from cascade.log import progress  # noqa: E402

SILENT_POWER = 1e-9
"""-90 dB: what is quieter is no noise to be amplified."""


class Noises:
    """The recordings of a folder; each is read when it is first drawn.

    Raises:
      ValueError: no such folder, or no audio in it.
    """

    def __init__(self, folder: Path, sampling_rate: int) -> None:
        self._folder, self._rate, self._names = folder, sampling_rate, find_audio(folder, "--noise-dir")
        self._read: dict[str, np.ndarray] = {}

    def stretch(self, num_samples: int, seed: int) -> np.ndarray:
        """(num_samples,) float32 of mean power 1.

        Raises:
          ValueError: an unusable recording, or none that is not silent after a hundred draws.
        """
        generator = np.random.default_rng(seed)
        for _ in range(100):
            name = self._names[generator.integers(len(self._names))]
            if name not in self._read:
                self._read[name] = read_audio(self._folder / name, self._rate)[0]
            noise = self._read[name]
            first = generator.integers(max(1, len(noise) - num_samples + 1))
            noise = np.resize(noise[first : first + num_samples], num_samples)
            power = np.mean(noise.astype(np.float64) ** 2)
            if power > SILENT_POWER:
                return noise / np.float32(math.sqrt(power))
        raise ValueError(f"--noise-dir {self._folder} holds silence and nothing to mix")


def write_noisy(
    speech: list[Speech], words: dict[str, list[TimedWord]], noises: Noises, snr: float, rate: int, seed: int, out: Path
) -> None:
    """Write one ratio's recordings, and their manifest, with the words' times, last."""
    name = f"snr{snr:g}"
    (out / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for utterance in progress(speech, name):
        noise = noises.stretch(len(utterance.samples), zlib.crc32(f"{seed} {utterance.id}".encode()))
        noisy = mix_noise(utterance.samples, noise, snr)
        noisy /= max(1.0, float(np.abs(noisy).max()))
        path = out / name / f"{len(lines):06d}.flac"
        with replacing(path) as temporary:
            soundfile.write(temporary, noisy, rate, format="FLAC", subtype="PCM_16")
        times = [[word.start, word.end] for word in words.get(utterance.id, [])]
        given = times if len(times) == len(utterance.text.split()) else None
        lines.append(Utterance(utterance.id, Path(name) / path.name, utterance.text, utterance.speaker, words=given))
    write_manifest(out / f"{name}.jsonl", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, metavar="TEST", help="CUTS.jsonl.gz or MANIFEST.jsonl")
    parser.add_argument("--noise-dir", type=Path, required=True, metavar="DIR", help="recordings, in sub-folders too")
    parser.add_argument("--snr", type=float, nargs="+", default=[20, 10, 5, 0], metavar="DB")
    parser.add_argument("--sampling-rate", type=int, default=16000, metavar="HZ", help="of what is written")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT")
    arguments = parser.parse_args()
    check_values(arguments, sampling_rate=1000)
    if not all(map(math.isfinite, arguments.snr)):
        raise ConfigError(f"--snr must be numbers of dB, got {' '.join(map(str, arguments.snr))}")
    noises = Noises(arguments.noise_dir, arguments.sampling_rate)
    speech = read_speech(arguments.manifest, arguments.sampling_rate)
    words = read_alignments(arguments.manifest)
    for snr in arguments.snr:
        write_noisy(speech, words, noises, snr, arguments.sampling_rate, arguments.seed, arguments.out)


if __name__ == "__main__":
    run_program(main)
