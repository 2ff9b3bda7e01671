"""egs/librispeech: local/prepare.py on tiny trees of LibriSpeech's layout, and what run.sh makes of its options."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from cascade.bin.prepare_data import prepare
from cascade.corpus import download as module
from cascade.corpus.quarantine import read_quarantine
from tests.corpus.test_download import tar_bytes
from tests.recipe_commands import commands_of
from tests.synthetic import small_config, tone

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "egs" / "librispeech"
MINI = ROOT.parent / "shared" / "corpora" / "mini_librispeech"


@pytest.fixture
def run_prepare(monkeypatch, capsys):
    """Runs local/prepare.py with arguments; returns its exit code and what it said on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        try:
            runpy.run_path(str(RECIPE / "local" / "prepare.py"), run_name="__main__")
        except SystemExit as exit_:
            return exit_.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def write_part(root: Path, part: str, speaker: int, num_utterances: int = 2) -> Path:
    """A part with one chapter; returns the chapter's folder."""
    chapter = root / part / str(speaker) / "7"
    chapter.mkdir(parents=True)
    names = [f"{speaker}-7-{index:04d}" for index in range(num_utterances)]
    for index, name in enumerate(names):
        soundfile.write(chapter / f"{name}.flac", tone(1.0, seed=index), 16000)
    (chapter / f"{speaker}-7.trans.txt").write_text("".join(f"{name} SHE HAD {name[-1]} CATS\n" for name in names))
    return chapter


def write_parts(root: Path, *parts: str) -> Path:
    for speaker, part in enumerate(parts, 100):
        write_part(root, part, speaker)
    return root


def read(out: Path) -> dict[str, list[dict]]:
    files = sorted(out.glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def parts_of(out: Path) -> dict[str, list[str]]:
    """The parts that each manifest has utterances of."""
    return {split: sorted({Path(item["path"]).parts[-4] for item in items}) for split, items in read(out).items()}


@pytest.mark.parametrize("folder", ["", "LibriSpeech"])
def test_utterances_have_text_speaker_and_an_existing_file(tmp_path, run_prepare, folder):
    write_parts(tmp_path / "c" / folder, "train-clean-5", "dev-clean-2")
    code, said = run_prepare("--corpus-dir", tmp_path / "c", "--out", tmp_path / "out")
    assert code == 0 and "test is dev-clean-2" in said
    splits = read(tmp_path / "out")
    assert [(item["id"], item["text"], item["speaker"]) for item in splits["train"]] == [
        ("100-7-0000", "SHE HAD 0 CATS", "100"), ("100-7-0001", "SHE HAD 1 CATS", "100"),
    ]
    assert splits["test"] == splits["dev"] and len(splits["dev"]) == 2
    assert all(Path(item["path"]).is_file() for items in splits.values() for item in items)


FULL = ["train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean", "test-other"]


@pytest.mark.parametrize(
    ("there", "options", "taken"),
    [
        (FULL, [], {"train": FULL[:3], "dev": FULL[3:5], "test-clean": ["test-clean"], "test-other": ["test-other"]}),
        (FULL, ["--set", "clean-100"], {"train": FULL[:1], "dev": ["dev-clean"], "test": ["test-clean"]}),
        (["train-mini", "dev-mini"], [], {"train": ["train-mini"], "dev": ["dev-mini"], "test": ["dev-mini"]}),
        (
            ["train-clean-5", "train-clean-100", "dev-clean-2", "dev-clean"], [],
            {"train": ["train-clean-100"], "dev": ["dev-clean"], "test": ["dev-clean"]},
        ),
        (
            ["train-clean-5", "train-clean-100", "dev-clean-2"], ["--set", "mini"],
            {"train": ["train-clean-5"], "dev": ["dev-clean-2"], "test": ["dev-clean-2"]},
        ),
    ],
)
def test_parts_are_those_asked_for_or_all_there_are(tmp_path, run_prepare, there, options, taken):
    write_parts(tmp_path / "c", *there)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test-other.jsonl").write_text("of an earlier choice\n")
    code, said = run_prepare("--corpus-dir", tmp_path / "c", "--out", tmp_path / "out", *options)
    assert code == 0, said
    assert parts_of(tmp_path / "out") == taken
    assert all(f"{split}: {', '.join(sorted(parts))}" in said for split, parts in taken.items())


@pytest.mark.parametrize(
    ("there", "options", "named"),
    [
        ([], [], "no folder train-*"),
        (["train-clean-100"], [], "no folder dev-*"),
        (["train-clean-5", "dev-clean"], ["--set", "mini"], "no dev-clean-2 in"),
        (["train-clean-5", "dev-clean-2"], ["--set", "full"], "no train-clean-100 in"),
    ],
)
def test_a_wrong_folder_is_one_sentence(tmp_path, run_prepare, there, options, named):
    write_parts(tmp_path / "c", *there)
    code, said = run_prepare("--corpus-dir", tmp_path / "c", "--out", tmp_path / "out", *options)
    assert code == 1 and said.startswith("error: ") and said.count("\n") == 1 and named in said, said
    assert not (tmp_path / "out").exists()


def test_a_part_without_transcripts_is_one_sentence(tmp_path, run_prepare):
    write_parts(tmp_path, "train-clean-5", "dev-clean-2")
    (tmp_path / "train-clean-5" / "100" / "7" / "100-7.trans.txt").unlink()
    code, said = run_prepare("--corpus-dir", tmp_path, "--out", tmp_path / "out")
    assert code == 1 and "train-clean-5 holds no SPEAKER/CHAPTER/" in said.splitlines()[-1]


def test_what_lacks_its_recording_or_its_text_is_set_aside_with_a_reason(tmp_path, run_prepare):
    write_parts(tmp_path / "c", "train-clean-5", "dev-clean-2")
    chapter = write_part(tmp_path / "c", "train-clean-5", 200, num_utterances=3)
    (chapter / "200-7-0001.flac").unlink()
    transcript = chapter / "200-7.trans.txt"
    transcript.write_text("".join(transcript.read_text().splitlines(keepends=True)[:-1]))
    assert run_prepare("--corpus-dir", tmp_path / "c", "--out", tmp_path / "out")[0] == 0
    prepare(tmp_path / "out", tmp_path / "data", small_config())
    reasons = {item.id: item.reason for item in read_quarantine(tmp_path / "data" / "quarantine.jsonl")}
    assert reasons.keys() == {"200-7-0001", "200-7-0002"}
    assert "unreadable audio" in reasons["200-7-0001"] and "empty text" in reasons["200-7-0002"]


def test_a_download_is_unpacked_once_and_its_archive_goes(tmp_path, run_prepare, monkeypatch):
    urls = []

    def fetch(url, path, md5):
        assert len(md5) == 32
        urls.append(url)
        part = url.rsplit("/", 1)[1].removesuffix(".tar.gz")
        write_parts(tmp_path / "src" / part, part)
        files = [file for file in (tmp_path / "src" / part).rglob("*") if file.is_file()]
        members = {f"LibriSpeech/{file.relative_to(tmp_path / 'src' / part)}": file.read_bytes() for file in files}
        Path(path).write_bytes(tar_bytes(members | {"LibriSpeech/README.TXT": b""}))

    monkeypatch.setattr(module, "download", fetch)
    for _ in range(2):
        code, said = run_prepare("--download-dir", tmp_path / "d", "--set", "mini", "--out", tmp_path / "out")
        assert code == 0, said
    assert [url.split("/")[-2:] for url in urls] == [["31", "train-clean-5.tar.gz"], ["31", "dev-clean-2.tar.gz"]]
    assert parts_of(tmp_path / "out")["train"] == ["train-clean-5"]
    assert not list((tmp_path / "d").glob("*.tar"))


def test_a_failed_download_is_one_sentence_that_says_what_else_to_do(tmp_path, run_prepare, monkeypatch):
    def fail(url, path, md5):
        raise OSError("no route to host")

    monkeypatch.setattr(module, "download", fail)
    for options, instead in ((["--download-dir", tmp_path / "d", "--set", "mini"], "--corpus-dir DIR"),
                             (["--musan-dir", tmp_path / "d"], "--noise-dir DIR")):
        code, said = run_prepare(*options, "--out", tmp_path / "out")
        assert code == 1 and said.startswith("error: could not download https://www.openslr.org/"), said
        assert said.count("\n") == 1 and instead in said


def test_too_small_a_disk_is_found_before_anything_is_downloaded(tmp_path, run_prepare, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 9e9}))
    code, said = run_prepare("--download-dir", tmp_path / "d", "--out", tmp_path / "out")
    assert code == 1 and "9.0 GB of free space" in said and "--mini" in said and said.count("\n") == 1


def test_what_an_earlier_run_has_fetched_needs_no_space_again(tmp_path, run_prepare, monkeypatch):
    def fail(url, path, md5):
        raise OSError("as far as this test goes")

    monkeypatch.setattr(module, "download", fail)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0.9e9}))
    options = ["--download-dir", tmp_path / "d", "--set", "mini", "--out", tmp_path / "out"]  # 1.0 GB
    assert "0.9 GB of free space" in run_prepare(*options)[1]
    with open(tmp_path / "d" / "train-clean-5.tar.part", "wb") as file:
        file.truncate(200_000_000)  # a hole: it takes no space
    assert "as far as this test goes" in run_prepare(*options)[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--mini", "--full"], "choose one of --full"), (["--musan", "--noise-dir", "."], "choose one of --musan"),
        (["--num-processes", "two"], "--num-processes must be a whole number"), (["--rir-dir", "no"], "--rir-dir"),
        (["--epochs", "0"], "--epochs must be at least 1"), (["--lm-order", "8"], "--lm-order goes up to 7"),
    ],
)
def test_wrong_use_of_the_recipe_is_one_sentence_and_exits_with_2(tmp_path, options, named):
    command = [RECIPE / "run.sh", *options, "--exp-dir", tmp_path / "exp", "--stop-stage", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and named in done.stderr  # before anything is set up
    assert not (tmp_path / "exp" / "manifests").exists()


def option(command: str, name: str) -> str:
    return command.split(f" {name} ", 1)[1].split()[0]


def test_every_test_set_is_decoded_apart(tmp_path):
    commands = commands_of("librispeech", tmp_path, "--full", tests=("test-clean", "test-other"))
    decodings = [command for command in commands if "cascade.bin.decode" in command]
    assert len(decodings) == len({option(command, "--out") for command in decodings}) == 2 * 3
    for command in decodings:
        test = option(command, "--manifest").rsplit("/", 1)[1].removesuffix("_cuts.jsonl.gz")
        assert test in ("test-clean", "test-other") and " --mode all --method all" in command
        assert option(command, "--out") == f"{option(command, '--exp-dir')}/decode/{test.removeprefix('test-')}"


def test_one_test_set_is_decoded_into_one_folder(tmp_path):
    commands = commands_of("librispeech", tmp_path, "--mini")
    assert "--set mini" in commands[0] and "--download-dir egs/books/download" in commands[0]
    outs = [option(command, "--out") for command in commands if "cascade.bin.decode" in command]
    assert outs == [f"egs/books/exp/{model}/decode" for model in ("teacher", "student_alone", "student")]
    assert not any("conf/small" in command or "--noise-dir" in command for command in commands)


def test_options_reach_the_programs(tmp_path):
    options = ("--clean-100", "--small", "--musan", "--num-processes", "4", "--epochs", "3", "--device", "cuda")
    commands = commands_of("librispeech", tmp_path, *options)
    trainings = [command for command in commands if "cascade.bin.train " in command]
    assert len(trainings) == 3
    for command in trainings:
        assert " --device cuda --num-processes 4 " in command and "training.num_epochs=3" in command
        assert "conf/small/data.yaml" in command
    assert all(option(command, "--device") == "cuda" for command in commands if "cascade.bin.decode" in command)
    assert all("conf/small/teacher.yaml" in command for command in trainings)
    assert sum("conf/small/student.yaml" in command for command in trainings) == 2
    assert any("prepare.py --musan-dir egs/books/download" in command for command in commands)
    features = next(command for command in commands if "compute_features" in command)
    assert option(features, "--noise-dir") == "egs/books/download/musan/noise"


@pytest.mark.skipif(not MINI.is_dir(), reason="no copy of the mini set in ../shared/corpora")
def test_a_real_mini_set_is_complete(tmp_path, run_prepare):
    code, said = run_prepare("--corpus-dir", MINI, "--out", tmp_path)
    assert code == 0, said
    splits = read(tmp_path)
    assert {split: len(items) for split, items in splits.items()} == {"train": 1244, "dev": 122, "test": 122}
    assert sum(len(item["text"].split()) for item in splits["train"]) == 43088
    assert not {item["speaker"] for item in splits["train"]} & {item["speaker"] for item in splits["dev"]}
    assert all(Path(item["path"]).is_file() for items in splits.values() for item in items)
