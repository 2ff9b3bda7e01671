"""Several corpora in one table: every utterance as its manifest has it, speakers of two corpora never one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.corpus.tables import read_table

PROGRAM = Path(__file__).parents[2] / "tools" / "join_manifests.py"


def join(*words):
    return subprocess.run([sys.executable, PROGRAM, *map(str, words)], capture_output=True, text=True)


def write(folder, name, *lines):
    (folder / "audio  dir").mkdir(parents=True, exist_ok=True)
    for line in lines:
        (folder / line["path"]).touch()
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def corpora(tmp_path):
    one = write(tmp_path / "one", "train.jsonl",
                {"id": "a", "path": "audio  dir/a.wav", "text": " ONE\tTWO ", "speaker": "s"},
                {"id": "b", "path": "audio  dir/b.wav", "text": '"THREE" "'})
    two = write(tmp_path / "two", "train.jsonl",
                {"id": "a", "path": "a.wav", "text": "FOUR", "speaker": "s", "start": 0.5, "end": 2})
    dev = write(tmp_path / "one", "dev.jsonl", {"id": "c", "path": "c.wav", "text": "FIVE", "speaker": "s"})
    return one, two, dev


def test_a_table_has_every_utterance_of_the_manifests(corpora, tmp_path):
    one, two, dev = corpora
    done = join("--train", one, two, "--dev", dev, "--out", tmp_path / "all.tsv")
    assert done.returncode == 0 and "4 utterances of 3 manifests" in done.stderr
    rows = read_table(tmp_path / "all.tsv")
    assert [(row.path.name, row.text, row.split, row.speaker, row.start, row.end) for row in rows] == [
        ("a.wav", "ONE TWO", "train", "1-s", None, None), ("b.wav", '"THREE" "', "train", None, None, None),
        ("a.wav", "FOUR", "train", "2-s", 0.5, 2.0), ("c.wav", "FIVE", "dev", "1-s", None, None),
    ]
    assert all(row.path.is_file() for row in rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"), ("", "has no utterances"), ('{"id": "a", "path": "a", "text": 5}', "text must be a string"),
        ('{"id": "a", "path": "a\\tb", "text": "A"}', "path with tabs"),
    ],
)
def test_a_manifest_that_cannot_be_joined_is_refused_in_one_sentence(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    done = join("--train", tmp_path / "bad.jsonl", "--out", tmp_path / "all.tsv")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and "bad.jsonl" in done.stderr and not (tmp_path / "all.tsv").exists()


def test_a_manifest_that_is_missing_is_named(tmp_path):
    done = join("--train", tmp_path / "none.jsonl", "--out", tmp_path / "all.tsv")
    assert done.returncode == 1 and "none.jsonl" in done.stderr and done.stderr.count("\n") == 1


def test_the_times_of_words_that_a_table_cannot_hold_are_told(tmp_path):
    train = write(tmp_path, "train.jsonl", {"id": "a", "path": "a.wav", "text": "ONE", "words": [[0, 1]]})
    done = join("--train", train, "--out", tmp_path / "all.tsv")
    assert done.returncode == 0 and "the words' times of 1 utterances are left out" in done.stderr
