"""The raw manifest, the contract between a recipe's local/prepare.py and everything after it.

MANIFEST.jsonl, UTF-8, one object per line:
  id       string, unique in the file, not empty
  path     string, the audio file: absolute, or relative to the manifest's folder
  text     string, the transcript
  speaker  string, optional
  start, end   seconds, optional: the part of the file that the utterance is
  words    optional: [start, end] in seconds from the utterance's start, one pair for each word of text (an alignment)
Other keys are ignored, blank lines are skipped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cascade.corpus.quarantine import DUPLICATE, MALFORMED, Problem
from cascade.files import replacing

_FOREVER = 1e12
"""Seconds that no recording has; JSON has infinite numbers and whole ones that no float holds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest."""

    id: str
    path: Path
    text: str
    speaker: str | None = None
    start: float | None = None
    end: float | None = None
    words: list[list[float]] | None = None


def read_manifest(manifest: str | Path) -> Iterator[Utterance | Problem]:
    """Yield each line of a manifest as an Utterance, or as the Problem that it is.

    Raises:
      FileNotFoundError: no such manifest.
      ValueError: the file is not UTF-8 text.
    """
    manifest = Path(manifest)
    if not manifest.is_file():
        raise FileNotFoundError(f"manifest not found: {manifest}")
    first_line: dict[str, int] = {}
    with open(manifest, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if not line.strip():
                    continue
                utterance = _parse(line, manifest.parent)
            except ValueError as error:
                reason = f"{MALFORMED}: {manifest} line {number}: {error}"
                yield Problem(f"line {number}", manifest.stem, str(manifest), reason)
                continue
            earlier = first_line.setdefault(utterance.id, number)
            if earlier != number:
                reason = f"{DUPLICATE}: {manifest} line {number}, first seen in line {earlier}"
                yield Problem(utterance.id, manifest.stem, str(utterance.path), reason)
            else:
                yield utterance


def _parse(line: bytes, folder: Path) -> Utterance:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not a JSON object of this kind, nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    for key in ("id", "path", "text", "speaker"):
        if key == "speaker" and values.get(key) is None:
            continue
        if not isinstance(values.get(key), str):
            raise ValueError(f"{key} must be a string, got {values.get(key)!r}")
        try:
            values[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{key} holds half a character (a lone surrogate) at {error.start}") from error
    for key in ("id", "path"):
        if not values[key].strip():
            raise ValueError(f"{key} must not be empty")
    for key in ("start", "end"):
        if values.get(key) is not None and not _is_number(values[key]):
            raise ValueError(f"{key} must be a number of seconds, got {values[key]!r}")
    words = values.get("words")
    if words is not None:
        _check_words(words, len(values["text"].split()))
    return Utterance(
        values["id"], folder / values["path"], values["text"], values.get("speaker"), values.get("start"),
        values.get("end"), words,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _FOREVER


def _check_words(words: object, num_words: int) -> None:
    if not isinstance(words, list) or len(words) != num_words:
        given = f"{len(words)}" if isinstance(words, list) else repr(words)
        raise ValueError(f"words must have a pair [start, end] for each of the {num_words} words of text, got {given}")
    for pair in words:
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) and 0 <= pair[0] <= pair[1]):
            raise ValueError(f"words must hold pairs [start, end] of seconds, start before end, got {pair!r}")


def write_manifest(manifest: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write utterances as a manifest that is whole or absent, and log how many there are."""
    count = 0
    with replacing(manifest) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for utterance in utterances:
            values = {key: value for key, value in asdict(utterance).items() if value is not None}
            values["path"] = str(utterance.path)
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            count += 1
    log.info("%s: %d utterances", manifest, count)


def write_about(folder: Path, data: str, license: str) -> None:
    """Write about.json beside the manifests: what the corpus is, and under which licence weights made of it are."""
    about = json.dumps({"data": data, "license": license}, ensure_ascii=False)
    with replacing(folder / "about.json") as temporary:
        temporary.write_text(about + "\n", encoding="utf-8")
