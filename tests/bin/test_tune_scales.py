"""The scales that are found are the best of those tried, and the other programs take them from beside the model."""

from __future__ import annotations

import json

import pytest

from cascade.bin import decode, train_ngram, tune_scales
from cascade.bin.tune_scales import climb
from cascade.checkpoint import load_model
from cascade.config.options import ConfigError
from tests import tiny_run
from tests.tiny_run import make_manifest, make_model_dir


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    make_model_dir(tmp_path / "model", epochs=1, overrides=["decoding.blank_penalty=-1"])
    make_manifest(tmp_path)
    (tmp_path / "text").write_text("one two\nthree\ntwo three four five\n" * 3)
    for order, name in ((3, "lm.npz"), (2, "low.arpa")):
        tiny_run.call(monkeypatch, train_ngram, "--text", tmp_path / "text", "--tokens", tmp_path / "model" / "tokens",
                      "--order", order, "--out", tmp_path / "lm" / name)  # fmt: skip
    return tmp_path


@pytest.mark.parametrize(("search", "rescore", "penalty", "scales"), [
    (("--mode", "full", "--method", "greedy_search"), (), -1, (1.5, 3)),
    (("--mode", "streaming", "--method", "modified_beam_search", "--beam", 24), ("--rescore",), -5, (3, 30)),
])
def test_decode_has_the_word_errors_of_the_best_line(run_dir, monkeypatch, capsys, search, rescore, penalty, scales):
    model, lm = run_dir / "links" / "model", run_dir / "lm"
    model.parent.mkdir()
    model.symlink_to(run_dir / "model")  # .. of a link is that of what it names
    tiny_run.call(monkeypatch, tune_scales, "--exp-dir", model, "--manifest", run_dir / "test.jsonl", "--ngram",
                  lm / "lm.npz", "--lodr", lm / "low.arpa", "--lm-scales", 0, *scales, "--lodr-scales", 0, 1,
                  *search, *rescore, *(() if penalty == -1 else ("--blank-penalty", penalty)))  # fmt: skip
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    tried = {(float(row[0]), float(row[1])): int(row[3]) for row in lines[2:] if len(row) == 7}
    assert {(0, 0), *((scale, 0) for scale in scales)} <= set(tried) and len(set(tried.values())) > 1
    decoding = load_model(model)[1].decoding
    found = decoding.lm_scale, decoding.lodr_scale
    assert tried[found] == min(tried.values()) and found[0] > 0
    assert decoding.blank_penalty == penalty and (model / "decoding.yaml").read_text().count("../lm/") == 2
    for options, expected in ((rescore, tried[found]), (("--lm-scale", 0), tried[0, 0])):
        tiny_run.call(monkeypatch, decode, "--exp-dir", model, "--manifest", run_dir / "test.jsonl", "--out",
                      run_dir / "out", *search, *options)  # fmt: skip
        assert json.loads((run_dir / "out" / "result.json").read_text())["errors"] == expected


def test_the_climb_ends_at_the_smallest_of_equal_valleys_and_follows_a_diagonal_one():
    errors = [[50, 51, 52, 53], [44, 46, 48, 50], [40, 39, 45, 49], [41, 40, 35, 36], [43, 44, 38, 35]]
    tried = set()
    assert climb(lambda point: tried.add(point) or errors[point[0]][point[1]], 5, 4) == (3, 2)
    assert {(0, 0), (4, 0)} <= tried and (0, 1) not in tried
    assert climb(lambda point: 7, 3, 3) == (0, 0)


def test_wrong_scales_are_one_sentence(run_dir, monkeypatch):
    words = ["--exp-dir", run_dir / "model", "--manifest", run_dir / "test.jsonl", "--ngram", run_dir / "lm/low.arpa"]
    with pytest.raises(ConfigError, match=r"--lm-scales must be numbers of at least 0, got \[-1.0, 0.5\]"):
        tiny_run.call(monkeypatch, tune_scales, *words, "--lm-scales", 0.5, -1)
    with pytest.raises(ConfigError, match=r"--lodr-scales must be less than 1 \+ the smallest of --lm-scales"):
        tiny_run.call(monkeypatch, tune_scales, *words, "--lm-scales", 0.1, "--lodr-scales", 1.2)
    tune_scales.parse_arguments([*map(str, words), "--rescore", "--lm-scales", "0.1", "--lodr-scales", "1.2"])
    with pytest.raises(ConfigError, match="--rescore needs --method modified_beam_search"):
        tiny_run.call(monkeypatch, tune_scales, *words, "--rescore", "--method", "greedy_search")


def test_no_model_is_tried_whatever_the_lists_are_and_lodr_beside_the_only_scale(run_dir, monkeypatch, capsys):
    tiny_run.call(monkeypatch, tune_scales, "--exp-dir", run_dir / "model", "--manifest", run_dir / "test.jsonl",
                  "--ngram", run_dir / "lm/lm.npz", "--lodr", run_dir / "lm/low.arpa", "--lm-scales", 3,
                  "--lodr-scales", 0.5, 1, "--mode", "full", "--method", "greedy_search")  # fmt: skip
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[2:] if line.startswith("|")]
    tried = {tuple(map(float, row)) for row in rows}
    assert {(0, 0), (3, 0), (3, 0.5)} <= tried and all(lm or not lodr for lm, lodr in tried)
