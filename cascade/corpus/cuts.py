"""Validated utterances as lhotse cuts, and the samples of a cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.augmentation import Speed
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy

from cascade.audio.fbank import num_feature_frames
from cascade.audio.io import MARGIN_SECONDS, read_audio
from cascade.audio.resample import resample
from cascade.config.options import SUBSAMPLING, Config
from cascade.corpus.cut_checks import Cut, parse_cut
from cascade.corpus.manifests import Utterance, read_manifest
from cascade.corpus.quarantine import DURATION, EMPTY_TEXT, UNREADABLE, Problem
from cascade.files import read_lines, replacing
from cascade.text.normal import normalizer

CUTS_SUFFIX = "_cuts.jsonl.gz"
"""Of a split's file of cuts."""


def split_name(manifest: Path) -> str:
    """What SPLIT_cuts.jsonl.gz or SPLIT.jsonl is of."""
    return re.sub(r"(_cuts)?\.jsonl(\.gz)?$", "", manifest.name)


def validate(utterance: Utterance, split: str, config: Config) -> tuple[Cut, str | None] | Problem:
    """Decode an utterance once and make a cut of it, or say why it is set aside.

    Returns:
      (cut, note on what was changed or None), or the Problem.
    """

    def problem(reason: str) -> Problem:
        return Problem(utterance.id, split, str(utterance.path), reason)

    rate, limits = config.features.sampling_rate, config.data
    text = " ".join(utterance.text.split())
    if not normalizer(config.tokens)(text):
        left = f" in {text!r}, which tokens.strip_punctuation empties" if text else ""
        return problem(f"{EMPTY_TEXT}: the transcript has no word{left}")
    start = 0.0 if utterance.start is None else float(utterance.start)
    if start < 0 or (utterance.end is not None and utterance.end <= start):
        return problem(f"{DURATION}: start {utterance.start} s, end {utterance.end} s")
    try:
        info = soundfile.info(str(utterance.path)) if utterance.path.is_file() else None
        if info is not None and utterance.start is not None and start >= info.duration:
            return problem(f"{DURATION}: start {start:g} s lies outside the file of {info.duration:.3f} s")
        if info is not None and utterance.end is not None and utterance.end > info.duration + MARGIN_SECONDS:
            return problem(f"{DURATION}: end {utterance.end:g} s lies outside the file of {info.duration:.3f} s")
        samples, note = read_audio(utterance.path, rate, utterance.start, utterance.end)
    except (ValueError, OSError, MemoryError, soundfile.SoundFileError) as error:
        return problem(f"{UNREADABLE}: {' '.join(str(error).split())}")
    duration = len(samples) / rate
    if duration > limits.max_duration:
        return problem(f"{DURATION}: {duration:.3f} s is longer than data.max_duration={limits.max_duration:g}")
    if duration < limits.min_duration:
        return problem(f"{DURATION}: {duration:.3f} s is shorter than data.min_duration={limits.min_duration:g}")
    slowest = min(limits.speed_factors) if split == "train" else 1.0
    if num_feature_frames(int(len(samples) / slowest), rate) < SUBSAMPLING:
        return problem(f"{DURATION}: {duration:.3f} s gives no encoder frame at speed {slowest:g}")
    return _make_cut(utterance, text, start, len(samples), rate, info), note


def _make_cut(utterance: Utterance, text: str, start: float, num_samples: int, rate: int, info) -> Cut:
    channels = list(range(info.channels))
    recording = Recording(
        id=utterance.id, sources=[AudioSource("file", channels, str(utterance.path.resolve()))],
        sampling_rate=info.samplerate, num_samples=info.frames, duration=info.frames / info.samplerate,
        channel_ids=channels,
    )
    if info.samplerate != rate:
        recording = recording.resample(rate)
    duration = min(num_samples / rate, recording.duration - start)
    kind, channel = (MonoCut, 0) if len(channels) == 1 else (MultiCut, channels)
    supervision = SupervisionSegment(
        id=utterance.id, recording_id=utterance.id, start=0.0, duration=duration, channel=channel, text=text,
        speaker=utterance.speaker, alignment=_alignment(utterance, text),
    )
    return kind(
        id=utterance.id, start=start, duration=duration, channel=channel, recording=recording,
        supervisions=[supervision], custom={"utterance": utterance.id, "speed": 1.0},
    )


def _alignment(utterance: Utterance, text: str) -> dict[str, list[AlignmentItem]] | None:
    if utterance.words is None:
        return None
    pairs = zip(text.split(), utterance.words, strict=True)
    return {"word": [AlignmentItem(word, start, round(end - start, 6)) for word, (start, end) in pairs]}


def at_speed(cut: Cut, samples: np.ndarray, factor: float) -> tuple[Cut, np.ndarray]:
    """A copy of a cut (id "<id>_sp<factor>") and of its (num_samples,) samples, spoken `factor` times as fast.

    As `sox speed`: tempo and pitch change together. lhotse's resampler does it without torchaudio.
    """
    if factor == 1.0:
        return fastcopy(cut), samples
    copy = cut.perturb_speed(factor)
    copy.custom = {**cut.custom, "speed": factor}
    changed = Speed(factor)(samples[None], cut.sampling_rate)[0]
    return copy, _fit(changed, copy.num_samples)


def load_samples(cut: Cut, sampling_rate: int) -> np.ndarray:
    """(num_samples,) float32 samples of a cut, mono at `sampling_rate`.

    Cuts of stage 0 and 1 are read by `read_audio` (what validation has decoded); others by lhotse itself.

    Raises:
      ValueError: no recording, an unusable one, or another than stage 0 saw.
    """
    if cut.recording is None:
        raise ValueError(f"cut {cut.id} has no recording")
    custom = cut.custom or {}
    if "utterance" not in custom:
        try:
            samples = np.asarray(cut.load_audio(), dtype=np.float32).mean(axis=0)
        except Exception as error:  # lhotse's errors have no base of their own
            raise ValueError(f"cut {cut.id}: {' '.join(str(error).split())}") from error
        return samples if cut.sampling_rate == sampling_rate else resample(samples, cut.sampling_rate, sampling_rate)
    speed = custom["speed"]
    start, end = cut.start * speed, (cut.start + cut.duration) * speed
    whole = cut.start == 0 and abs(cut.duration - cut.recording.duration) < 1e-6
    samples, _ = read_audio(
        cut.recording.sources[0].source, sampling_rate, None if whole else start, None if whole else end
    )
    if speed != 1.0:
        samples = Speed(speed)(samples[None], sampling_rate)[0]
    return _fit(samples, cut.num_samples)


def _fit(samples: np.ndarray, num_samples: int) -> np.ndarray:
    """Resamplers round lengths differently by a sample or two: cut off, or repeat the last one."""
    missing = num_samples - len(samples)
    if abs(missing) > 4:
        raise ValueError(f"the recording has {len(samples)} samples and had {num_samples}: run stage 0 again")
    return np.pad(samples, (0, missing), mode="edge") if missing > 0 else samples[:num_samples]


def write_cuts(path: str | Path, cuts: Iterable[Cut]) -> None:
    """Write cuts, one after the other, to a .jsonl or .jsonl.gz file that is whole or absent."""
    with replacing(path) as temporary, CutSet.open_writer(temporary, overwrite=True) as writer:
        for cut in cuts:
            writer.write(cut)


def read_cuts(path: str | Path) -> Iterator[Cut]:
    """Yield the cuts of a .jsonl.gz file one by one.

    Raises:
      FileNotFoundError, ValueError: no such file, or one that is damaged or holds something else, with the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"cuts not found: {path}; run the stage that makes them (0 data, 1 features)")
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                cut = parse_cut(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}; run the stage that makes it again") from error
            yield cut


def transcript(cut: Cut) -> str:
    """The text of a cut's supervisions."""
    return " ".join(supervision.text or "" for supervision in cut.supervisions)


class Speech(NamedTuple):
    """One utterance; samples (num_samples,) float32."""

    id: str
    text: str
    samples: np.ndarray
    speaker: str | None = None


def read_speech(manifest: Path, sampling_rate: int, at_most: int | None = None) -> list[Speech]:
    """The first utterances of a CUTS.jsonl.gz or MANIFEST.jsonl, `at_most` so many.

    Raises:
      ValueError: one of them is unusable, or there is none.
    """
    speech = []
    if manifest.suffix == ".jsonl":
        for line in islice(read_manifest(manifest), at_most):
            if not isinstance(line, Utterance):
                raise ValueError(f"{manifest}: {line.id}: {line.reason}")
            samples, _ = read_audio(line.path, sampling_rate, line.start, line.end)
            speech.append(Speech(line.id, line.text, samples, line.speaker))
    else:
        for cut in islice(read_cuts(manifest), at_most):
            speaker = next((supervision.speaker for supervision in cut.supervisions), None)
            speech.append(Speech(cut.id, transcript(cut), load_samples(cut, sampling_rate), speaker))
    if not speech:
        raise ValueError(f"{manifest} holds no recording")
    return speech
