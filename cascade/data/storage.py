"""Features on disk: one split in parts, each computed on its own and whole or absent, then one list of cuts.

    OUT/<split>/fingerprint       what the parts were made from; other inputs start afresh
    OUT/<split>/part-00012.lca    lilcom archive of the features of PART_SIZE utterances and their speed copies
    OUT/<split>/part-00012.jsonl  their cuts; written last, so that it marks the part as done
    OUT/<split>/part-00012.stats  JSON sums for the mean and standard deviation
    OUT/<split>_cuts.jsonl.gz     all cuts, with absolute paths of the archives
    OUT/stats.pt                  {"mean": (F,), "std": (F,)} float32 over the frames of train
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lhotse import Features, LilcomChunkyWriter
from lhotse.features.io import get_reader

from cascade.audio.fbank import compute_fbank, equal_features, num_feature_frames
from cascade.config.options import FRAME_SHIFT_MS, SUBSAMPLING, Config, FeatureConfig
from cascade.corpus.cuts import Cut, at_speed, load_samples, read_cuts, write_cuts
from cascade.data.rooms import Rooms, read_response, reverberate
from cascade.files import read_lines, replacing
from cascade.log import progress
from cascade.processes.parts import check_stopped, compute_parts

PART_SIZE = 200
FEATURE_TYPE = "kaldi-fbank"
# lilcom rounds to multiples of 2^power: 0.03 is nothing beside augmentation; what is scored stays nearer to the truth.
TRAIN_TICK_POWER, SCORED_TICK_POWER = -5, -8
_FORMAT = 1  # raise it when the same inputs give other files


class Part(NamedTuple):
    """Inputs of one part, for the process that computes it."""

    cuts: list[Cut]
    stem: Path
    features: FeatureConfig
    speeds: tuple[float, ...]
    tick_power: int
    rooms: Rooms | None


def store_split(
    source: Path, out: Path, split: str, config: Config, num_jobs: int, rooms: Rooms | None = None
) -> None:
    """Compute the features of a split's validated cuts; parts that an earlier, interrupted call finished are kept.

    Args:
      source: EXP/data/<split>_cuts.jsonl.gz.
      out: EXP/fbank; only "train" gets the copies of data.speed_factors.
      num_jobs: processes; 1 computes in this one.
      rooms: a share of the copies of "train" is put into these; statistics are taken after it.
    Raises:
      ValueError, OSError: a recording that stage 0 accepted is gone or has changed, the disk is full.
    """
    is_train = split == "train"
    speeds = tuple(dict.fromkeys(config.data.speed_factors)) if is_train else (1.0,)
    tick_power = TRAIN_TICK_POWER if is_train else SCORED_TICK_POWER
    folder = (out / split).resolve()
    rooms = rooms if is_train else None
    fingerprints, num_cuts = _fingerprints(source, folder, config.features, speeds, tick_power, rooms)
    _start_afresh_if_changed(folder, fingerprints)
    stems = [folder / f"part-{number:05d}" for number in range(-(-num_cuts // PART_SIZE))]
    parts = (
        Part(block, stem, config.features, speeds, tick_power, rooms)
        for block, stem in zip(_blocks(source), stems, strict=True) if not stem.with_suffix(".jsonl").is_file()
    )
    num_missing = sum(not stem.with_suffix(".jsonl").is_file() for stem in stems)
    work = compute_parts(_compute_part, parts, min(num_jobs, num_missing))
    for _ in progress(work, f"features of {split}", total=num_missing):
        pass
    with replacing(out / f"{split}_cuts.jsonl.gz") as temporary, gzip.open(temporary, "wb") as file:
        for stem in stems:
            file.write(stem.with_suffix(".jsonl").read_bytes())
    if is_train:
        _write_stats(stems, out / "stats.pt")


class Stored(NamedTuple):
    """Place of a cut's features, in less memory than lhotse's Features."""

    type: str
    path: str
    key: str
    num_frames: int
    num_features: int


def stored(features: Features) -> Stored:
    return Stored(
        features.storage_type, sys.intern(features.storage_path), features.storage_key, features.num_frames,
        features.num_features,
    )


def read_features(where: Stored) -> np.ndarray:
    """(T, F) float32 features.

    Raises:
      OSError, ValueError: the archive is gone or damaged.
    """
    remedy = "remove its folder and run stage 1 again"
    try:
        array = get_reader(where.type)(where.path).read(where.key)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"features in {where.path} cannot be read ({error}): {remedy}") from error
    if array.shape != (where.num_frames, where.num_features):
        expected = (where.num_frames, where.num_features)
        raise ValueError(f"features in {where.path} have shape {array.shape} instead of {expected}: {remedy}")
    return np.asarray(array, dtype=np.float32)


def _blocks(source: Path) -> Iterator[list[Cut]]:
    cuts = read_cuts(source)
    while block := list(islice(cuts, PART_SIZE)):
        yield block


def _fingerprints(
    source: Path, folder: Path, features: FeatureConfig, speeds: tuple[float, ...], tick_power: int, rooms: Rooms | None
) -> tuple[list[str], int]:
    """Hashes of what the parts depend on, any of which counts as the same, and the number of cuts.

    The folder is in it because cuts carry absolute paths.
    """
    facts = {
        "speeds": speeds, "tick_power": tick_power, "part_size": PART_SIZE, "folder": str(folder), "format": _FORMAT,
    }
    if rooms is not None:
        facts["rooms"] = rooms.digest
    digests = [
        hashlib.sha256(json.dumps(facts | {"features": options}, sort_keys=True).encode())
        for options in equal_features(features)
    ]
    if not source.is_file():
        raise FileNotFoundError(f"cuts not found: {source}; run stage 0 first")
    num_cuts = 0
    for line in read_lines(source):
        for digest in digests:
            digest.update(line)
        num_cuts += 1
    if num_cuts == 0:
        raise ValueError(f"{source} holds no utterance: run stage 0 (prepare_data) again")
    return [digest.hexdigest() for digest in digests], num_cuts


def _start_afresh_if_changed(folder: Path, fingerprints: list[str]) -> None:
    file = folder / "fingerprint"
    for left_over in folder.glob(".*-part-*"):  # of a killed process
        left_over.unlink()
    if file.is_file() and file.read_text() in fingerprints:
        return
    for part in folder.glob("part-*"):
        part.unlink()
    with replacing(file) as temporary:
        temporary.write_text(fingerprints[0])


def _compute_part(part: Part) -> None:
    archive = part.stem.with_suffix(".lca")
    done: list[Cut] = []
    count, total, squares = 0, 0.0, 0.0
    with replacing(archive) as temporary:
        with LilcomChunkyWriter(temporary, tick_power=part.tick_power) as writer:
            for cut in part.cuts:
                check_stopped()
                samples = load_samples(cut, part.features.sampling_rate)
                for factor in part.speeds:
                    copy, changed = at_speed(cut, samples, factor)
                    num_frames = num_feature_frames(len(changed), part.features.sampling_rate)
                    if num_frames < SUBSAMPLING and factor > min(part.speeds):
                        continue  # too fast to have an encoder frame; stage 0 asks for one of the slowest copy
                    name = part.rooms.draw(cut.id, factor) if part.rooms is not None else None
                    if name is not None:
                        response = read_response(part.rooms.folder / name, part.features.sampling_rate)
                        changed = reverberate(changed, *response)
                        copy.custom = {**copy.custom, "room": name}
                    fbank = compute_fbank(changed, part.features)
                    wide = fbank.astype(np.float64)  # before lilcom, which rounds in place
                    count, total, squares = count + len(wide), total + wide.sum(0), squares + (wide**2).sum(0)
                    copy.features = Features(
                        type=FEATURE_TYPE, num_frames=fbank.shape[0], num_features=fbank.shape[1],
                        frame_shift=FRAME_SHIFT_MS / 1000, sampling_rate=part.features.sampling_rate, start=copy.start,
                        duration=copy.duration, storage_type=writer.name, storage_path=str(archive),
                        storage_key=writer.write(copy.id, fbank), recording_id=copy.recording.id, channels=copy.channel,
                    )
                    done.append(copy)
    with replacing(part.stem.with_suffix(".stats")) as temporary:
        temporary.write_text(json.dumps({"count": count, "sum": total.tolist(), "squares": squares.tolist()}))
    write_cuts(part.stem.with_suffix(".jsonl"), done)


def _write_stats(stems: Iterable[Path], path: Path) -> None:
    sums = [json.loads(stem.with_suffix(".stats").read_text()) for stem in stems]
    count = sum(part["count"] for part in sums)
    mean = np.sum([part["sum"] for part in sums], axis=0) / count
    variance = np.sum([part["squares"] for part in sums], axis=0) / count - mean**2
    std = np.sqrt(np.maximum(variance, 1e-4))  # a bin that never changes must not divide by zero
    stats = {"mean": torch.tensor(mean, dtype=torch.float32), "std": torch.tensor(std, dtype=torch.float32)}
    with replacing(path) as temporary:
        torch.save(stats, temporary)


def read_stats(path: str | Path, num_mel_bins: int | None = None) -> dict[str, torch.Tensor]:
    """{"mean": (F,), "std": (F,)} float32 of stage 1.

    Args:
      num_mel_bins: F, if it is to be checked.
    Raises:
      FileNotFoundError, ValueError: no such file, or not what stage 1 writes.
    """
    remedy = "run stage 1 (compute_features) again"
    if not Path(path).is_file():
        raise FileNotFoundError(f"feature statistics not found: {path}; run stage 1 first")
    try:
        stats = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): {remedy}") from error
    names = ("mean", "std")
    if not isinstance(stats, dict) or not all(isinstance(stats.get(name), torch.Tensor) for name in names):
        raise ValueError(f"{path} does not hold the tensors mean and std: {remedy}")
    mean, std = (stats[name] for name in names)
    if mean.ndim != 1 or mean.shape != std.shape or not (mean.is_floating_point() and std.is_floating_point()):
        shapes = f"{tuple(mean.shape)} and {tuple(std.shape)}"
        raise ValueError(f"{path}: mean and std must be real numbers, one per mel bin, got {shapes}: {remedy}")
    if num_mel_bins is not None and len(mean) != num_mel_bins:
        raise ValueError(f"{path} has {len(mean)} mel bins, features.num_mel_bins={num_mel_bins}: {remedy}")
    if not bool(mean.isfinite().all()) or not bool((std.isfinite() & (std > 0)).all()):
        raise ValueError(f"{path}: mean must be finite and std positive in every mel bin: {remedy}")
    return {"mean": mean.float(), "std": std.float()}
