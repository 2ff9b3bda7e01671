"""Lines of lhotse cuts, checked as far as this project relies on them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
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
    for place, value, kind in _facts(cut):
        if not _KINDS[kind](value):
            raise ValueError(f"{prefix}{place} must be {kind}, got {value!r}")
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KINDS = {
    "a string that is not empty": lambda value: isinstance(value, str) and bool(value),
    "a string": lambda value: value is None or isinstance(value, str),
    "a whole positive number": lambda value: _is_number(value) and isinstance(value, int) and 0 < value < 1 << 53,
    "a number of seconds, 0 or more": lambda value: _is_number(value) and 0 <= value < 1e12,
    "a positive number of seconds": lambda value: _is_number(value) and 0 < value < 1e12,
    "a positive number": lambda value: _is_number(value) and 0 < value < 1e12 and math.isfinite(1 / value),
    "a list": lambda value: isinstance(value, list),
    "an object": lambda value: value is None or isinstance(value, dict),
    "a list with one source at least": bool,
}
_TEXT, _TEXT_OR_NONE, _COUNT, _TIME, _DURATION, _POSITIVE, _LIST, _OBJECT, _SOURCES = _KINDS


def _facts(cut: Cut) -> Iterator[tuple[str, Any, str]]:
    """(place, value, kind that it must be of) of everything that is read of a cut."""
    yield from (("id", cut.id, _TEXT), ("start", cut.start, _TIME), ("duration", cut.duration, _DURATION))
    yield "supervisions", cut.supervisions, _LIST
    for supervision in cut.supervisions:
        yield "text of a supervision", supervision.text, _TEXT_OR_NONE
        yield "speaker of a supervision", supervision.speaker, _TEXT_OR_NONE
    yield "custom", cut.custom, _OBJECT
    if cut.custom and "utterance" in cut.custom:
        yield "custom utterance", cut.custom["utterance"], _TEXT
        yield "custom speed", cut.custom.get("speed"), _POSITIVE
    if cut.recording is not None:
        yield "sampling_rate of the recording", cut.recording.sampling_rate, _COUNT
        yield "num_samples of the recording", cut.recording.num_samples, _COUNT
        yield "duration of the recording", cut.recording.duration, _DURATION
        yield "sources of the recording", cut.recording.sources, _SOURCES
        yield "source of the recording", cut.recording.sources[0].source, _TEXT
    if cut.features is not None:
        for name in ("num_frames", "num_features"):
            yield f"{name} of the features", getattr(cut.features, name), _COUNT
        for name in ("type", "storage_type", "storage_path", "storage_key"):
            yield f"{name} of the features", getattr(cut.features, name), _TEXT
