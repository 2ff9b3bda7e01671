"""Scores from outside through the programs: options, the model's decoding section, rows, and what users get wrong."""

from __future__ import annotations

import json

import pytest
import soundfile

from cascade import Recognizer
from cascade.bin import decode, serve, train_ngram, transcribe
from cascade.bin.model_arguments import open_recognizer
from cascade.config.options import ConfigError
from cascade.search.methods import METHODS, STREAMING_MODES
from cascade.stream.endpoint import EndpointOptions
from tests import tiny_run
from tests.tiny_run import make_manifest, make_model_dir

SECTION = {"ngram": "lm/lm.arpa.gz", "lm_scale": 2.5, "lodr": "lm/low.arpa", "lodr_scale": 1.75}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The same weights twice: `plain`, and `student`, whose decoding section has a language model and LODR."""
    folder = tmp_path_factory.mktemp("run")
    make_model_dir(folder / "plain")
    make_model_dir(folder / "student", overrides=[f"decoding.{name}={value}" for name, value in SECTION.items()])
    (folder / "text").write_text("two two five one\nthree five\nfive five five one two\n")
    with pytest.MonkeyPatch.context() as patch:
        for order, name in ((3, "lm.arpa.gz"), (2, "low.arpa")):
            tiny_run.call(patch, train_ngram, "--text", folder / "text", "--tokens", folder / "plain" / "tokens",
                          "--order", order, "--out", folder / "student" / "lm" / name)  # fmt: skip
    make_manifest(folder)
    return folder


def flags(run_dir, **values):
    """The options that say what SECTION says."""
    for name, value in (SECTION | values).items():
        yield f"--{name.replace('_', '-')}"
        yield run_dir / "student" / value if name in ("ngram", "lodr") else value


@pytest.fixture
def call(monkeypatch, capsys):
    """call(program, *arguments): what it prints."""

    def run(program, *arguments):
        capsys.readouterr()
        tiny_run.call(monkeypatch, program, *arguments)
        return capsys.readouterr().out

    return run


def check_section_and_options(run_dir, say):
    """`say(model, *options)` of a plain model, of it with all options, of the model that carries them."""
    plain, given, own = say("plain"), say("plain", *flags(run_dir)), say("student")
    assert plain != given == own
    assert say("student", "--lm-scale", 0) == plain
    assert say("student", "--lodr-scale", 0) not in (own, plain)
    assert say("student", *flags(run_dir, lm_scale=1.0)) == say("plain", *flags(run_dir, lm_scale=1.0)) != own
    return plain, own


@pytest.mark.parametrize("method", METHODS)
def test_decode_takes_the_models_scores_and_options_replace_them(run_dir, tmp_path, call, method):
    def say(model, *options):
        call(decode, "--exp-dir", run_dir / model, "--manifest", run_dir / "test.jsonl", "--mode", "full",
             "--method", method, "--out", tmp_path, *options)  # fmt: skip
        row = json.loads((tmp_path / "result.json").read_text())
        names = ("ngram", "lm_scale", "lodr_scale", "hotwords", "rescore")
        return (tmp_path / "hyps.jsonl").read_text(), tuple(row[name] for name in names)

    plain, own = check_section_and_options(run_dir, say)
    assert plain[1] == (None, None, None, None, False) and own[1] == ("lm.arpa.gz", 2.5, 1.75, None, False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_transcribe_takes_the_models_scores_and_options_replace_them(run_dir, call, mode, method):
    def say(model, *options):
        return call(transcribe, "--exp-dir", run_dir / model, "--json", "--method", method, "--mode", mode, *options,
                    *(run_dir / f"{number}.wav" for number in range(4)))  # fmt: skip

    check_section_and_options(run_dir, say)


def test_serve_and_python_take_the_models_scores_and_options_replace_them(run_dir, monkeypatch):
    samples = [soundfile.read(run_dir / f"{number}.wav", dtype="int16")[0] for number in range(4)]

    def texts(recognizer):
        streams = [recognizer.stream() for _ in samples]
        for stream, each in zip(streams, samples, strict=True):
            stream.push(each, 16000)
            stream.end()
        recognizer.advance()
        return [stream.final().text for stream in streams]

    def say(model, *options):
        words = ["serve", "--exp-dir", run_dir / model, *options]
        monkeypatch.setattr("sys.argv", list(map(str, words)))
        arguments = serve.parse_arguments()
        return texts(open_recognizer(arguments, "two_pass", EndpointOptions()))

    plain, own = check_section_and_options(run_dir, say)
    section = SECTION | {name: run_dir / "student" / SECTION[name] for name in ("ngram", "lodr")}
    assert texts(Recognizer(run_dir / "plain")) == plain
    assert texts(Recognizer(run_dir / "plain", **section)) == texts(Recognizer(run_dir / "student")) == own
    assert texts(Recognizer(run_dir / "student", lm_scale=0)) == plain


def test_decode_rescores_the_n_best_of_an_acoustic_search(run_dir, tmp_path, call):
    def decoded(name, *options):
        call(decode, "--exp-dir", run_dir / "plain", "--manifest", run_dir / "test.jsonl", "--mode", "full", "--method",
             "modified_beam_search", "--beam", 8, "--nbest", 8, "--out", tmp_path / name, *options)  # fmt: skip
        assert json.loads((tmp_path / name / "result.json").read_text())["rescore"] == ("--rescore" in options)
        lists = [json.loads(line) for line in (tmp_path / name / "nbest.jsonl").read_text().splitlines()]
        return [{tuple(item["tokens"]): item["log_prob"] for item in line["nbest"]} for line in lists]

    plain, rescored = decoded("plain"), decoded("rescored", *flags(run_dir), "--rescore")
    assert plain == rescored  # as sets of hypotheses with the transducer's own log-probabilities
    assert [[*each][0] for each in plain] != [[*each][0] for each in rescored]
    best = [json.loads(line) for line in (tmp_path / "rescored" / "hyps.jsonl").read_text().splitlines()]
    for each, line in zip(rescored, best, strict=True):
        assert line["log_prob"] == each[tuple(line["tokens"])] and line["external_score"] < 0


@pytest.mark.parametrize(("words", "error", "message"), [
    (["--ngram", "LM/lm.arpa.gz"], ConfigError, "--ngram .*lm.arpa.gz needs --lm-scale: cascade.bin.tune_scales finds"),
    (["--lm-scale", "0.3"], ConfigError, "--lm-scale 0.3 needs --ngram FILE"),
    (["--lm-scale", "-0.3"], ConfigError, "--lm-scale must be a finite number of at least 0, got -0.3"),
    (["--lodr-scale", "nan"], ConfigError, "--lodr-scale must be a finite number of at least 0, got nan"),
    (["--lodr", "LM/low.arpa", "--lodr-scale", "0.2"], ConfigError, "--lodr-scale 0.2 needs --lm-scale"),
    (["--ngram", "LM/lm.arpa.gz", "--lm-scale", "0.3", "--lodr-scale", "1"], ConfigError, "--lodr-scale 1 needs"),
    (["--ngram", "LM/lm.arpa.gz", "--lm-scale", "0.3", "--lodr", "LM/low.arpa", "--lodr-scale", "1.3"], ConfigError,
     r"--lodr-scale must be less than 1 \+ --lm-scale \(1.3\), got 1.3"),
    (["--rescore"], ConfigError, "--rescore needs --method modified_beam_search: greedy search has one hypothesis"),
    (["--rescore", "--method", "modified_beam_search"], ConfigError, "--rescore needs --ngram FILE and --lm-scale"),
    (["--ngram", "LM/no.arpa", "--lm-scale", "0.3"], FileNotFoundError, "--ngram .*no.arpa not found"),
    (["--ngram", "LM/other.arpa", "--lm-scale", "0.3"], ValueError, r"other.arpa line \d+: '▁TWO' is no token of the"),
])  # fmt: skip
def test_what_does_not_fit_together_is_one_sentence(run_dir, tmp_path, call, words, error, message):
    lm = run_dir / "student" / "lm"
    (lm / "other.arpa").write_text((lm / "low.arpa").read_text().replace("two", "TWO"))
    words = [word.replace("LM", str(lm)) for word in words]
    with pytest.raises(error, match=message) as caught:
        call(decode, "--exp-dir", run_dir / "plain", "--manifest", run_dir / "test.jsonl", "--mode", "full",
             "--method", "greedy_search", "--out", tmp_path, *words)  # fmt: skip
    assert "\n" not in str(caught.value)


def test_a_model_that_was_moved_finds_its_files_and_one_without_them_says_which(run_dir, tmp_path, call):
    moved = tmp_path / "moved"
    moved.symlink_to(run_dir / "student")
    arguments = ["--manifest", run_dir / "test.jsonl", "--mode", "full", "--method", "greedy_search", "--out", tmp_path]
    call(decode, "--exp-dir", moved, *arguments)
    folder = make_model_dir(tmp_path / "model", overrides=["decoding.ngram=lm.arpa", "decoding.lm_scale=0.3"])
    with pytest.raises(FileNotFoundError, match=r"--ngram .*model/lm\.arpa not found"):
        call(decode, "--exp-dir", folder, *arguments)
    call(decode, "--exp-dir", folder, *arguments, "--lm-scale", 0)


def test_hotwords_from_a_file_are_those_of_the_models_section_and_of_a_stream(run_dir, tmp_path, monkeypatch, call):
    file = run_dir / "plain" / "hotwords.txt"
    file.write_text("five two\n\nthree :4\n")
    folder = make_model_dir(tmp_path / "own", overrides=["decoding.hotwords=hotwords.txt", "decoding.hotword_scale=3"])
    (folder / "hotwords.txt").write_text(file.read_text())
    manifest = ["--manifest", run_dir / "test.jsonl", "--mode", "full", "--method", "greedy_search", "--out", tmp_path]
    rows, texts = [], []
    for words in (["--exp-dir", run_dir / "plain"],
                  ["--exp-dir", run_dir / "plain", "--hotwords", file, "--hotword-scale", 3],
                  ["--exp-dir", folder], ["--exp-dir", folder, "--hotword-scale", 0.01]):  # fmt: skip
        call(decode, *words, *manifest)
        row = json.loads((tmp_path / "result.json").read_text())
        rows.append((row["hotwords"], row["hotword_scale"]))
        texts.append((tmp_path / "hyps.jsonl").read_text())
    assert rows == [(None, None), ("hotwords.txt", 3.0), ("hotwords.txt", 3.0), ("hotwords.txt", 0.01)]
    assert texts[0] != texts[1] == texts[2] != texts[3]
    wav = [str(run_dir / f"{number}.wav") for number in range(4)]
    plain, given, own = (call(transcribe, "--json", *words, *wav) for words in (
        ["--exp-dir", run_dir / "plain"], ["--exp-dir", run_dir / "plain", "--hotwords", file, "--hotword-scale", 3],
        ["--exp-dir", folder]))  # fmt: skip
    assert plain != given == own
    recognizer = Recognizer(run_dir / "plain", hotword_scale=3)
    for path, line in zip(wav, given.splitlines(), strict=True):
        stream = recognizer.stream(hotwords=["five two", "three :4"])
        stream.accept(soundfile.read(path, dtype="int16")[0], 16000)
        assert stream.finish().text == json.loads(line)["text"]


def test_a_wrong_hotword_is_named_with_its_file(run_dir, tmp_path, call, caplog):
    (tmp_path / "hotwords.txt").write_text("one\nsix\n")
    arguments = ["--exp-dir", run_dir / "plain", run_dir / "0.wav"]
    with pytest.raises(ValueError, match=r"hotwords.txt: hotword 'six' has what the model's tokens cannot say: six"):
        call(transcribe, *arguments, "--hotwords", tmp_path / "hotwords.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert call(transcribe, *arguments, "--hotwords", tmp_path / "empty.txt") == call(transcribe, *arguments)
    assert "empty.txt holds no phrase" in caplog.text
    with pytest.raises(FileNotFoundError, match="--hotwords .*none not found"):
        call(transcribe, *arguments, "--hotwords", tmp_path / "none")
    with pytest.raises(ConfigError, match="--hotword-scale must be a finite number above 0, got -1"):
        call(transcribe, *arguments, "--hotword-scale", -1)
