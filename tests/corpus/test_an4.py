import json
import runpy
import sys
from pathlib import Path

import pytest
import soundfile

from tests.synthetic import AN4, tone

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_prepare(monkeypatch):
    """Runs egs/an4/local/prepare.py with arguments; returns its exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "egs/an4/local/prepare.py"), run_name="__main__")
        except SystemExit as exit_:
            return exit_.code
        return 0

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_corpus(root, train=(("fash", "an1-fash-b", "YES NO"), ("mmaf", "an2-mmaf-b", "GO"))):
    (root / "etc").mkdir(parents=True)
    for split, lines in (("train", train), ("test", [("fcaw", "an3-fcaw-b", "B A")])):
        folder = "an4test_clstk" if split == "test" else "an4_clstk"
        fileids = "".join(f"{folder}/{speaker}/{name}\n" for speaker, name, _ in lines)
        (root / "etc" / f"an4_{split}.fileids").write_text(fileids)
        marks = ("<s> ", " </s>") if split == "train" else ("", "")
        transcripts = "".join(f"{marks[0]}{text}{marks[1]} ({name})\n" for _, name, text in lines)
        (root / "etc" / f"an4_{split}.transcription").write_text(transcripts)
        for speaker, name, _ in lines:
            path = root / "wav" / folder / speaker / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(0.5), 16000)
    return root


def test_manifests_have_text_without_marks_and_dev_speakers_apart(tmp_path, run_prepare):
    corpus = write_corpus(tmp_path / "an4")
    assert run_prepare("--corpus-dir", corpus, "--out", tmp_path / "out") == 0
    splits = {split: read(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    assert [(item["id"], item["text"], item["speaker"]) for items in splits.values() for item in items] == [
        ("an1-fash-b", "YES NO", "fash"), ("an2-mmaf-b", "GO", "mmaf"), ("an3-fcaw-b", "B A", "fcaw"),
    ]
    assert all(Path(item["path"]).is_file() for items in splits.values() for item in items)


def test_a_folder_without_the_corpus_is_an_error_of_one_sentence(tmp_path, run_prepare, capsys):
    assert run_prepare("--corpus-dir", tmp_path, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no AN4 in") and "an4_train.fileids is missing" in error and error.count("\n") == 1
    assert run_prepare("--out", tmp_path / "out") == 2


def test_transcripts_of_other_utterances_are_an_error(tmp_path, run_prepare, capsys):
    corpus = write_corpus(tmp_path / "an4")
    (corpus / "etc" / "an4_train.transcription").write_text("<s> YES </s> (an9-fash-b)\n<s> GO </s> (an2-mmaf-b)\n")
    assert run_prepare("--corpus-dir", corpus, "--out", tmp_path / "out") == 1
    assert "not of one utterance" in capsys.readouterr().err


@pytest.mark.skipif(not AN4.is_dir(), reason="no copy of AN4 in ../shared/corpora")
def test_the_real_corpus_is_complete(tmp_path, run_prepare):
    assert run_prepare("--corpus-dir", AN4, "--out", tmp_path) == 0
    splits = {split: read(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test")}
    assert {split: len(items) for split, items in splits.items()} == {"train": 848, "dev": 100, "test": 130}
    speakers = [{item["speaker"] for item in items} for items in splits.values()]
    assert not speakers[0] & speakers[1] and not (speakers[0] | speakers[1]) & speakers[2]
    assert sum(len(item["text"].split()) for item in splits["test"]) == 773
    expected = {item["id"]: item for item in read(AN4 / "manifest.jsonl")}
    for item in splits["train"] + splits["dev"] + splits["test"]:
        assert item["text"] == expected[item["id"]]["text"]
        assert Path(item["path"]).is_file()
