"""The statistics of a corpus that stage 0 prints and draws."""

import json
import sys

import numpy as np
import pytest

from cascade.bin import prepare_data
from cascade.config.options import TokenConfig
from cascade.corpus.statistics import SplitStatistics, compare, show_character, statistics_table, write_statistics
from cascade.text.normal import normalizer
from tests.synthetic import write_corpus


def split(name, rows, **options):
    """Statistics of (seconds, text, speaker) rows."""
    statistics = SplitStatistics(name, normalizer(TokenConfig(**options)))
    for number, (seconds, text, speaker) in enumerate(rows):
        statistics.add(f"{name}{number}", seconds, text, speaker)
    return statistics


def test_counts_are_those_of_the_text_that_is_tokenised():
    found = split("train", [(2.0, "Go  home", "a"), (4.0, "go", "b"), (6.0, "HOME Éa", "a")], case="lower").summary()
    assert found["utterances"] == 3 and found["hours"] == pytest.approx(12 / 3600, abs=1e-4)
    assert (found["words"], found["distinct_words"], found["speakers"]) == (5, 3, 2)
    assert found["seconds"]["min"] == 2 and found["seconds"]["max"] == 6 and found["seconds"]["mean"] == 4
    assert found["words_per_second"]["max"] == 1 and found["words_per_second"]["p50"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["character_counts"] == {"o": 4, "h": 2, "m": 2, "e": 2, "g": 2, " ": 2, "é": 1, "a": 1}
    assert found["distinct_characters"] == 8


def test_words_of_scripts_without_spaces_are_counted_as_the_error_rate_counts_them():
    assert split("train", [(1.0, "東京 and 大阪", None)]).summary()["words"] == 5


def test_what_splits_share_is_told():
    train = split("train", [(1.0, "one two", "a"), (1.0, "three", "b")])
    test = split("test", [(1.0, "three", "b"), (1.0, "two ten", "c"), (1.0, "three", "c")])
    warnings, notes = compare([train, test])
    assert any("1 speaker in train and in test (b)" in warning for warning in warnings)
    assert any("2 of 3 utterances of test (66.7 %)" in note for note in notes)
    assert any("1 of 4 words of test (25.0 %)" in note for note in notes)
    assert not [warning for warning in warnings if "characters" in warning]
    other = split("test", [(1.0, "né", "d")])
    assert any("characters that train lacks: é" in warning for warning in compare([train, other])[0])
    apart = split("test", [(1.0, "one", "d"), (1.0, "two three", "d")])
    warnings, notes = compare([train, apart])
    assert not warnings and not [note for note in notes if "of test" in note]


def test_a_text_that_is_not_what_is_said_stands_out():
    generator = np.random.default_rng(0)
    rows = [(float(seconds), "word " * int(2.5 * seconds), None) for seconds in generator.uniform(2, 15, 200)]
    assert split("train", rows).odd_rates() == []
    rows[17] = (12.0, "word", None)
    rows[80] = (1.0, "word " * 20, None)
    assert {row["id"] for row in split("train", rows).odd_rates()} == {"train17", "train80"}
    assert split("train", []).odd_rates() == []


def test_the_table_stays_aligned_and_narrow():
    rows = [(1.0 + index / 7, "".join(chr(0x4E00 + index * j) for j in range(9)), f"s{index}") for index in range(90)]
    splits = [split(name, rows[:size]) for name, size in (("train", 90), ("dev-clean", 9), ("test-other", 1))]
    lines = statistics_table(splits).splitlines()
    block = lines[: lines.index("")]
    assert len(set(map(len, block))) == 1 and max(map(len, lines)) <= 110
    assert "-" in statistics_table([split("train", [(1.0, "a", None)]), split("test", [])])


def test_one_utterance_is_enough_and_the_files_say_the_same(tmp_path):
    splits = [split("train", [(1.5, "a b", "s")])]
    text = write_statistics(splits, tmp_path)
    assert (tmp_path / "statistics.txt").read_text() == text + "\n"
    values = json.loads((tmp_path / "statistics.json").read_text())
    assert values["splits"]["train"] == splits[0].summary()


def test_the_program_prints_writes_and_draws_them(tmp_path, monkeypatch, capsys):
    manifests = write_corpus(tmp_path)
    (manifests / "test.jsonl").write_bytes((manifests / "dev.jsonl").read_bytes())
    words = ["prepare_data", "--manifest-dir", str(manifests), "--out", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", words)
    prepare_data.main()
    shown = capsys.readouterr().out
    assert shown.split()[:8] == ["|", "|", "train", "|", "dev", "|", "test", "|"]
    assert "3 speakers in train and in dev (s0, s1, s2)" in shown
    assert (tmp_path / "data" / "statistics.txt").read_text() == shown
    values = json.loads((tmp_path / "data" / "statistics.json").read_text())
    assert values["splits"]["train"]["utterances"] == 13 and values["splits"]["dev"]["utterances"] == 5
    picture = (tmp_path / "data" / "statistics.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    width, height = (int.from_bytes(picture[place : place + 4], "big") for place in (16, 20))
    assert 1200 < width < 2000 and 800 < height < 1500


def test_a_character_that_cannot_stand_alone_is_shown_by_its_code():
    assert [show_character(character) for character in "a\u0301\u200b 你"] == ["a", "U+0301", "U+200B", "space", "你"]


@pytest.mark.parametrize("rows", [[(1.0, "$ _ ^ {x} 東", "s")], [(2.0, "a", None)] * 3, [(5.0, "\u0301", None)]])
def test_any_characters_and_few_utterances_can_be_drawn(rows, tmp_path, recwarn):
    from cascade.corpus.statistics_plot import draw_statistics

    draw_statistics([split("train", rows), split("empty", [])], tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert not [warning for warning in recwarn if "missing from" in str(warning.message)]
