"""Folders of recordings without manifest (noises, room responses): which files count, and how a change is noticed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

SUFFIXES = frozenset(
    ".aif .aifc .aiff .au .caf .flac .mp3 .nist .oga .ogg .opus .rf64 .snd .sph .voc .w64 .wav .wave".split()
)
"""Suffixes of what libsndfile reads; other files (licences, lists) are passed over."""


def find_audio(folder: Path, option: str) -> list[str]:
    """The audio files below a folder, as sorted paths relative to it; hidden ones do not count.

    Raises:
      ValueError: no such folder, or none in it; `option` is the flag that named it.
    """
    if not folder.is_dir():
        raise ValueError(f"{option} must be an existing folder, got {folder}")
    names = [
        (Path(place) / name).relative_to(folder).as_posix() for place, _, files in os.walk(folder) for name in files
        if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
    ]
    if not names:
        raise ValueError(f"{option} {folder} and its sub-folders hold no audio file ({' '.join(sorted(SUFFIXES))})")
    return sorted(names)


def describe(folder: Path, names: list[str]) -> list[tuple[str, int, int]]:
    """(name, size, time of change) of each file: another description means other contents."""
    states = ((name, (folder / name).stat()) for name in names)
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def report(option: str, folder: Path, num_files: int, problems: list[tuple[str, str]], log: logging.Logger) -> None:
    """Warn of each file that cannot be used; problems are (name, reason).

    Raises:
      ValueError: none can be used.
    """
    if problems and len(problems) == num_files:
        name, reason = problems[0]
        raise ValueError(f"{option} {folder}: none of its {num_files} audio files can be used; {name}: {reason}")
    for name, reason in problems:
        reason = reason.removeprefix(f"{folder / name}: ")
        log.warning("%s: %s is not used: %s", option, name, reason)
    log.info("%s: %d of %d files of %s are used", option, num_files - len(problems), num_files, folder)
