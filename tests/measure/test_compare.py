"""Paired bootstrap: which difference between two systems is more than the choice of the test set."""

import json
import math

import numpy as np
import pytest

from cascade.bin import compare as program
from cascade.bin.cli import run_program
from cascade.measure.compare import compare, read_hypotheses

WORDS = 10


def write(path, errors, *, speakers=None, prefix="u"):
    """A hyps.jsonl whose utterance number n has errors[n] wrong words of ten."""
    lines = []
    for number, count in enumerate(errors):
        line = {"id": f"{prefix}{number:04}", "ref": " ".join(["right"] * WORDS)}
        line["hyp"] = " ".join(["wrong"] * count + ["right"] * (WORDS - count))
        if speakers is not None:
            line["speaker"] = speakers[number]
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def result_of(tmp_path, errors_a, errors_b, **options):
    a, b = write(tmp_path / "a.jsonl", errors_a, **options), write(tmp_path / "b.jsonl", errors_b, **options)
    return compare([(read_hypotheses(a), read_hypotheses(b))])


def test_line_ends_of_unicode_inside_a_field_end_no_line(tmp_path):
    lines = [{"id": f"a\u2028{number}", "ref": "x", "hyp": "x", "speaker": "Anna\x85"} for number in range(2)]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert len(read_hypotheses(tmp_path / "a.jsonl").references) == 2
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="a.jsonl:1: must be an object"):
        read_hypotheses(tmp_path / "a.jsonl")


def test_interval_is_that_of_the_normal_approximation(tmp_path):
    rng = np.random.default_rng(1)
    a, b = rng.binomial(WORDS, 0.3, 900), rng.binomial(WORDS, 0.25, 900)
    result = result_of(tmp_path, a, b)
    spread = 1.96 * 100 / WORDS * np.std(b - a) / math.sqrt(900)
    assert result.wer_a == pytest.approx(10 * a.mean()) and result.difference == pytest.approx(10 * (b - a).mean())
    assert result.over_utterances.high - result.over_utterances.low == pytest.approx(2 * spread, rel=0.06)
    assert (result.over_utterances.high + result.over_utterances.low) / 2 == pytest.approx(result.difference, abs=0.1)


def test_the_same_system_twice_differs_by_nothing(tmp_path):
    result = result_of(tmp_path, [0, 3, 1], [0, 3, 1])
    assert (result.over_utterances.low, result.over_utterances.high) == (0, 0)
    assert result.over_utterances.share_better == 0.5


def test_pairing_takes_out_what_both_systems_find_hard(tmp_path):
    rng = np.random.default_rng(2)
    hard = rng.integers(0, 9, 200)
    result = result_of(tmp_path, hard, hard + 1)  # one word more, everywhere
    assert result.over_utterances.low == pytest.approx(10) and result.over_utterances.high == pytest.approx(10)


def test_speakers_widen_the_interval_where_their_utterances_are_alike(tmp_path):
    speakers = [str(number // 20) for number in range(200)]
    gain = np.random.default_rng(3).integers(0, 5, 10)
    errors = np.array([gain[number // 20] for number in range(200)])
    result = result_of(tmp_path, np.full(200, 4), errors, speakers=speakers)
    narrow, wide = result.over_utterances, result.over_speakers
    assert wide.num_groups == 10 and wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_runs_are_pooled_utterance_by_utterance(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", errors) for name, errors in
             (("a1", [1, 2]), ("b1", [2, 2]), ("a2", [3, 0]), ("b2", [0, 0]))]
    a1, b1, a2, b2 = map(read_hypotheses, files)
    result = compare([(a1, b1), (a2, b2)])
    assert (result.wer_a, result.wer_b, result.num_words) == (15, 10, 40)


def test_program_prints_and_writes_the_same_numbers(tmp_path, capsys, monkeypatch):
    a, b = write(tmp_path / "a.jsonl", [1] * 50), write(tmp_path / "b.jsonl", [0, 1] * 25)
    monkeypatch.setattr("sys.argv", ["compare", str(a), str(b), "--json", str(tmp_path / "out.json")])
    program.main()
    out, row = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "A 10.00 %, B 5.00 % WER on 50 utterances, 500 words" in out and "B - A: -5.00 points (-50.0 % rel" in out
    assert row["difference"] == -5 and row["over_speakers"] is None and row["over_utterances"]["high"] < 0


@pytest.mark.parametrize("content, words", [
    ("", "holds no utterance"),
    ('{"id": "a", "ref": "x"}\n', 'a.jsonl:1: must be an object with strings "id", "ref" and "hyp"'),
    ("[1, 2]\n", "a.jsonl:1: must be"),
    ("{\n", "a.jsonl:1: must be"),
    ('{"id": "a", "ref": "x", "hyp": "x"}\n' * 2, "a.jsonl:2: utterance a comes twice"),
])  # fmt: skip
def test_damaged_files_are_named(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        read_hypotheses(tmp_path / "a.jsonl")


def test_other_utterances_and_missing_files_are_refused(tmp_path, monkeypatch, capsys):
    a, b = write(tmp_path / "a.jsonl", [1, 1]), write(tmp_path / "b.jsonl", [1, 1], prefix="v")
    for words, message, code in (
        ([a, b], "must hold the same utterances with the same references: u0000 differs", 1),
        ([a, tmp_path / "none.jsonl"], "none.jsonl not found", 1),
        ([a, b, a], "name the files in pairs", 2),
        ([a, a, "--num-draws", 3], "--num-draws must be at least 100, got 3", 2),
    ):
        monkeypatch.setattr("sys.argv", ["compare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_program(program.main)
        assert ended.value.code == code and message in capsys.readouterr().err
