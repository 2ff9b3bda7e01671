"""The checks of streams against whole utterances and of long audio, on a tiny model; that they can fail."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from cascade.corpus.cuts import Speech
from cascade.stream.words import Word
from tests.tiny_run import make_manifest, make_model_dir
from tools import check_long_audio, check_streaming


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_model_dir(folder / "student", epochs=1)
    lines = make_manifest(folder).read_text().splitlines()
    (folder / "good.jsonl").write_text("\n".join(line for line in lines if "broken" not in line))
    return folder


def call(monkeypatch, program, run_dir, *arguments):
    words = [program.__file__, "--exp-dir", run_dir / "student", "--manifest", run_dir / "good.jsonl", *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    program.main()


def test_the_check_of_streams_writes_a_row_for_every_mode_and_search(run_dir, tmp_path, monkeypatch):
    call(monkeypatch, check_streaming, run_dir, "--num-streams", 3, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len({(row["mode"], row["method"]) for row in rows}) == 8
    for row in rows:
        assert row["num_identical"] == row["num_utterances"] == 4 and row["num_tokens"] > 50


def test_the_check_of_streams_fails_when_a_frame_is_lost(run_dir, monkeypatch, capsys):
    packets = check_streaming.packets
    monkeypatch.setattr(check_streaming, "packets", lambda samples, rng: packets(samples[:-1280], rng))
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, check_streaming, run_dir, "--modes", "streaming", "--methods", "greedy_search")
    assert end.value.code == 1 and "what was streamed differs from what was decoded at once" in capsys.readouterr().err


def test_two_minutes_of_audio_keep_their_times_and_their_memory(run_dir, tmp_path, monkeypatch):
    call(monkeypatch, check_long_audio, run_dir, "--mode", "streaming", "--minutes", 2, "--json", tmp_path / "row.json")
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["minutes"] >= 2 and row["num_words"] > 1000 and row["num_cycles"] == len(row["wer_of_cycles"]) > 5
    assert row["drift_ms"] < 1e-6 and row["num_utterances_that_differ"] == 0 and row["growth_mb"] < 20
    assert len(set(row["wer_of_cycles"][1:])) == 1


def test_drift_is_measured_between_cycles():
    word = Word("one", 1.0, 1.04, 1.0)
    later = [[[Word("one", 1.0 + 10 * number + shift, 1.04 + 10 * number, 1.0)]]
             for number, shift in enumerate((0.5, 0.0, 0.02, 0.03))]
    assert check_long_audio.drift_of(later, 10.0) == (pytest.approx(0.03), 0)
    assert check_long_audio.drift_of([[[]], [[word]], [[]]], 10.0) == (0.0, 1)


def test_cycles_are_whole_blocks_and_hold_every_utterance():
    speech = [Speech(str(size), "", np.full(size, 0.1, np.float32)) for size in (7001, 15999)]
    cycle = check_long_audio.make_cycle(speech, 16000, 640, seed=1)
    assert len(cycle.samples) % (640 * 16) == 0
    for utterance, start in zip(speech, cycle.starts, strict=True):
        part = cycle.samples[start : start + len(utterance.samples)]
        assert abs(part - 0.1).max() < 0.01 > abs(cycle.samples[start - 6000 : start]).max()
