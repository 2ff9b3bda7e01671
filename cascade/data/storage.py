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
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lhotse import Features, LilcomChunkyWriter
from lhotse.features.io import get_reader

from cascade.config import FRAME_SHIFT_MS, Config, FeatureConfig
from cascade.data.cuts import Cut, at_speed, load_samples, read_cuts, write_cuts
from cascade.data.files import replacing
from cascade.features import compute_fbank
from cascade.log import progress

PART_SIZE = 200
FEATURE_TYPE = "kaldi-fbank"
# lilcom rounds to multiples of 2^power: 0.03 is nothing beside augmentation; what is scored stays nearer to the truth.
TRAIN_TICK_POWER, SCORED_TICK_POWER = -5, -8
_FORMAT = 1  # raise it when the same inputs give other files


class Part(NamedTuple):
    """What a process needs to compute one part."""

    cuts: list[Cut]
    stem: Path
    features: FeatureConfig
    speeds: tuple[float, ...]
    tick_power: int


def store_split(source: Path, out: Path, split: str, config: Config, num_jobs: int) -> None:
    """Compute the features of a split's validated cuts; parts that an earlier, interrupted call finished are kept.

    Args:
      source: EXP/data/<split>_cuts.jsonl.gz.
      out: EXP/fbank; only "train" gets the copies of data.speed_factors.
      num_jobs: processes; 1 computes in this one.
    Raises:
      ValueError, OSError: a recording that stage 0 accepted is gone or has changed, the disk is full.
    """
    is_train = split == "train"
    speeds = config.data.speed_factors if is_train else (1.0,)
    tick_power = TRAIN_TICK_POWER if is_train else SCORED_TICK_POWER
    folder = (out / split).resolve()
    _start_afresh_if_changed(folder, _fingerprint(source, config.features, speeds, tick_power))
    parts: list[Part] = []
    stems: list[Path] = []
    cuts = read_cuts(source)
    while block := list(islice(cuts, PART_SIZE)):
        stem = folder / f"part-{len(stems):05d}"
        stems.append(stem)
        if not stem.with_suffix(".jsonl").is_file():
            parts.append(Part(block, stem, config.features, speeds, tick_power))
    for _ in progress(_compute_parts(parts, num_jobs), f"features of {split}", total=len(parts)):
        pass
    write_cuts(out / f"{split}_cuts.jsonl.gz", (cut for stem in stems for cut in read_cuts(stem.with_suffix(".jsonl"))))
    if is_train:
        _write_stats(stems, out / "stats.pt")


def read_features(features: Features) -> np.ndarray:
    """(T, F) float32 features that a cut refers to.

    Raises:
      OSError, ValueError: the archive is gone or damaged.
    """
    try:
        array = get_reader(features.storage_type)(features.storage_path).read(features.storage_key)
    except OSError as error:
        raise OSError(f"features of {features.storage_path} cannot be read ({error}): run stage 1 again") from error
    if array.ndim != 2 or array.shape != (features.num_frames, features.num_features):
        raise ValueError(
            f"features in {features.storage_path} have shape {array.shape}, their cut says "
            f"{(features.num_frames, features.num_features)}: remove the folder and run stage 1 again"
        )
    return np.asarray(array, dtype=np.float32)


def _fingerprint(source: Path, features: FeatureConfig, speeds: tuple[float, ...], tick_power: int) -> str:
    about = {"features": asdict(features), "speeds": speeds, "tick_power": tick_power, "part": PART_SIZE, "f": _FORMAT}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    if not source.is_file():
        raise FileNotFoundError(f"cuts not found: {source}; run stage 0 first")
    with gzip.open(source) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _start_afresh_if_changed(folder: Path, fingerprint: str) -> None:
    file = folder / "fingerprint"
    if file.is_file() and file.read_text() == fingerprint:
        return
    if folder.exists():
        shutil.rmtree(folder)
    with replacing(file) as temporary:
        temporary.write_text(fingerprint)


def _compute_parts(parts: list[Part], num_jobs: int) -> Iterator[None]:
    if num_jobs == 1 or len(parts) < 2:
        yield from map(_compute_part, parts)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that has run torch may hang
    with ProcessPoolExecutor(min(num_jobs, len(parts)), mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(_compute_part, part) for part in parts]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the running parts are finished, the others dropped
            raise


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _compute_part(part: Part) -> None:
    archive = part.stem.with_suffix(".lca")
    done: list[Cut] = []
    count, total, squares = 0, 0.0, 0.0
    with replacing(archive) as temporary:
        with LilcomChunkyWriter(temporary, tick_power=part.tick_power) as writer:
            for cut in part.cuts:
                samples = load_samples(cut, part.features.sampling_rate)
                for factor in part.speeds:
                    copy, changed = at_speed(cut, samples, factor)
                    fbank = compute_fbank(changed, part.features).numpy()
                    copy.features = Features(
                        type=FEATURE_TYPE, num_frames=fbank.shape[0], num_features=fbank.shape[1],
                        frame_shift=FRAME_SHIFT_MS / 1000, sampling_rate=part.features.sampling_rate, start=copy.start,
                        duration=copy.duration, storage_type=writer.name, storage_path=str(archive),
                        storage_key=writer.write(copy.id, fbank), recording_id=copy.recording.id, channels=copy.channel,
                    )
                    done.append(copy)
                    wide = fbank.astype(np.float64)
                    count, total, squares = count + len(wide), total + wide.sum(0), squares + (wide**2).sum(0)
    with replacing(part.stem.with_suffix(".stats")) as temporary:
        temporary.write_text(json.dumps({"count": count, "sum": total.tolist(), "squares": squares.tolist()}))
    write_cuts(part.stem.with_suffix(".jsonl"), done)


def _write_stats(stems: Iterable[Path], path: Path) -> None:
    sums = [json.loads(stem.with_suffix(".stats").read_text()) for stem in stems]
    count = sum(item["count"] for item in sums)
    mean = np.sum([item["sum"] for item in sums], axis=0) / count
    variance = np.sum([item["squares"] for item in sums], axis=0) / count - mean**2
    std = np.sqrt(np.maximum(variance, 1e-4))  # a bin that never changes must not divide by zero
    stats = {"mean": torch.tensor(mean, dtype=torch.float32), "std": torch.tensor(std, dtype=torch.float32)}
    with replacing(path) as temporary:
        torch.save(stats, temporary)


def read_stats(path: str | Path) -> dict[str, torch.Tensor]:
    """{"mean": (F,), "std": (F,)} float32 of stage 1."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"feature statistics not found: {path}; run stage 1 first")
    return torch.load(path, weights_only=True)
