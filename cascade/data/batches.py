"""Batches of features and tokens for training, validation and decoding.

Batches are planned here and not by lhotse's DynamicBucketingSampler, because the plan must be known before it is
walked: its length gives the learning-rate schedule and the progress bar, resuming jumps to batch k without reading the
ones before, and several ranks share every epoch without one utterance repeated or left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cascade.config.options import FRAME_SHIFT_MS, SUBSAMPLING, Config
from cascade.data.augment import Augmentation, build_augmentations, utterance_generator
from cascade.data.recombination import Recombination
from cascade.data.storage import read_features, read_stats
from cascade.data.training_utterances import TrainingUtterance, read_utterances, usable
from cascade.processes.signals import ignore_signals
from cascade.text.tokens import Tokenizer

CACHE_BYTES = 2 << 30  # training features up to this size stay in memory after their first use
FRAMES_PER_SECOND = 1000 // FRAME_SHIFT_MS

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """N utterances.

    features (N, T, F) float32, zero padded; feature_lens (N,) int64; tokens (N, U) int64, padded with 0;
    token_lens (N,) int64; ids and texts (normalised references) N strings each; carried: None or (N, K) int64, labels
    that the predictor begins with, but not a teacher's.
    """

    features: Tensor
    feature_lens: Tensor
    tokens: Tensor
    token_lens: Tensor
    ids: list[str]
    texts: list[str]
    carried: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        tensors = (self.features, self.feature_lens, self.tokens, self.token_lens)
        carried = None if self.carried is None else self.carried.to(device, non_blocking=True)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors), self.ids, self.texts, carried)

    def split(self, num_parts: int) -> list[Batch]:
        """At most this many batches of neighbours, each padded to its own longest utterance."""
        parts = []
        for rows in np.array_split(np.arange(len(self.ids)), min(num_parts, len(self.ids))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            feature_lens, token_lens = self.feature_lens[part], self.token_lens[part]
            parts.append(Batch(
                self.features[part, : int(feature_lens.max())], feature_lens,
                self.tokens[part, : int(token_lens.max())], token_lens, self.ids[part], self.texts[part],
                None if self.carried is None else self.carried[part],
            ))
        return parts


def collate(features: Sequence[np.ndarray], tokens: Sequence[Sequence[int]], ids: list[str], texts: list[str]) -> Batch:
    """Pad (T_n, F) features and token lists into a Batch."""
    feature_lens = torch.tensor([len(matrix) for matrix in features], dtype=torch.int64)
    token_lens = torch.tensor([len(sequence) for sequence in tokens], dtype=torch.int64)
    padded = np.zeros((len(features), int(feature_lens.max()), features[0].shape[1]), dtype=np.float32)
    labels = np.zeros((len(tokens), int(token_lens.max())), dtype=np.int64)
    for row, (matrix, sequence) in enumerate(zip(features, tokens, strict=True)):
        padded[row, : len(matrix)] = matrix
        labels[row, : len(sequence)] = sequence
    return Batch(torch.from_numpy(padded), feature_lens, torch.from_numpy(labels), token_lens, ids, texts)


def plan_batches(
    num_frames: np.ndarray, max_frames: float, num_buckets: int, seed: int, epoch: int, world_size: int = 1,
    short_first: bool = False,
) -> list[np.ndarray]:
    """Group utterances of similar length, in an order that depends on (seed, epoch) only.

    The utterances, sorted by length, fall into buckets of equal total length; each bucket is shuffled, then batches
    are cut off in sequence, then shuffled. Step k of rank r is batch k * world_size + r: ranks get neighbours in
    length, each utterance comes exactly once, and every rank has the same number of batches. For that the largest
    batches are split, or, where there are too few utterances for that, the shortest joined.

    Args:
      num_frames: (num_utterances,) int64 lengths.
      max_frames: batch size times longest length; a longer utterance is a batch of its own.
    Returns:
      Arrays of utterance indices, their number a multiple of world_size.
    Raises:
      ValueError: fewer utterances than ranks.
    """
    generator = np.random.default_rng([seed, epoch])
    order = np.argsort(num_frames, kind="stable")
    ends = np.cumsum(num_frames[order])
    borders = np.searchsorted(ends, ends[-1] * np.arange(1, num_buckets) / num_buckets)
    order = np.concatenate([generator.permutation(bucket) for bucket in np.split(order, borders)])
    batches = cut_batches(order, num_frames, max_frames)
    if len(num_frames) < world_size:
        raise ValueError(f"{len(num_frames)} training utterances are too few for {world_size} processes")
    surplus = len(batches) % world_size
    if surplus and len(batches) + world_size - surplus <= len(num_frames):
        for _ in range(world_size - surplus):
            largest = max(range(len(batches)), key=lambda index: len(batches[index]))
            batches[largest : largest + 1] = np.array_split(batches[largest], 2)
    else:
        for _ in range(surplus):
            batches[:2] = [np.concatenate(batches[:2])]
    num_steps = len(batches) // world_size
    steps = range(num_steps) if short_first else generator.permutation(num_steps)
    return [batches[step * world_size + rank] for step in steps for rank in range(world_size)]


def cut_batches(order: np.ndarray, num_frames: np.ndarray, max_frames: float) -> list[np.ndarray]:
    """Cut a sequence of utterance indices into batches of at most max_frames frames, padding included."""
    batches: list[np.ndarray] = []
    first, longest = 0, 0
    for position, length in enumerate(num_frames[order].tolist()):
        longest = max(longest, length)
        if position > first and longest * (position - first + 1) > max_frames:
            batches.append(order[first:position])
            first, longest = position, length
    return [*batches, order[first:]] if len(order) else batches


class TrainBatches:
    """Training batches of one rank.

    Utterances that cannot be used with the tokenizer (see `token_problem`) are left out with all their speed copies;
    stage 2 has listed them in the quarantine file. Of the others, copies with more tokens than frames are left out.
    """

    def __init__(
        self, cuts_path: str | Path, tokenizer: Tokenizer, config: Config, rank: int = 0, world_size: int = 1,
        stats: dict[str, Tensor] | None = None, alignment: Path | None = None,
    ) -> None:
        """
        Args:
          cuts_path: EXP/fbank/train_cuts.jsonl.gz.
          stats: {"mean": (F,)} that SpecAugment fills with; stats.pt beside the cuts when None.
          alignment: CTM of these cuts, for augment.recombine_share.
        Raises:
          ValueError, OSError: no cuts, no features in them, another number of mel bins, an alignment of other cuts.

        `left_out` is {utterance id: reason} of what cannot be used; `kept_bytes` what features take in memory.
        """
        assert 0 <= rank < world_size, (rank, world_size)
        self._rank, self._world_size, self._config, self._epoch = rank, world_size, config, 0
        self._utterances, self.left_out = usable(read_utterances(cuts_path, tokenizer, config), tokenizer, config)
        if not self._utterances:
            raise ValueError(f"{cuts_path} holds no utterance that can be trained on")
        self._num_frames = np.array([utterance.num_frames for utterance in self._utterances], dtype=np.int64)
        if stats is None:
            stats = read_stats(Path(cuts_path).parent / "stats.pt", config.features.num_mel_bins)
        fill = np.asarray(stats["mean"], dtype=np.float32)
        num_bytes = int(self._num_frames.sum()) * config.features.num_mel_bins * 4
        keep = num_bytes <= CACHE_BYTES and config.data.num_workers == 0
        log.info(
            "training on %d utterances (speed copies included), %.2f hours; %.0f MB of features %s",
            len(self._utterances), self._num_frames.sum() / FRAMES_PER_SECOND / 3600, num_bytes / 1e6,
            "are kept in memory" if keep else "are read from disk for each batch",
        )
        self.kept_bytes = num_bytes if keep else 0
        augmentations = build_augmentations(config, Path(cuts_path).parent, fill)
        self._dataset = _Dataset(self._utterances, augmentations, config.seed, keep)
        if config.augment.carry_over_share:
            self._dataset.carry_over = CarryOver(self._utterances, config)
        if config.augment.recombine_share:
            assert alignment is not None, "augment.recombine_share wants an alignment"
            self._dataset.recombine = Recombination(
                alignment, self._utterances, tokenizer, config.augment, self._dataset.read
            )
        self._plan = lru_cache(maxsize=4)(self._make_plan)
        self._done: tuple[tuple[int, int], ...] = ()

    def set_epoch(self, epoch: int, done: Sequence[tuple[int, int]] = ()) -> None:
        """Choose the order and the augmentation of the next iteration.

        done: (number of processes, batches of each) of earlier parts of this epoch, when other numbers of processes
        were at it: what they have had does not come again.
        """
        self._epoch, self._done = epoch, tuple((size, count) for size, count in done)

    @property
    def share_done(self) -> float:
        """Share of the epoch's audio that went to earlier parts of it."""
        whole, left = (self._num_frames[self._left(self._epoch, done)] for done in ((), self._done))
        return 1.0 - float(left.sum() / whole.sum())

    def __len__(self) -> int:
        """Batches of this rank in what is left of the epoch; the same for every rank."""
        return len(self._plan(self._epoch, self._done)) // self._world_size

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, skip: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of the epoch, without the first `skip`, which are not even read."""
        with self.loading(skip) as batches:
            yield from batches

    @contextmanager
    def loading(self, skip: int = 0) -> Iterator[Iterator[Batch]]:
        """The batches of `iterate` in a block with whose end, an error too, the loader processes end.

        Raises:
          ValueError, OSError: features cannot be read, or a loader process was lost, wherever the block is then.
        """
        tasks = [(self._epoch, indices) for indices in self.plan()[skip:]]
        generator = torch.Generator()  # otherwise the loader draws from torch's own, which resuming must find unmoved
        loader = iter(DataLoader(
            _Caught(self._dataset), batch_size=None, sampler=tasks, num_workers=self._config.data.num_workers,
            generator=generator, worker_init_fn=lambda _: ignore_signals(),  # the training saves, then ends its loaders
        ))
        try:
            yield map(_raise_errors, loader)
        except RuntimeError as error:  # torch's, from a signal that comes at any moment
            if not str(error).startswith("DataLoader worker"):
                raise
            raise OSError(
                f"a process that loads batches was lost ({str(error).splitlines()[0].strip()}): if memory ran out, "
                "lower data.num_workers"
            ) from error
        finally:
            if self._config.data.num_workers:
                loader._shutdown_workers()  # an error's traceback keeps the loader, and loaders ignore signals

    @property
    def utterances(self) -> list[TrainingUtterance]:
        """The utterances, speed copies included, that training goes through."""
        return self._utterances

    def plan(self) -> list[np.ndarray]:
        """Batches of this rank in the epoch, as indices into `utterances`."""
        return self._plan(self._epoch, self._done)[self._rank :: self._world_size]

    def load(self, indices: np.ndarray) -> Batch:
        """The batch of these utterances, as this epoch augments them."""
        return self._dataset[self._epoch, indices]

    def _make_plan(self, epoch: int, done: tuple[tuple[int, int], ...]) -> list[np.ndarray]:
        """Batches of every rank from what is left of an epoch."""
        left = self._left(epoch, done)
        if done and len(left) < self._world_size:
            if len(left):
                log.warning("epoch %d ends without its last %d utterances, fewer than processes", epoch, len(left))
            return []
        return self._plan_of(left, epoch, self._world_size)

    def _left(self, epoch: int, done: tuple[tuple[int, int], ...]) -> np.ndarray:
        """Indices of the utterances that no earlier part of the epoch has had."""
        left = np.arange(len(self._utterances))
        if self._config.data.random_speed:
            order = np.random.default_rng([self._config.seed, epoch, 1]).permutation(left)
            _, first = np.unique([self._utterances[index].original_id for index in order], return_index=True)
            left = np.sort(order[first])
        for world_size, num_batches in done:
            had = self._plan_of(left, epoch, world_size)[: num_batches * world_size]
            left = np.setdiff1d(left, np.concatenate(had)) if had else left
        return left

    def _plan_of(self, left: np.ndarray, epoch: int, world_size: int) -> list[np.ndarray]:
        data = self._config.data
        plan = plan_batches(
            self._num_frames[left], data.batch_duration * FRAMES_PER_SECOND, data.num_buckets, self._config.seed, epoch,
            world_size, short_first=epoch <= data.sorted_epochs,
        )
        return [left[batch] for batch in plan]


class CarryOver:
    """Labels with which the predictor begins: for some utterances the last ones of another, as behind an endpoint."""

    def __init__(self, utterances: Sequence[TrainingUtterance], config: Config) -> None:
        self._utterances, self._seed = utterances, config.seed
        self._share, self._size = config.augment.carry_over_share, config.model.predictor.context_size

    def __call__(self, epoch: int, ids: Sequence[str]) -> Tensor:
        """(N, K) labels, oldest first, blanks where nothing is carried over."""
        carried = torch.zeros(len(ids), self._size, dtype=torch.int64)
        for row, identifier in zip(carried, ids, strict=True):
            generator = utterance_generator(self._seed, epoch, identifier, "carry-over")
            if generator.random() < self._share:
                labels = self._utterances[generator.integers(len(self._utterances))].tokens[-self._size :]
                row[self._size - len(labels) :] = torch.tensor(labels)
        return carried


class _Dataset(Dataset):
    """(epoch, indices) -> Batch, in whichever process asks."""

    def __init__(
        self, utterances: list[TrainingUtterance], augmentations: list[Augmentation], seed: int, keep: bool
    ) -> None:  # fmt: skip
        self._utterances, self._augmentations, self._seed = utterances, augmentations, seed
        self._kept: dict[int, np.ndarray] | None = {} if keep else None
        self.recombine: Recombination | None = None
        self.carry_over: CarryOver | None = None

    def __getitem__(self, task: tuple[int, np.ndarray]) -> Batch:
        epoch, indices = task
        utterances, rows = [self._utterances[index] for index in indices], []
        for index, utterance in zip(indices.tolist(), utterances, strict=True):
            if self.recombine is None:
                features, tokens, text = self.read(index), utterance.tokens, utterance.text
            else:
                generator = utterance_generator(self._seed, epoch, utterance.id, "recombination")
                features, tokens, text = self.recombine(index, generator)
            for augmentation in self._augmentations:
                generator = utterance_generator(self._seed, epoch, utterance.id, augmentation.purpose)
                features = augmentation(features, generator)
            rows.append((features, tokens, text))
        features, tokens, texts = zip(*rows, strict=True)
        batch = collate(features, tokens, [utterance.id for utterance in utterances], list(texts))
        if self.carry_over is not None:
            batch.carried = self.carry_over(epoch, batch.ids)
        return batch

    def read(self, index: int) -> np.ndarray:
        """(T, F) float32 features of an utterance, which stay as they are."""
        if self._kept is None:
            return read_features(self._utterances[index].features)
        if index not in self._kept:
            self._kept[index] = read_features(self._utterances[index].features)
        return self._kept[index]


class _Caught(Dataset):
    """A dataset that returns errors in the data: raised in a loader process, they would come as its whole traceback."""

    def __init__(self, dataset: _Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, task: tuple[int, np.ndarray]) -> Batch | Exception:
        try:
            return self._dataset[task]
        except (ValueError, OSError) as error:
            return error


def _raise_errors(loaded: Batch | Exception) -> Batch:
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


def dev_batches(
    cuts_path: str | Path, tokenizer: Tokenizer, config: Config, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield a rank's share of the dev set by length, without augmentation, the same batches every time.

    Utterances with more tokens than encoder frames have no finite loss in every topology: left out, with a warning.
    """
    utterances = list(read_utterances(cuts_path, tokenizer, config))
    usable = [entry for entry, _ in utterances if 0 < len(entry.tokens) <= entry.num_frames // SUBSAMPLING]
    num_without = len(utterances) - len(usable)
    if num_without:
        log.warning("%s: %d utterances with more tokens than frames have no loss", cuts_path, num_without)
    num_frames = np.array([utterance.num_frames for utterance in usable], dtype=np.int64)
    order = np.argsort(num_frames, kind="stable")
    batches = cut_batches(order, num_frames, config.data.batch_duration * FRAMES_PER_SECOND)
    for indices in batches[rank::world_size]:
        chosen = [usable[index] for index in indices]
        yield collate(
            [read_features(utterance.features) for utterance in chosen], [utterance.tokens for utterance in chosen],
            [utterance.id for utterance in chosen], [utterance.text for utterance in chosen],
        )
