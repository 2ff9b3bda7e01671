"""Batches to decode, from cuts or from a raw manifest; what cannot be read is counted, never fatal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from cascade.audio.fbank import compute_fbank
from cascade.audio.io import read_audio
from cascade.config.options import SUBSAMPLING, Config
from cascade.corpus.cuts import Cut, load_samples, read_cuts, split_name, transcript
from cascade.corpus.manifests import Utterance, read_manifest
from cascade.corpus.quarantine import DUPLICATE, DURATION, MALFORMED, UNREADABLE, Problem
from cascade.data.batches import FRAMES_PER_SECOND, Batch, collate, cut_batches
from cascade.data.storage import FEATURE_TYPE, read_features, stored
from cascade.text.normal import normalizer

log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    id: str
    path: str
    text: str
    speaker: str | None
    num_frames: int
    read: Callable[[], np.ndarray]


class DecodeBatches:
    """Iterates over Batches without tokens, shortest utterances first; see `decode_batches`.

    `problems` lists what could not be read so far, `speakers` has those that the manifest knows by the utterances' ids;
    both are complete after an iteration.
    """

    def __init__(
        self, manifest: str | Path, config: Config, max_seconds: float, max_utterances: int | None = None
    ) -> None:  # fmt: skip
        self._manifest, self._config, self._max_frames = Path(manifest), config, max_seconds * FRAMES_PER_SECOND
        self._max_utterances, self._split = max_utterances, split_name(self._manifest)
        self.problems: list[Problem] = []
        self.speakers: dict[str, str] = {}

    def __iter__(self) -> Iterator[Batch]:
        self.problems = []
        is_manifest = self._manifest.suffix == ".jsonl"
        entries = list(self._from_manifest() if is_manifest else self._from_cuts())
        if self._max_utterances is not None and len(entries) > self._max_utterances:
            entries = [entries[len(entries) * place // self._max_utterances] for place in range(self._max_utterances)]
        self.speakers = {entry.id: entry.speaker for entry in entries if entry.speaker is not None}
        num_frames = np.array([entry.num_frames for entry in entries], dtype=np.int64)
        order = np.argsort(num_frames, kind="stable")
        for indices in cut_batches(order, num_frames, self._max_frames):
            features, chosen = [], []
            for entry in (entries[index] for index in indices):
                try:
                    matrix = entry.read()
                except (ValueError, OSError, MemoryError) as error:
                    reason = f"{UNREADABLE}: {' '.join(str(error).split())}"
                    self._add(Problem(entry.id, self._split, entry.path, reason))
                    continue
                if len(matrix) < SUBSAMPLING:
                    reason = f"{DURATION}: {len(matrix)} feature frames give no encoder frame"
                    self._add(Problem(entry.id, self._split, entry.path, reason))
                    continue
                features.append(matrix)
                chosen.append(entry)
            if chosen:
                empty: list[list[int]] = [[] for _ in chosen]
                yield collate(features, empty, [entry.id for entry in chosen], [entry.text for entry in chosen])

    def _add(self, problem: Problem) -> None:
        log.warning("%s is left out: %s", problem.id, problem.reason)
        self.problems.append(problem)

    def _from_manifest(self) -> Iterator[_Entry]:
        features, normalize = self._config.features, normalizer(self._config.tokens)

        def reader(utterance: Utterance) -> Callable[[], np.ndarray]:
            def read() -> np.ndarray:
                samples, _ = read_audio(utterance.path, features.sampling_rate, utterance.start, utterance.end)
                return compute_fbank(samples, features)

            return read

        for line in read_manifest(self._manifest):
            if isinstance(line, Problem):
                self._add(line)
                continue
            num_frames = round(_seconds(line) * FRAMES_PER_SECOND)
            yield _Entry(line.id, str(line.path), normalize(line.text), line.speaker, num_frames, reader(line))

    def _from_cuts(self) -> Iterator[_Entry]:
        features, normalize = self._config.features, normalizer(self._config.tokens)

        def reader(cut: Cut) -> Callable[[], np.ndarray]:
            made = cut.features
            if made is not None and made.type == FEATURE_TYPE and made.num_features == features.num_mel_bins:
                return partial(read_features, stored(made))
            return lambda: compute_fbank(load_samples(cut, features.sampling_rate), features)

        seen: set[str] = set()
        for cut in read_cuts(self._manifest):
            text = normalize(transcript(cut))
            path = cut.recording.sources[0].source if cut.recording is not None else str(self._manifest)
            if cut.recording is None and cut.features is None:
                self._add(Problem(cut.id, self._split, path, f"{MALFORMED}: neither recording nor features"))
                continue
            if cut.id in seen:
                self._add(Problem(cut.id, self._split, path, f"{DUPLICATE}: only its first cut is used"))
                continue
            seen.add(cut.id)
            speaker = next((supervision.speaker for supervision in cut.supervisions), None)
            yield _Entry(cut.id, path, text, speaker, round(cut.duration * FRAMES_PER_SECOND), reader(cut))


def decode_batches(
    manifest_path: str | Path, config: Config, max_seconds: float, max_utterances: int | None = None
) -> DecodeBatches:  # fmt: skip
    """Batches of at most `max_seconds` of audio, padding included, to decode.

    Args:
      manifest_path: CUTS.jsonl.gz (stored features where it has them, otherwise computed) or MANIFEST.jsonl.
      max_utterances: take this many at most, evenly spaced over the manifest; None = all.
    Returns:
      An iterable of Batch: tokens are (N, 0), `texts` the references in the form that the tokens section asks for; its
      `problems` lists the utterances that could not be read.
    """
    if not Path(manifest_path).is_file():
        raise FileNotFoundError(f"manifest not found: {manifest_path}")
    return DecodeBatches(manifest_path, config, max_seconds, max_utterances)


def _seconds(utterance: Utterance) -> float:
    """The length of an utterance by its header; 0 for what will turn out to be unreadable."""
    try:
        duration = soundfile.info(str(utterance.path)).duration if utterance.path.is_file() else 0.0
    except (soundfile.SoundFileError, OSError, ValueError):
        return 0.0
    return max(0.0, min(utterance.end or duration, duration) - (utterance.start or 0.0))
