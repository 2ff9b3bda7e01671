"""Segments as subtitles: SubRip (.srt) and WebVTT (.vtt)."""

from __future__ import annotations

import html
from collections.abc import Iterable

from cascade.stream.decoder import Segment
from cascade.stream.words import Word, join_words

_LONGEST_CUE = 6.0
_LONGEST_PAUSE = 1.0
_MOST_CHARACTERS = 80
_SHORTEST_CUE = 1.0


def cues(segments: Iterable[Segment]) -> list[tuple[float, float, str]]:
    """(start, end, text) of what is shown at once: at most 80 characters or a word, 6 s, no pause of a second inside.

    A cue stays for a second at least, unless the next one begins earlier.
    """
    groups: list[list[Word]] = []
    for segment in segments:
        for place, word in enumerate(segment.words):
            if place == 0 or not _fits(groups[-1], word):
                groups.append([])
            groups[-1].append(word)
    starts = [group[0].start for group in groups[1:]] + [float("inf")]
    return [
        (
            group[0].start,
            max(min(max(group[-1].end, group[0].start + _SHORTEST_CUE), following), group[-1].end),
            join_words(group),
        )
        for group, following in zip(groups, starts, strict=False)
    ]


def _fits(group: list[Word], word: Word) -> bool:
    characters = sum(len(other.word) + 1 for other in group) + len(word.word)
    return (
        characters <= _MOST_CHARACTERS
        and word.end - group[0].start <= _LONGEST_CUE
        and word.start - group[-1].end <= _LONGEST_PAUSE
    )


def clock(seconds: float, mark: str = ".") -> str:
    """HH:MM:SS.mmm"""
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def format_srt(segments: Iterable[Segment]) -> str:
    return "\n".join(
        f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(cues(segments), 1)
    )


def format_vtt(segments: Iterable[Segment]) -> str:
    lines = [
        f"\n{clock(start)} --> {clock(end)}\n{html.escape(text, quote=False)}\n"
        for start, end, text in cues(segments)
    ]
    return "WEBVTT\n" + "".join(lines)
