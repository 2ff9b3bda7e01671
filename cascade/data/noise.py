"""Noise: the log-mel features of a folder of recordings, computed once, cut and mixed into training utterances.

    OUT/noise/fingerprint        what the parts were made from; other inputs start afresh
    OUT/noise/part-00012.npy     (frames, F) float16 features of PART_SIZE files, one after the other
    OUT/noise/part-00012.json    {"lengths": frames of each usable file, "problems": [[file, reason]]}; marks it as done
    OUT/noise/index.json         {"fingerprint", "parts": {stem: lengths}}; written last

Mixing adds mel energies: log(exp(speech) + gain exp(noise)). What that leaves out is the product of both signals, which
is zero on average.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cascade.audio.fbank import WINDOW_MS, compute_fbank, equal_features
from cascade.audio.io import read_audio_blocks
from cascade.audio.resample import resample
from cascade.config.options import FRAME_SHIFT_MS, AugmentConfig, FeatureConfig
from cascade.data.audio_folder import describe, find_audio, report
from cascade.files import replacing
from cascade.log import progress
from cascade.processes.parts import check_stopped, compute_parts

PART_SIZE = 100
BLOCK_SECONDS = 60.0  # long recordings are read in blocks of this
SILENT_ENERGY = 1e-6
"""Mean energy of a mel bin; what is quieter (about -90 dB) is digital silence, not noise to be amplified."""
OPTION = "--noise-dir"
_FORMAT = 1  # raise it when the same inputs give other files

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """Inputs of one part, for the process that computes it."""

    folder: Path
    names: list[str]
    stem: Path
    features: FeatureConfig


def store_noise(folder: Path, out: Path, features: FeatureConfig, num_jobs: int) -> None:
    """Compute the features of a folder of noises into out/noise; parts that an interrupted call finished are kept.

    Raises:
      ValueError: no such folder, no audio in it, or none that can be used.
    """
    names = find_audio(folder, OPTION)
    files = describe(folder, names)
    fingerprint, *others = (
        hashlib.sha256(json.dumps([files, options, PART_SIZE, _FORMAT], sort_keys=True).encode()).hexdigest()
        for options in equal_features(features)
    )
    target = out / "noise"
    mark = target / "fingerprint"
    if mark.is_file() and mark.read_text() in others:
        fingerprint = mark.read_text()
    elif not mark.is_file() or mark.read_text() != fingerprint:
        remove_noise(out)
        with replacing(mark) as temporary:
            temporary.write_text(fingerprint)
    stems = [target / f"part-{number:05d}" for number in range(-(-len(names) // PART_SIZE))]
    missing = [index for index, stem in enumerate(stems) if not stem.with_suffix(".json").is_file()]
    parts = (
        Part(folder, names[index * PART_SIZE : (index + 1) * PART_SIZE], stems[index], features) for index in missing
    )
    for _ in progress(compute_parts(_compute_part, parts, min(num_jobs, len(missing))), "noise", total=len(missing)):
        pass
    done = {stem.name: json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")) for stem in stems}
    problems = [(name, reason) for part in done.values() for name, reason in part["problems"]]
    report(OPTION, folder, len(names), problems, log)
    index = {"fingerprint": fingerprint, "parts": {name: part["lengths"] for name, part in done.items()}}
    with replacing(target / "index.json") as temporary:
        temporary.write_text(json.dumps(index))


def remove_noise(out: Path) -> None:
    """Remove what `store_noise` has made: the next training has none."""
    target = out / "noise"
    if (target / "fingerprint").is_file():
        log.info("removing the noise features of an earlier run in %s", target)
    for file in [target / "index.json", target / "fingerprint", *target.glob("part-*"), *target.glob(".*-part-*")]:
        file.unlink(missing_ok=True)


def _compute_part(part: Part) -> None:
    pieces = [np.zeros((0, part.features.num_mel_bins), np.float16)]
    lengths: list[int] = []
    problems: list[tuple[str, str]] = []
    for name in part.names:
        check_stopped()
        try:
            blocks = _read_noise(part.folder / name, part.features)
        except (ValueError, OSError) as error:
            problems.append((name, " ".join(str(error).split())))
            continue
        pieces += blocks
        lengths.append(sum(map(len, blocks)))
    with replacing(part.stem.with_suffix(".npy")) as temporary:
        np.save(temporary, np.concatenate(pieces))
    with replacing(part.stem.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"lengths": lengths, "problems": problems}), encoding="utf-8")


def _read_noise(path: Path, features: FeatureConfig) -> list[np.ndarray]:
    """(T, F) float16 features of each block of a recording."""
    blocks: list[np.ndarray] = []
    loudest = 0.0
    for samples, rate, _ in read_audio_blocks(path, features.sampling_rate, BLOCK_SECONDS):
        check_stopped()
        if rate != features.sampling_rate:
            samples = resample(samples, rate, features.sampling_rate)
        if blocks and len(samples) < features.sampling_rate * WINDOW_MS // 1000:
            break
        block = compute_fbank(samples, features)
        loudest = max(loudest, float(np.exp(block).mean()))
        blocks.append(block.astype(np.float16))
    if loudest < SILENT_ENERGY:
        raise ValueError(f"{path} is silent")
    return blocks


class Noise:
    """The stored noise of a run, read from disk where it is needed."""

    def __init__(self, folder: Path, num_mel_bins: int) -> None:
        """
        Raises:
          ValueError: stage 1 did not finish it, or made it with another number of mel bins.
        """
        self._folder, self._num_mel_bins = folder, num_mel_bins
        try:
            parts = json.loads((folder / "index.json").read_text(encoding="utf-8"))["parts"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the noise features in {folder} are unfinished; run stage 1 again") from error
        files = [
            (name, first, length) for name, lengths in parts.items()
            for first, length in zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True)
        ]
        self._files: list[tuple[str, int, int]] = files
        self._ends = np.cumsum([length for _, _, length in files])
        self._arrays: dict[str, np.ndarray] = {}
        for name in parts:
            self._array(name)

    @property
    def num_files(self) -> int:
        return len(self._files)

    @property
    def hours(self) -> float:
        return int(self._ends[-1]) * FRAME_SHIFT_MS / 3.6e6

    def cut(self, num_frames: int, generator: np.random.Generator) -> np.ndarray:
        """A stretch of one recording at a random place, the recording repeated where it is shorter.

        Every second of noise is as likely as any other: long recordings are drawn more often.

        Returns:
          (num_frames, F) float32 log-mel features, a new array.
        """
        index = int(np.searchsorted(self._ends, generator.integers(self._ends[-1]), side="right"))
        name, first, length = self._files[index]
        array = self._array(name)
        spare = length - num_frames
        start = int(generator.integers(spare + 1 if spare >= 0 else length))
        if spare >= 0:
            return np.array(array[first + start : first + start + num_frames], dtype=np.float32)
        rows = first + np.arange(start, start + num_frames) % length
        return np.array(array[rows], dtype=np.float32)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arrays": {}}  # a loader process opens the files itself

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            path = self._folder / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(f"noise features in {path} cannot be read ({error}); run stage 1 again") from error
            if array.shape[1] != self._num_mel_bins:
                raise ValueError(
                    f"{path} has {array.shape[1]} mel bins, but features.num_mel_bins={self._num_mel_bins}: "
                    "run stage 1 again"
                )
            self._arrays[name] = array
        return self._arrays[name]


def open_noise(fbank: Path, num_mel_bins: int) -> Noise | None:
    """The noise that stage 1 left in EXP/fbank; None if it was given no --noise-dir."""
    folder = fbank / "noise"
    return Noise(folder, num_mel_bins) if (folder / "fingerprint").is_file() else None


class MixNoise:
    """Add noise to noise_share of the utterances, at a ratio drawn from noise_snr_db.

    The ratio is that of the mel energies, summed over bins and meant over all frames of both, so after pre-emphasis, as
    in lhotse and icefall.
    """

    purpose = "noise"

    def __init__(self, noise: Noise, config: AugmentConfig) -> None:
        self.noise, self.config = noise, config

    def __call__(self, features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if generator.random() >= self.config.noise_share:
            return features
        snr_db = generator.uniform(*self.config.noise_snr_db)
        mixed = self.noise.cut(len(features), generator)
        np.exp(mixed, out=mixed)
        noise_energy = float(mixed.mean())
        if noise_energy < SILENT_ENERGY:
            return features
        energies = np.exp(features)
        mixed *= float(energies.mean()) / noise_energy * 10 ** (-snr_db / 10)
        mixed += energies
        return np.log(mixed, out=mixed)
