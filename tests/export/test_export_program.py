from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch

from cascade import Recognizer
from cascade.bin import export_onnx, transcribe
from cascade.checkpoint import load_file, save_file
from cascade.config.options import ConfigError
from cascade.export import parity
from cascade.export.onnx_engine import OnnxEngine, read_joiner
from cascade.export.sherpa import synthetic_recordings
from cascade.search.methods import METHODS
from cascade.text.ngram_training import train_ngram, write_arpa
from cascade.text.tokens import Tokenizer
from tests.export.conftest import KINDS, make_model_dir
from tools import check_export

FILES = {
    "encoder-streaming.onnx", "encoder-noncausal.onnx", "encoder-look-ahead.onnx", "encoder-full.onnx", "decoder.onnx",
    "joiner.onnx", "tokens.txt", "tokenizer.json", "tokens.model", "README.md", "export.json",
}
FILES_OF_OUR_RUNTIME = FILES - {"encoder-look-ahead.onnx", "encoder-full.onnx", "tokens.model"}
SMALL = ("--chunk-ms", 80, "--look-ahead-ms", 160, "--left-context-ms", 240)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp("run") / "student", next(iter(KINDS)))


def export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [export_onnx.__file__, *map(str, arguments)])
    export_onnx.main()


def test_program_writes_checked_files_and_says_what_they_weigh(student, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "onnx"
    soundfile.write(tmp_path / "a.wav", 0.1 * torch.randn(9000).numpy(), 8000)
    (tmp_path / "some.jsonl").write_text(json.dumps({"id": "a", "path": "a.wav", "text": "one"}) + "\n")
    results, statistics = student / "decode" / "full" / "result.json", student.parent / "data" / "statistics.json"
    row = {"test_set": "test", "mode": "full", "method": "greedy_search", "wer": 12.5, "commit": "abc"}
    silent = student / "decode" / "silence" / "result.json"  # a set without words
    silent.parent.mkdir(parents=True)
    silent.write_text(json.dumps(row | {"test_set": "silence", "wer": None}))
    about = student.parent / "manifests" / "about.json"
    contents = (row, {"splits": {"train": {"hours": 0.5}}}, {"data": "noise", "license": "none"})
    for path, content in zip((results, statistics, about), contents, strict=True):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    for name, content in (("cut", "{"), ("other", "{}")):  # the card does without them
        (student / "decode" / name).mkdir()
        (student / "decode" / name / "result.json").write_text(content)
    options = ("--manifest", tmp_path / "some.jsonl", "--license", "CC0")
    export(monkeypatch, "--exp-dir", student, "--out", out, *SMALL, *options)
    assert {path.name for path in out.iterdir()} == FILES
    about = json.loads((out / "export.json").read_text())
    assert (about["model"], about["chunk_ms"], about["look_ahead_ms"]) == ("student", 80, 160)
    assert about["bytes"] == {name: (out / name).stat().st_size for name in FILES - {"export.json", "README.md"}}
    assert about["total_bytes"] == sum(about["bytes"].values())
    assert about["bytes_stored_twice"] == 4 * 24 * len((out / "tokens.txt").read_text().splitlines())
    assert max(about["max_difference"].values()) < 1e-4 and len(about["max_difference"]) == 6
    if about["sherpa_onnx"] is not None:
        assert about["sherpa_onnx"]["num_recordings"] == 1
    card = (out / "README.md").read_text()
    assert "Append 0.09 s of zeros for encoder-streaming.onnx, 0.17 s for encoder-look-ahead.onnx" in card
    assert "| silence | full | greedy_search | - | abc |" in card
    assert "| test | full | greedy_search | 12.50 | abc |" in card and "Licence of the weights: CC0." in card
    assert "Training data: noise; 0.5 hours" in card and "these are char" in card
    assert "| bpe.vocab |" not in card and "| encoder-noncausal.onnx | non-causal encoder" in card


def test_the_readmes_python_runs(student, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    export(monkeypatch, "--exp-dir", student, "--out", tmp_path, *SMALL, "--no-check")
    lines = (tmp_path / "README.md").read_text().splitlines()
    first = lines.index("    import numpy as np, sherpa_onnx, soundfile")
    last = lines.index("    print(stream.result.text)")
    samples = synthetic_recordings((2.0,), 16000, seed=5).popitem()[1]
    monkeypatch.chdir(tmp_path)
    soundfile.write("FILE.wav", samples, 16000, subtype="FLOAT")
    names = {}
    exec("\n".join(line[4:] for line in lines[first : last + 1]), names)
    online, offline = capsys.readouterr().out.splitlines()
    said = Recognizer(tmp_path, mode="streaming", endpoint=None).stream()
    said.push(samples, 16000)
    assert online and online.split() == said.finish().text.split() and offline


@pytest.fixture(scope="module")
def penalised(tmp_path_factory):
    """The weights of `student`, with a decoding section of its own."""
    folder = tmp_path_factory.mktemp("penalised") / "student"
    return make_model_dir(folder, next(iter(KINDS)), "decoding.blank_penalty=1.5")


@pytest.mark.parametrize(("options", "penalty"), [((), 1.5), (("--blank-penalty", -0.75), -0.75)])
def test_the_joiner_has_the_penalty_in_force_and_the_files_say_so(penalised, tmp_path, monkeypatch, options, penalty):
    export(monkeypatch, "--exp-dir", penalised, "--out", tmp_path, *SMALL, *options)  # checked, by sherpa-onnx too
    about = json.loads((tmp_path / "export.json").read_text())
    same = {"hotword_scale": 0.5, "confidence_slope": 1.0, "confidence_offset": 0.0}
    assert about["decoding"] == {"blank_penalty": penalty} | same
    bias = load_file(penalised / "averaged.pt")["model"]["joiner.output.bias"]
    baked = torch.from_numpy(read_joiner(tmp_path / "joiner.onnx")[-1].copy())
    assert float(bias[0] - baked[0]) == pytest.approx(penalty, abs=1e-6)
    torch.testing.assert_close(baked[1:], bias[1:])
    engine = OnnxEngine(tmp_path)
    assert engine.config.decoding.blank_penalty == penalty
    torch.testing.assert_close(torch.from_numpy(engine.bias), bias)  # a search takes the penalty off once


def test_a_joiner_with_another_penalty_fails_its_check(penalised, tmp_path, monkeypatch):
    build = export_onnx.build_graphs
    monkeypatch.setattr(export_onnx, "build_graphs", lambda model, geometry, penalty: build(model, geometry, 0.0))
    with pytest.raises(ValueError, match="differ from PyTorch, .*: joiner.onnx by 1.5e"):
        export(monkeypatch, "--exp-dir", penalised, "--out", tmp_path, *SMALL)


@pytest.mark.parametrize("method", METHODS)
def test_transcribe_on_the_files_replaces_their_penalty(student, penalised, tmp_path, monkeypatch, capsys, method):
    samples = synthetic_recordings((1.7,), 16000, seed=5).popitem()[1]
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    for name, model in (("plain", student), ("own", penalised)):
        export(monkeypatch, "--exp-dir", model, "--out", tmp_path / name, *SMALL, "--no-check")

    def said(name, *options):
        words = ["--onnx-dir", tmp_path / name, "--json", "--method", method, *options, tmp_path / "a.wav"]
        monkeypatch.setattr(sys, "argv", [transcribe.__file__, *map(str, words)])
        capsys.readouterr()
        transcribe.main()
        return json.loads(capsys.readouterr().out)["text"]

    plain, own = said("plain"), said("own")
    assert plain != own
    assert said("plain", "--blank-penalty", 1.5) == own == said("own", "--blank-penalty", 1.5)
    assert said("own", "--blank-penalty", 0) == plain == said("plain", "--blank-penalty", 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_files_carry_the_models_language_models(student, tmp_path, monkeypatch, method):
    for name, model in (("plain", student), ("own", shutil.copytree(student, tmp_path / "model"))):
        if name == "own":
            (tmp_path / "text").write_text("ab ba b\n" * 9 + "bb\n")
            orders = train_ngram([tmp_path / "text"], Tokenizer.load(model / "tokens"), 3)
            write_arpa(orders, Tokenizer.load(model / "tokens"), model / "lm.arpa.gz")
            scores = "ngram: lm.arpa.gz\nlm_scale: 2.0\nlodr: lm.arpa.gz\nlodr_scale: 0.5\nhotwords: words\n"
            (model / "decoding.yaml").write_text(scores)
            (model / "words").write_text("ten :3\n")
        export(monkeypatch, "--exp-dir", model, "--out", tmp_path / name, *SMALL, "--no-check")
    files = {"ngram": "ngram.arpa.gz", "lodr": "lodr.arpa.gz", "hotwords": "hotwords.txt"}
    about = json.loads((tmp_path / "own" / "export.json").read_text())
    same = {"hotword_scale": 0.5, "confidence_slope": 1.0, "confidence_offset": 0.0}
    assert about["decoding"] == {"blank_penalty": 0.0, "lm_scale": 2.0, "lodr_scale": 0.5} | same | files
    shutil.move(tmp_path / "own", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "model")
    samples = synthetic_recordings((1.7,), 16000, seed=5).popitem()[1]

    def said(name, **options):
        stream = Recognizer(tmp_path / name, method=method, **options).stream()
        stream.push(samples, 16000)
        return stream.finish().text

    paths = {option: tmp_path / "elsewhere" / file for option, file in files.items()}
    own = said("elsewhere")
    assert own == said("plain", **paths, lm_scale=2.0, lodr_scale=0.5) != said("plain")
    assert said("elsewhere", lm_scale=0) == said("plain", hotwords=paths["hotwords"])


def test_files_that_do_not_say_their_penalty_are_refused(penalised, tmp_path, monkeypatch):
    export(monkeypatch, "--exp-dir", penalised, "--out", tmp_path, *SMALL, "--no-check")
    about = json.loads((tmp_path / "export.json").read_text())
    for decoding in (None, {}, {"blank_penalty": "x"}, {"other": 1}):
        (tmp_path / "export.json").write_text(json.dumps(about | {"decoding": decoding}))
        with pytest.raises(ValueError, match="export.json is not what export_onnx writes .*: export again"):
            OnnxEngine(tmp_path)


def test_files_that_fail_their_check_do_not_appear(student, tmp_path, monkeypatch):
    (tmp_path / "export.json").write_text("of an earlier run")
    monkeypatch.setattr(parity, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="differ from PyTorch"):
        export(monkeypatch, "--exp-dir", student, "--out", tmp_path, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]
    export(monkeypatch, "--exp-dir", student, "--out", tmp_path, *SMALL, "--no-check")
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "max_difference" not in json.loads((tmp_path / "export.json").read_text())


def test_whole_recordings_of_files_and_model_are_compared(student, tmp_path, monkeypatch, capsys):
    export(monkeypatch, "--exp-dir", student, "--out", tmp_path / "onnx", *SMALL, "--no-check")
    lines = []
    for number, samples in enumerate(synthetic_recordings((1.3, 0.8, 1.7), 16000, seed=5).values()):
        soundfile.write(tmp_path / f"{number}.wav", samples, 16000)
        lines.append(json.dumps({"id": str(number), "path": f"{number}.wav", "text": "one"}) + "\n")
    (tmp_path / "some.jsonl").write_text("".join(lines))

    def check(model):
        words = ["--exp-dir", model, "--onnx-dir", tmp_path / "onnx", "--manifest", tmp_path / "some.jsonl"]
        words += ["--modes", "look_ahead", "two_pass", "full", "--methods", "modified_beam_search"]
        words += ["--json", tmp_path / "rows.json"]
        monkeypatch.setattr(sys, "argv", [check_export.__file__, *map(str, words)])
        check_export.main()

    check(student)
    rows = json.loads((tmp_path / "rows.json").read_text())
    expected = [("onnx", "look_ahead", 2), ("onnx", "two_pass", 2), ("onnx", "full", 2)]
    if importlib.util.find_spec("sherpa_onnx"):
        expected += [("sherpa-onnx", "look_ahead", 2), ("sherpa-onnx", "full", 3)]  # whole utterances there
    assert [(row["engine"], row["mode"], row["num_identical"]) for row in rows] == expected
    assert all(row["num_identical"] == row["num_streams"] and row["num_tokens"] > 10 for row in rows)
    other = tmp_path / "other"
    shutil.copytree(student, other)
    values = load_file(other / "averaged.pt")
    values["model"]["joiner.output.bias"][0] -= 1.0
    save_file(values, other / "averaged.pt")
    with pytest.raises(SystemExit):
        check(other)
    assert "the exported files differ from PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_files_with_a_recurrent_predictor_say_what_pytorch_says(tmp_path, monkeypatch, method):
    teacher = make_model_dir(tmp_path / "teacher", "lstm")
    export(monkeypatch, "--exp-dir", teacher, "--out", tmp_path / "onnx", *SMALL)
    for name in ("encoder-full.onnx", "ngram.npz"):  # of another model, that was exported here
        (tmp_path / "onnx" / name).write_text("")
    about = json.loads((tmp_path / "onnx" / "export.json").read_text())
    about["bytes"] |= {"encoder-full.onnx": 0, "ngram.npz": 0, "../outside": 0}
    (tmp_path / "onnx" / "export.json").write_text(json.dumps(about))
    (tmp_path / "onnx" / "notes.txt").write_text("the user's")
    (tmp_path / "outside").write_text("the user's")
    export(monkeypatch, "--exp-dir", teacher, "--out", tmp_path / "onnx", *SMALL, "--no-check")
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert "ngram.npz" not in names and "notes.txt" in names and (tmp_path / "outside").exists()
    assert names >= FILES_OF_OUR_RUNTIME and "encoder-full.onnx" not in names
    samples = synthetic_recordings((2.0,), 16000, seed=5).popitem()[1]
    samples[-2560:] = 0.0
    said = {}
    for folder, tail in ((tmp_path / "onnx", 0), (teacher, 1280)):  # the files hear one chunk of zeros more
        stream = Recognizer(folder, method=method, chunk_ms=80, look_ahead_ms=160, left_context_ms=240).stream()
        stream.push(np.concatenate((samples, np.zeros(tail, np.float32))), 16000)
        said[folder.name] = [segment.hypotheses[0].tokens for segment in stream.finish().segments]
    assert said["onnx"] == said["teacher"] != []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--exp-dir", "nowhere"], FileNotFoundError, "no such model directory: nowhere"),
        (["--look-ahead-ms", "480"], ConfigError, r"--look-ahead-ms must be a multiple of --chunk-ms \(320\), got 480"),
        (["--chunk-ms", "50"], ConfigError, "--chunk-ms must be a positive multiple of 40 ms, got 50"),
        (["--left-context-ms", "0"], ConfigError, "--left-context-ms must be a positive multiple of 40 ms, got 0"),
        (["--avg", "2"], ConfigError, "--avg 2 needs --epoch N"),
        (["--manifest", "nothing.jsonl"], FileNotFoundError, "--manifest nothing.jsonl not found"),
    ],
)
def test_wrong_options_are_named(student, tmp_path, monkeypatch, arguments, error, message):
    with pytest.raises(error, match=message):
        export(monkeypatch, "--exp-dir", student, "--out", tmp_path / "onnx", *arguments)
    assert not (tmp_path / "onnx").exists()


def test_only_what_an_export_wrote_is_replaced(student, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(monkeypatch, "--exp-dir", student, "--out", out, *SMALL, "--no-check")
    (out / "ngram.notes").write_text("mine")
    (out / "export.json").unlink()  # as one that was interrupted leaves it
    export(monkeypatch, "--exp-dir", student, "--out", out, *SMALL, "--no-check")
    assert {path.name for path in out.iterdir()} == FILES | {"ngram.notes"}
    (tmp_path / "README.md").write_text("mine")
    for folder, message in ((tmp_path, "holds README.md, and no export.json"), (student, "the model directory itself")):
        with pytest.raises(ConfigError, match=message):
            export(monkeypatch, "--exp-dir", student, "--out", folder, *SMALL, "--no-check")
    assert (tmp_path / "README.md").read_text() == "mine" and not (student / "export.json").exists()


def test_the_readmes_commands_name_the_models_features(student, tmp_path, monkeypatch):
    export(monkeypatch, "--exp-dir", student, "--out", tmp_path, *SMALL, "--no-check")
    lines = [line for line in (tmp_path / "README.md").read_text().splitlines() if "--encoder=" in line]
    assert len(lines) == 3 and all("--sample-rate=16000 --feat-dim=80" in line for line in lines)
