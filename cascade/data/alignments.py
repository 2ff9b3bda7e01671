"""Words with their times, as cuts, raw manifests and CTM files hold them.

A CTM file (NIST's time-marked conversation format) has a line `utterance channel start duration word [confidence]` per
word, times in seconds from the utterance's start; lines that begin with `;;` are comments. White space and `%` in an
utterance's id are written as in a URL: `%20`, `%25`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy

from cascade.corpus.cuts import Cut, read_cuts, write_cuts
from cascade.corpus.manifests import Utterance, read_manifest
from cascade.files import replacing

_CHANNEL = "1"


@dataclass(frozen=True)
class TimedWord:
    """A word and where it lies, in seconds from the utterance's start."""

    word: str
    start: float
    end: float
    confidence: float | None = None


def read_alignments(manifest: str | Path) -> dict[str, list[TimedWord]]:
    """The words of every utterance that has their times, by id.

    Args:
      manifest: CUTS.jsonl.gz (the supervisions' alignment "word") or MANIFEST.jsonl (`words`).
    """
    alignments: dict[str, list[TimedWord]] = {}
    if Path(manifest).suffix == ".jsonl":
        for line in read_manifest(manifest):
            if isinstance(line, Utterance) and line.words:
                pairs = zip(line.text.split(), line.words, strict=True)
                alignments[line.id] = [TimedWord(word, start, end) for word, (start, end) in pairs]
        return alignments
    for cut in read_cuts(manifest):
        parts = [(supervision.alignment or {}).get("word") for supervision in cut.supervisions]
        if parts and all(parts):
            words = [word for part in parts for word in part]
            alignments[cut.id] = [TimedWord(word.symbol, word.start, word.end, word.score) for word in words]
    return alignments


def read_ctm(path: str | Path) -> dict[str, list[TimedWord]]:
    """The words of every utterance of a CTM file, in the order of their times.

    Raises:
      FileNotFoundError, ValueError: no such file; a line that is none of CTM's, named by its number.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"alignment not found: {path}")
    alignments: dict[str, list[TimedWord]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or line.startswith(";;"):
            continue
        parts = line.split()
        try:
            name, _, start, duration, word = parts[:5]
            start, duration = float(start), float(duration)
            confidence = float(parts[5]) if len(parts) > 5 else None
            if not (start >= 0 and duration >= 0 and math.isfinite(start + duration)):
                raise ValueError
        except ValueError as error:
            raise ValueError(
                f"{path} line {number}: expected 'utterance channel start duration word [confidence]', got {line!r}"
            ) from error
        alignments.setdefault(unquote(name), []).append(TimedWord(word, start, start + duration, confidence))
    return {name: sorted(words, key=lambda word: word.start) for name, words in alignments.items()}


def write_ctm(path: str | Path, alignments: Mapping[str, Sequence[TimedWord]]) -> None:
    """Write the words of all utterances, in the order of the mapping, to a CTM file that is whole or absent."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for name, words in alignments.items():
            name = re.sub(r"^;|[\s%]", lambda match: quote(match[0]), name)
            for word in words:
                start, duration = round(word.start, 3), max(0.0, round(word.end - word.start, 3))
                confidence = "" if word.confidence is None else f" {word.confidence:.4f}"
                file.write(f"{name} {_CHANNEL} {start:.3f} {duration:.3f} {word.word}{confidence}\n")


def write_aligned_cuts(
    source: str | Path, target: str | Path, alignments: Mapping[str, Sequence[TimedWord]]
) -> None:  # fmt: skip
    """Copy cuts; the supervision of those that have an alignment (and one supervision) gets it as "word"."""
    write_cuts(target, _aligned(read_cuts(source), alignments))


def _aligned(cuts: Iterable[Cut], alignments: Mapping[str, Sequence[TimedWord]]) -> Iterator[Cut]:
    for cut in cuts:
        words = alignments.get(cut.id)
        if words is None or len(cut.supervisions) != 1:
            yield cut
            continue
        supervision = cut.supervisions[0]
        aligned = [
            AlignmentItem(word.word, round(word.start, 6), round(word.end - word.start, 6), word.confidence)
            for word in words
        ]
        yield fastcopy(
            cut, supervisions=[fastcopy(supervision, alignment={**(supervision.alignment or {}), "word": aligned})]
        )
