"""The model's decoding section: every program decodes by it, a value of the command line replaces it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cascade.audio.io import read_audio
from cascade.bin import align, decode, latency, transcribe
from cascade.checkpoint import load_file, load_model
from cascade.config.options import ConfigError
from cascade.models.torch_engine import TorchEngine
from cascade.search.methods import METHODS, DecodingOptions
from cascade.stream.decoder import StreamingDecoder
from tests import tiny_run
from tests.tiny_run import make_manifest, make_model_dir

PENALTY = -6.0  # below 0, because these models say something in nearly every frame


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The same weights twice: `plain` and `student`, whose decoding section has a blank penalty."""
    folder = tmp_path_factory.mktemp("run")
    make_model_dir(folder / "plain")
    make_model_dir(folder / "student", overrides=[f"decoding.blank_penalty={PENALTY}"])
    make_manifest(folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """call(program, *arguments): what it prints."""

    def run(program, *arguments):
        capsys.readouterr()
        tiny_run.call(monkeypatch, program, *arguments)
        return capsys.readouterr().out

    return run


def three_ways(say):
    """What `say(model, *arguments)` gives of a plain model, of it with --blank-penalty, of the model that carries it.

    Asserts what must hold between them: the model's value is the option's, 0 is no penalty at all.
    """
    plain, given, own = say("plain"), say("plain", "--blank-penalty", PENALTY), say("student")
    assert plain != given == own
    assert say("student", "--blank-penalty", 0) == plain
    assert say("student", "--blank-penalty", PENALTY) == given
    return plain, own


@pytest.mark.parametrize("method", METHODS)
def test_decode_takes_the_models_penalty_and_the_option_replaces_it(run_dir, tmp_path, call, method):
    def say(model, *options):
        call(decode, "--exp-dir", run_dir / model, "--manifest", run_dir / "test.jsonl", "--mode", "streaming",
             "--method", method, "--out", tmp_path, *options)  # fmt: skip
        row = json.loads((tmp_path / "result.json").read_text())
        return (tmp_path / "hyps.jsonl").read_text(), row["blank_penalty"]

    (text, without), (other, penalty) = three_ways(say)
    assert (without, penalty) == (0.0, PENALTY) and text != other


@pytest.mark.parametrize("method", METHODS)
def test_transcribe_takes_the_models_penalty_and_the_option_replaces_it(run_dir, call, method):
    def say(model, *options):
        return call(transcribe, "--exp-dir", run_dir / model, "--json", "--method", method, *options, run_dir / "0.wav")

    three_ways(say)


def test_align_takes_the_models_penalty_and_the_option_replaces_it(run_dir, tmp_path, call):
    def say(model, *options):
        call(align, "--exp-dir", run_dir / model, "--manifest", run_dir / "test.jsonl", "--out", tmp_path, *options)
        about = json.loads((tmp_path / "alignment.json").read_text())
        return (tmp_path / "alignment.ctm").read_text(), about["blank_penalty"]

    (_, without), (_, penalty) = three_ways(say)
    assert (without, penalty) == (0.0, PENALTY)


def test_latency_takes_each_models_penalty_and_the_option_replaces_it(run_dir, tmp_path, call):
    def say(*options):
        call(latency, "--exp-dir", run_dir / "plain", run_dir / "student", "--manifest", run_dir / "test.jsonl",
             "--num-chunks", 20, "--no-memory", "--out", tmp_path / "rows.json", *options)  # fmt: skip
        rows = json.loads((tmp_path / "rows.json").read_text())
        said = []
        for row in rows:
            modes = row["delays"]["modes"].values()
            delays = [{key: value for key, value in mode.items() if "_compute_" not in key} for mode in modes]
            said.append((row["symbols_per_second"], delays, row["delays"]["num_words"]))
        return said, [row["blank_penalty"] for row in rows]

    (plain, own), penalties = say()
    assert plain != own and plain[0] > own[0] and penalties == [0.0, PENALTY]
    assert say("--blank-penalty", PENALTY) == ([own, own], [PENALTY, PENALTY])
    assert say("--blank-penalty", 0) == ([plain, plain], [0.0, 0.0])


def test_the_python_interface_takes_the_models_penalty(run_dir):
    samples, texts = read_audio(run_dir / "2.wav", 16000)[0], {}
    for name in ("plain", "student"):
        model, config, tokenizer = load_model(run_dir / name)
        for penalty in (None, 0.0, PENALTY):
            options = None
            if penalty is not None:
                options = DecodingOptions.for_model(config, mode="two_pass", blank_penalty=penalty)
            decoder = StreamingDecoder(TorchEngine(model), config, tokenizer, options)
            decoder.accept(np.asarray(samples), 16000)
            texts[name, penalty] = decoder.finish().text
    assert texts["plain", None] == texts["plain", 0.0] == texts["student", 0.0]
    assert texts["student", None] == texts["student", PENALTY] == texts["plain", PENALTY] != texts["plain", None]


@pytest.mark.parametrize("text", ["blank_penalty: 1.5\n", "decoding:\n  blank_penalty: 1.5\n"])
def test_a_decoding_yaml_beside_the_model_overrides_its_section(run_dir, tmp_path, call, text):
    folder = make_model_dir(tmp_path / "model", overrides=[f"decoding.blank_penalty={PENALTY}"])
    assert load_model(folder)[1].decoding.blank_penalty == PENALTY
    (folder / "decoding.yaml").write_text(text)
    arguments = ["--exp-dir", folder, "--manifest", run_dir / "test.jsonl", "--mode", "full", "--method",
                 "greedy_search", "--out", tmp_path / "out"]  # fmt: skip
    for options, expected in (((), 1.5), (("--epoch", 1), 1.5), (("--blank-penalty", -0.5), -0.5)):
        call(decode, *arguments, *options)
        assert json.loads((tmp_path / "out" / "result.json").read_text())["blank_penalty"] == expected
    assert load_file(folder / "averaged.pt")["config"]["decoding"]["blank_penalty"] == PENALTY
    (folder / "decoding.yaml").write_text("")
    assert load_model(folder)[1].decoding.blank_penalty == PENALTY


@pytest.mark.parametrize(("text", "message"), [
    ("blank: 1\n", "there is no option 'decoding.blank', did you mean decoding.blank_penalty"),
    ("decoding: {lm: 1}\n", "there is no option 'decoding.lm'"),
    ("decoding: {blank_penalty: 1}\nseed: 1\n", "there is no option 'seed'"),
    ("blank_penalty: much\n", "decoding.blank_penalty must be a number, got 'much'"),
    ("blank_penalty: .nan\n", "decoding.blank_penalty must be a finite number, got nan"),
    ("- 1\n", "not a YAML mapping"),
    ("decoding: 1\n", "decoding must be a section of options, got 1"),
    ("blank_penalty: null\n", "decoding.blank_penalty must be a number, got None"),
    ("blank_penalty: [1\n", "not a YAML mapping"),
])
def test_a_wrong_decoding_yaml_is_named_in_one_sentence(tmp_path, text, message):
    folder = make_model_dir(tmp_path / "model", epochs=1)
    (folder / "decoding.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"decoding\.yaml: .*{message}") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_penalty_that_is_no_number_is_refused_before_the_model_is_read(tmp_path, call, value):
    with pytest.raises(ConfigError, match=f"--blank-penalty must be a finite number, got {value}"):
        call(transcribe, "--exp-dir", tmp_path / "nowhere", "--blank-penalty", value, "x.wav")


def test_options_for_a_model_keep_what_they_are_given(run_dir):
    config = load_model(run_dir / "student")[1]
    options = DecodingOptions.for_model(config, mode="streaming", beam=7)
    assert dataclasses.asdict(options) == dataclasses.asdict(
        DecodingOptions(mode="streaming", beam=7, blank_penalty=PENALTY)
    )
