"""Sentences of a grammar, computed noise, and speech of eSpeak NG with the words' true times."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cascade.audio.io import read_audio
from cascade.corpus.manifests import Utterance, read_manifest
from cascade.corpus.synthetic.grammar import Grammar
from cascade.corpus.synthetic.noise import KINDS, add_noise, make_noise
from tests.once import made_once

ROOT = Path(__file__).resolve().parents[2]
RATE = 16000


def grammar(tmp_path, text: str) -> Grammar:
    path = tmp_path / "grammar.txt"
    path.write_text(text)
    return Grammar(path)


def test_grammar_draws_every_alternative_as_often_as_its_weight_says(tmp_path):
    rules = grammar(tmp_path, "# lamps\n<sentence> = 3*turn <state> [now]\n  | stop\n<state> = on | off\n")
    generator = np.random.default_rng(0)
    drawn = [rules.draw(generator) for _ in range(2000)]
    assert set(drawn) == {"stop", "turn on", "turn off", "turn on now", "turn off now"}
    assert drawn.count("stop") / 2000 == pytest.approx(1 / 4, abs=0.04)
    assert drawn.count("turn on now") / 2000 == pytest.approx(3 / 16, abs=0.04)


@pytest.mark.parametrize(("text", "wanted"), [
    ("<a> = b\n<a> = c", "<a> is defined twice"), ("words", "no rule"), ("<a> = <b> | c", "<b> is not defined"),
    ("<a> = [b | c]", "?"), ("<a> = b ||", "empty alternative"),
])
def test_a_broken_grammar_is_told(tmp_path, text, wanted):
    with pytest.raises(ValueError, match="grammar.txt: .*") as error:
        grammar(tmp_path, text)
    assert wanted in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_lies_as_far_below_the_speech_as_wanted_and_depends_on_its_seed_only(kind):
    generator = np.random.default_rng(1)
    speech = np.pad(0.1 * generator.standard_normal(RATE).astype(np.float32), (RATE, RATE))
    noisy = add_noise(speech, kind, 10.0, RATE, seed=5)
    noise = noisy - speech
    power = np.mean(speech[np.abs(speech) > 0.01 * np.abs(speech).max()] ** 2)
    assert 10 * np.log10(power / np.mean(noise**2)) == pytest.approx(10, abs=0.1)
    assert np.array_equal(noisy, add_noise(speech, kind, 10.0, RATE, seed=5))
    assert not np.array_equal(noisy, add_noise(speech, kind, 10.0, RATE, seed=6))


def test_unknown_noise_is_told():
    with pytest.raises(ValueError, match="noise kind must be one of white"):
        make_noise("rain", 10, RATE, np.random.default_rng(0))


PREPARE = "egs/commands/local/prepare.py"


def prepare(out: Path, *options: str) -> None:
    """The program egs/commands/local/prepare.py in this process; what speaks is a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", "--out", str(out), *options])
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(ROOT)
        runpy.run_path(PREPARE, run_name="__main__")


def read_corpus(folder: Path) -> dict[str, list[Utterance]]:
    return {split: list(read_manifest(folder / f"{split}.jsonl")) for split in ("train", "dev", "test")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("espeakng_loader")
    return made_once(tmp_path_factory, "commands", lambda folder: prepare(folder, "--max-utterances", "20"))


@pytest.fixture(scope="module")
def corpus(folder) -> dict[str, list[Utterance]]:
    return read_corpus(folder)


def test_no_sentence_and_no_voice_is_in_two_splits(corpus):
    for kind in ("text", "speaker"):
        sets = [{getattr(item, kind) for item in items} for items in corpus.values()]
        assert all(sets) and sum(map(len, sets)) == len(set.union(*sets)), kind
    assert all(len({item.text for item in items}) == len(items) for items in corpus.values())


def test_corpus_depends_on_the_seed_only_and_a_smaller_one_is_its_beginning(folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = runpy.run_path(PREPARE, run_name="prepare")
    rules, plans = Grammar(ROOT / PREPARE.replace("prepare.py", "grammar.txt")), {}
    for split, voices in program["split_voices"](1).items():
        texts = program["draw_texts"](split, 1, rules)[:5]
        assert texts == [item.text for item in corpus[split][:5]]
        plans[split] = list(program["plan"](split, texts, 1, voices))
        planned = (folder / "plans" / f"{split}.jsonl").read_text().splitlines()
        assert plans[split] == [json.loads(line) for line in planned[:5]]
        assert program["draw_texts"](split, 2, rules)[:5] != texts
    program["synthesise"](tmp_path, "dev", plans["dev"])
    for one, two in zip(corpus["dev"], read_manifest(tmp_path / "dev.jsonl"), strict=False):
        assert (one.text, one.speaker, one.words) == (two.text, two.speaker, two.words)
        assert np.array_equal(read_audio(one.path, RATE)[0], read_audio(two.path, RATE)[0])


def test_words_have_times_inside_the_audio_and_speech_where_the_times_say(corpus):
    for items in corpus.values():
        for item in items:
            samples, _ = read_audio(item.path, RATE)
            starts, ends = np.array(item.words).T
            assert len(starts) == len(item.text.split())
            assert starts[0] >= 0 and ends[-1] <= len(samples) / RATE
            assert (ends > starts).all() and np.array_equal(starts[1:], ends[:-1])
            assert 0.05 < (ends[-1] - starts[0]) / len(starts) < 1.0


def test_manifests_of_an_earlier_corpus_are_taken_as_they_are(folder, corpus, tmp_path):
    prepare(tmp_path, "--corpus-dir", str(folder), "--max-utterances", "3")
    assert read_corpus(tmp_path)["test"] == corpus["test"][:3]


def synthesise(plan: Path, lines: list[dict], **changes) -> subprocess.CompletedProcess:
    plan.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "tools/synthesise.py", "--plan", plan, "--manifest", plan.with_name("out.jsonl")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


def test_an_unknown_voice_is_told_in_one_sentence(tmp_path):
    pytest.importorskip("espeakng_loader")
    done = synthesise(tmp_path / "plan.jsonl", [{"id": "a", "text": "hello", "voice": "en-us+nobody"}])
    assert done.returncode == 1 and done.stderr == "error: eSpeak NG has no voice 'en-us+nobody'\n"
    assert not (tmp_path / "out.jsonl").exists()


def test_two_lines_of_one_id_are_told(tmp_path):
    pytest.importorskip("espeakng_loader")
    line = {"id": "a", "text": "hello", "voice": "en-us"}
    done = synthesise(tmp_path / "plan.jsonl", [line, line | {"text": "stop"}])
    assert done.returncode == 1 and done.stderr.endswith("plan.jsonl: every line needs an id of its own\n")


def test_speech_begins_and_ends_where_lead_and_tail_say(tmp_path):
    pytest.importorskip("espeakng_loader")
    line = {"id": "a", "text": "in the kitchen", "voice": "en-us+f3", "lead": 0.5, "tail": 0.25, "gain_db": -6}
    assert synthesise(tmp_path / "plan.jsonl", [line]).returncode == 0
    item = next(read_manifest(tmp_path / "out.jsonl"))
    samples, _ = read_audio(item.path, RATE)
    assert np.abs(samples).max() == pytest.approx(0.95 * 10 ** (-6 / 20), abs=1e-3)
    assert np.abs(samples[: RATE // 2 - 50]).max() < 1e-3 and np.abs(samples[-RATE // 4 + 50 :]).max() < 1e-3
    assert item.words[0][0] == pytest.approx(0.5, abs=0.02) and len(item.words) == 3
    assert item.words[-1][1] == pytest.approx(len(samples) / RATE - 0.25, abs=0.02)
