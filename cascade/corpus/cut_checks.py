"""Lines of lhotse cuts, checked as far as this project relies on them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lhotse import MonoCut, MultiCut
from lhotse.cut.set import deserialize_cut

from cascade.files import read_lines

Cut = MonoCut | MultiCut


def parse_cut(line: bytes) -> Cut:
    """The cut of one line.

    Raises:
      ValueError: what is wrong with it, and the cut's id where it has one.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    name = values.get("id") if isinstance(values, dict) else None
    prefix = f"cut {name}: " if isinstance(name, str) else ""
    if not isinstance(values, dict) or values.get("type") not in ("MonoCut", "MultiCut", "Cut"):
        raise ValueError(f"{prefix}no lhotse cut of type MonoCut or MultiCut")
    try:
        cut = deserialize_cut(values)
    except KeyError as error:
        raise ValueError(f"{prefix}no lhotse cut, {error} is missing") from error
    except (TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError) as error:
        raise ValueError(f"{prefix}no lhotse cut ({type(error).__name__}: {' '.join(str(error).split())})") from error
    for place, value, is_right, wanted in _facts(cut):
        if not is_right(value):
            raise ValueError(f"{prefix}{place} must be {wanted}, got {value!r}")
    return cut


def hash_utterances(path: Path) -> str:
    """A hash of the ids, texts and numbers of frames of cuts with features, in their order; not of paths in them.

    Raises:
      FileNotFoundError, ValueError: no such file, or one that is damaged or holds something else, with the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"cuts not found: {path}; run stage 1 (compute_features)")
    digest = hashlib.sha256()
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:  # without lhotse's objects, which take three times as long
                cut = json.loads(line)
                texts = [supervision.get("text") for supervision in cut["supervisions"]]
                facts = [cut["id"], texts, cut["features"]["num_frames"]]
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} line {number}: no lhotse cut with features ({type(error).__name__}); run "
                                 "stage 1 (compute_features) again") from error
            digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


def _is_duration(value: Any) -> bool:
    return _is_seconds(value) and value > 0


def _is_speed(value: Any) -> bool:
    return _is_duration(value) and math.isfinite(1 / value)


def _facts(cut: Cut) -> Iterator[tuple[str, Any, Callable[[Any], bool], str]]:
    """(place, value, what it must satisfy, in words) of everything that is read of a cut."""
    text, count = "a string that is not empty", "a whole positive number"
    yield "id", cut.id, _is_text, text
    yield "start", cut.start, _is_seconds, "a number of seconds, 0 or more"
    yield "duration", cut.duration, _is_duration, "a positive number of seconds"
    yield "supervisions", cut.supervisions, lambda value: isinstance(value, list), "a list"
    for supervision in cut.supervisions:
        yield "text of a supervision", supervision.text, _is_text_or_none, "a string"
        yield "speaker of a supervision", supervision.speaker, _is_text_or_none, "a string"
    custom = cut.custom
    yield "custom", custom, lambda value: value is None or isinstance(value, dict), "an object"
    if custom and "utterance" in custom:
        yield "custom utterance", custom["utterance"], _is_text, text
        yield "custom speed", custom.get("speed"), _is_speed, "a positive number"
    if cut.recording is not None:
        recording = cut.recording
        yield "sampling_rate of the recording", recording.sampling_rate, _is_count, count
        yield "num_samples of the recording", recording.num_samples, _is_count, count
        yield "duration of the recording", recording.duration, _is_duration, "a positive number of seconds"
        yield "sources of the recording", recording.sources, bool, "a list with one source at least"
        yield "source of the recording", recording.sources[0].source, _is_text, text
    if cut.features is not None:
        features = cut.features
        for name in ("num_frames", "num_features"):
            yield f"{name} of the features", getattr(features, name), _is_count, count
        for name in ("type", "storage_type", "storage_path", "storage_key"):
            yield f"{name} of the features", getattr(features, name), _is_text, text
