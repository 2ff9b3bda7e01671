"""A corpus given as one table: path, text and, where known, split, speaker, start and end, tab-separated.

    path            text             speaker
    clips/0001.wav  Guten Tag        anna
    clips/0002.mp3  Wie geht es dir  ben

The first line names the columns, in any order and case; other columns are ignored. Without such a line the columns are
path, text, split, speaker, start, end, and the last ones may be left out. The file is UTF-8 or, with its mark at the
beginning, UTF-16; lines may end as on Windows, blank ones are skipped. A cell between double quotes, with every quote
inside doubled, is unquoted as spreadsheets write it; all other quotes are text.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cascade.corpus.manifests import Utterance
from cascade.corpus.splits import SPLITS, split_by

COLUMNS = ("path", "text", "split", "speaker", "start", "end")
_OTHER_NAMES = {
    "audio": "path", "audio_path": "path", "file": "path", "filename": "path", "sentence": "text", "transcript": "text",
    "transcription": "text", "client_id": "speaker", "speaker_id": "speaker",
}
_SPLIT_NAMES = {
    "train": "train", "training": "train", "dev": "dev", "valid": "dev", "val": "dev", "validation": "dev",
    "development": "dev", "test": "test", "eval": "test", "evaluation": "test",
}
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    line: int
    path: Path
    text: str
    split: str | None
    speaker: str | None
    start: float | None
    end: float | None


def read_table(table: str | Path, audio_dir: str | Path | None = None) -> list[Row]:
    """Read and check a table.

    Args:
      audio_dir: where relative paths start; the table's folder if None.
    Raises:
      FileNotFoundError: no such table.
      ValueError: what is wrong, with line and column.
    """
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"table not found: {table}")
    folder = Path(audio_dir) if audio_dir is not None else table.parent
    lines = list(_lines(table))
    if not lines:
        raise ValueError(f"{table} is empty: it must have a line `path<TAB>text` for each utterance")
    columns = _header(table, folder, *lines[0])
    if columns is None:
        columns = COLUMNS[: max(len(cells) for _, cells in lines)]
    else:
        del lines[0]
    if not lines:
        raise ValueError(f"{table} names its columns and has no other line")
    rows = [_row(table, folder, number, cells, columns) for number, cells in lines]
    unsplit = [row.line for row in rows if row.split is None]
    if 0 < len(unsplit) < len(rows):
        raise ValueError(f"{table} line {unsplit[0]}, column split: empty, but other lines name theirs")
    _check_files(table, folder, rows)
    return rows


def _lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not blank."""
    data = table.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        number = 1 + data[: error.start].count(b"\n")
        raise ValueError(f"{table} line {number} is not UTF-8 text: save the table as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        cells = [_cell(cell) for cell in line.rstrip("\r").split("\t")]
        if any(cells):
            yield number, cells


def _cell(cell: str) -> str:
    cell = cell.strip()
    quoted = _QUOTED.fullmatch(cell)
    return quoted[1].replace('""', '"').strip() if quoted else cell


def _header(table: Path, folder: Path, number: int, cells: list[str]) -> list[str | None] | None:
    """The meaning of each column, None for those that have none, if this line names them; else None."""
    names = [cell.lower() for cell in cells]
    columns = [name if name in COLUMNS else _OTHER_NAMES.get(name) for name in names]
    if not {"path", "text"} & set(columns) or (folder / cells[0]).is_file():
        return None
    for name in ("path", "text"):
        if name not in columns:
            raise ValueError(f"{table} line {number} names the columns {', '.join(names)}: {name} is missing")
    for column, count in Counter(filter(None, columns)).items():
        if count > 1:
            twice = [name for name, meaning in zip(names, columns, strict=True) if meaning == column]
            raise ValueError(f"{table} line {number}: the columns {', '.join(twice)} all mean {column}, keep one")
    ignored = [name or "without a name" for name, meaning in zip(names, columns, strict=True) if meaning is None]
    if ignored:
        log.warning("%s: columns that mean nothing here are ignored: %s", table, ", ".join(ignored))
    return columns


def _row(table: Path, folder: Path, number: int, cells: list[str], columns) -> Row:
    if len(cells) > len(columns):
        if any(cells[len(columns) :]):
            raise ValueError(
                f"{table} line {number} has {len(cells)} cells, the table has {len(columns)} columns "
                f"({', '.join(str(column or 'ignored') for column in columns)}): is there a tab inside a cell?"
            )
    elif len(cells) < 2:
        comma = ": are its cells separated by commas?" if "," in cells[0] else ""
        raise ValueError(f"{table} line {number} has one cell, it needs path and text with a tab between{comma}")
    values = {column: cell for column, cell in zip(columns, cells, strict=False) if column is not None}

    def wrong(column: str, message: str) -> ValueError:
        return ValueError(f"{table} line {number}, column {column}: {message}")

    if not values.get("path"):
        raise wrong("path", "empty")
    split = values.get("split") or None
    if split is not None:
        if split.lower() not in _SPLIT_NAMES:
            raise wrong("split", f"must be train, dev or test, got {split!r}")
        split = _SPLIT_NAMES[split.lower()]
    times = {}
    for name in ("start", "end"):
        try:
            times[name] = float(values[name]) if values.get(name) else None
        except ValueError as error:
            raise wrong(name, f"must be a number of seconds, got {values[name]!r}") from error
        if times[name] is not None and not 0 <= times[name] < float("inf"):
            raise wrong(name, f"must be at least 0, got {values[name]!r}")
    if times["end"] is not None and times["end"] <= (times["start"] or 0.0):
        raise wrong("end", f"must lie after start {times['start'] or 0:g}, got {times['end']:g}")
    return Row(number, folder / values["path"], values.get("text", ""), split, values.get("speaker") or None, **times)


def _check_files(table: Path, folder: Path, rows: list[Row]) -> None:
    there = {path: path.is_file() for path in {row.path for row in rows}}
    missing = [row for row in rows if not there[row.path]]
    if len(missing) == len(rows):
        raise ValueError(
            f"{table} line {rows[0].line}, column path: {rows[0].path} not found, nor any other file of the table; "
            f"relative paths start at {folder}"
        )
    if missing:
        log.warning(
            "%s: %d of %d lines name files that do not exist, the first is line %d (%s); they will be set aside",
            table, len(missing), len(rows), missing[0].line, missing[0].path,
        )


def utterances_of(rows: list[Row], seed: int) -> dict[str, list[Utterance]]:
    """The utterances of train, dev and test in the table's order; tells how they were split.

    With a split column, what it says holds; a dev or test split that it lacks is taken out of train.
    """
    named = {split: [row for row in rows if row.split == split] for split in SPLITS}
    if all(row.split is None for row in rows):
        named = _divide(rows, SPLITS, seed, "the table has no split column")
    elif not named["train"]:
        raise ValueError("the table's split column names no train line")
    else:
        lacking = tuple(split for split in SPLITS if not named[split])
        if lacking:
            why = f"the split column names no {' and no '.join(lacking)} line"
            named |= _divide(named["train"], ("train", *lacking), seed, why)
    _tell_overlap(named)
    return {split: [_utterance(row) for row in named[split]] for split in SPLITS}


def _divide(rows: list[Row], splits: tuple[str, ...], seed: int, why: str) -> dict[str, list[Row]]:
    """Split rows by speaker; by recording where speakers are too few or not known."""
    if len(rows) < len(splits):
        raise ValueError(f"{why} and only {len(rows)} lines, too few for {', '.join(splits)}")
    speakers = {row.speaker for row in rows}
    recordings = {str(row.path) for row in rows}
    if None not in speakers and len(speakers) >= len(splits):
        kind, keys = "speaker", [row.speaker for row in rows]
    elif len(recordings) >= len(splits):
        kind, keys = "recording", [str(row.path) for row in rows]
        known = f"there are only {len(speakers)}" if None not in speakers else "not every line names one"
        log.warning("not split by speaker, %s: where voices are in two splits, error rates flatter the model", known)
    else:
        kind, keys = "line", [str(row.line) for row in rows]
        log.warning("there are only %d recordings: parts of one are in two splits", len(recordings))
    chosen = split_by(keys, splits, seed)
    parts = {split: [row for row, name in zip(rows, chosen, strict=True) if name == split] for split in splits}
    counts = ", ".join(
        f"{split} {len(part)} lines of {len({key for key, name in zip(keys, chosen, strict=True) if name == split})} "
        f"{kind}s" for split, part in parts.items()
    )
    log.info("%s: split by %s with seed %d: %s", why, kind, seed, counts)
    return parts


def _tell_overlap(named: dict[str, list[Row]]) -> None:
    for kind, get in (("speakers", lambda row: row.speaker), ("recordings", lambda row: row.path)):
        train = {get(row) for row in named["train"]} - {None}
        for split in ("dev", "test"):
            shared = len(train & {get(row) for row in named[split]})
            if shared:
                log.warning("%d %s are in both train and %s", shared, kind, split)


def _utterance(row: Row) -> Utterance:
    """Its id is the file's name and the line, unique and easy to find."""
    name = re.sub(r"\s+", "_", row.path.stem)
    return Utterance(f"{name}-{row.line}", row.path.resolve(), row.text, row.speaker, row.start, row.end)
