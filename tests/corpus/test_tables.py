"""Tables of recordings: what is read, what is refused, how a corpus without splits is divided."""

import re
from collections import Counter

import pytest

from cascade.corpus.splits import split_by
from cascade.corpus.tables import read_table, utterances_of


@pytest.fixture
def folder(tmp_path):
    for name in ("a.wav", "b.wav", "c d.wav", "sub/e.mp3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def write(folder, text, encoding="utf-8"):
    table = folder / "data.tsv"
    table.write_bytes(text.encode(encoding))
    return table


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_named_columns_may_stand_in_any_order(folder, encoding, end):
    lines = ["Speaker\ttext\tnotes\tPATH\tend\tstart", "anna\tGrüß dich\tx\ta.wav\t2.5\t1", ""]
    lines += ["ben\t你好\t\tsub/e.mp3", "", ""]
    first, second = read_table(write(folder, end.join(lines), encoding))
    assert (first.line, first.path, first.text) == (2, folder / "a.wav", "Grüß dich")
    assert (first.speaker, first.start, first.end, first.split) == ("anna", 1.0, 2.5, None)
    assert (second.line, second.speaker, second.text, second.end) == (4, "ben", "你好", None)


def test_without_names_columns_are_path_text_split_speaker_start_end(folder):
    one, two = read_table(write(folder, "a.wav\teins\ttrain\tx\t0\t1.5\nb.wav\tzwei\tVALID\n"))
    assert (one.split, one.speaker, one.start, one.end) == ("train", "x", 0.0, 1.5)
    assert (two.split, two.speaker, two.start) == ("dev", None, None)
    assert [row.text for row in read_table(write(folder, f"{folder}/a.wav\ttext\nb.wav\tpath"))] == ["text", "path"]


def test_common_voice_names_and_paths_that_start_elsewhere(folder):
    table = write(folder / "sub", "client_id\tpath\tsentence\tup_votes\nx\ta.wav\tJa.\t2\n")
    (row,) = read_table(table, folder)
    assert (row.path, row.text, row.speaker) == (folder / "a.wav", "Ja.", "x")


def test_quotes_are_text_unless_the_whole_cell_is_quoted_as_spreadsheets_do(folder):
    rows = read_table(write(folder, 'a.wav\t"say ""hi"" twice"\nb.wav\t"Ja," rief er\nc d.wav\tdas "Nein"\n'))
    assert [row.text for row in rows] == ['say "hi" twice', '"Ja," rief er', 'das "Nein"']


def test_a_recording_whose_text_is_the_name_of_a_column_is_no_header(folder):
    assert [row.text for row in read_table(write(folder, "a.wav\tfile\nb.wav\taudio"))] == ["file", "audio"]


@pytest.mark.parametrize(("text", "message"), [
    ("", "data.tsv is empty"),
    ("path\ttext\n", "no other line"),
    ("path\tspeaker\na.wav\tx", "line 1 names the columns path, speaker: text is missing"),
    ("file\tpath\ttext\n", "line 1: the columns file, path all mean path"),
    ("a.wav,hello\n", "line 1 has one cell.*separated by commas"),
    ("path\ttext\na.wav\tx\ny", "line 3 has one cell"),
    ("path\ttext\na.wav\tx\ty", "line 2 has 3 cells, the table has 2 columns"),
    ("path\ttext\n\tx", "line 2, column path: empty"),
    ("path\ttext\tsplit\na.wav\tx\ttrian", "line 2, column split: must be train, dev or test, got 'trian'"),
    ("path\ttext\tsplit\na.wav\tx\ttrain\nb.wav\ty\t", "line 3, column split: empty, but other lines"),
    ("path\ttext\tstart\na.wav\tx\t1,5", "line 2, column start: must be a number of seconds, got '1,5'"),
    ("path\ttext\tstart\na.wav\tx\t-1", "line 2, column start: must be at least 0"),
    ("path\ttext\tend\na.wav\tx\tnan", "line 2, column end: must be at least 0, got 'nan'"),
    ("path\ttext\tstart\tend\na.wav\tx\t2\t1.5", "line 2, column end: must lie after start 2, got 1.5"),
    ("path\ttext\nnowhere.wav\tx", "line 2, column path: .*nowhere.wav not found, nor any other.*relative paths start"),
])  # fmt: skip
def test_a_wrong_table_is_refused_with_line_and_column(folder, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_table(write(folder, text))
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_refused_with_its_line(folder):
    (folder / "data.tsv").write_bytes("path\ttext\na.wav\tGrüße\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        read_table(folder / "data.tsv")


def test_some_missing_files_are_told_and_left_to_validation(folder, caplog):
    assert len(read_table(write(folder, "a.wav\tx\nnowhere.wav\ty\n"))) == 2
    assert re.search(r"1 of 2 lines name files that do not exist, the first is line 2 \(.*nowhere.wav\)", caplog.text)


def table_of(folder, lines, header="path\ttext\tspeaker"):
    return read_table(write(folder, "\n".join([header, *lines])))


def test_no_speaker_is_in_two_splits_and_the_same_seed_gives_the_same(folder, caplog):
    caplog.set_level("INFO")
    rows = table_of(folder, [f"a.wav\tsatz {i}\tsprecher {i % 12}" for i in range(120)])
    splits = utterances_of(rows, seed=1)
    speakers = {split: {item.speaker for item in items} for split, items in splits.items()}
    assert sum(map(len, speakers.values())) == 12 and all(speakers.values())
    assert {split: len(items) for split, items in splits.items()} == {"train": 100, "dev": 10, "test": 10}
    assert splits == utterances_of(rows, seed=1)
    assert len({str(utterances_of(rows, seed)["test"]) for seed in range(20)}) > 5
    assert "no split column: split by speaker with seed 1: train 100 lines of 10 speakers, dev 10" in caplog.text
    ids = [item.id for items in splits.values() for item in items]
    assert len(set(ids)) == 120 and splits["train"][0].text.startswith("satz")


def test_without_speakers_the_segments_of_a_recording_stay_together(folder, caplog):
    lines = [f"{name}\tx {i}\t{i}\t{i + 1}" for i in range(5) for name in ("a.wav", "b.wav", "c d.wav", "sub/e.mp3")]
    splits = utterances_of(table_of(folder, lines, "path\ttext\tstart\tend"), 42)
    paths = [{item.path for item in items} for items in splits.values()]
    assert [len(part) for part in paths] == [2, 1, 1] and len(set.union(*paths)) == 4
    assert "not split by speaker" in caplog.text


@pytest.mark.parametrize(("lines", "told"), [
    ([f"{name}\tx\tone" for name in ("a.wav", "b.wav", "c d.wav")], "there are only 1"),
    ([f"a.wav\tx{i}\tone" for i in range(9)], "there are only 1 recordings"),
])
def test_few_speakers_or_recordings_still_make_three_splits_and_a_warning(folder, lines, told, caplog):
    assert all(utterances_of(table_of(folder, lines), 42).values())
    assert told in caplog.text


def test_two_lines_are_too_few(folder):
    with pytest.raises(ValueError, match="only 2 lines, too few for train, dev, test"):
        utterances_of(table_of(folder, ["a.wav\tx\ty", "b.wav\tx\tz"]), 42)


def test_a_split_that_the_column_lacks_is_taken_out_of_train(folder, caplog):
    caplog.set_level("INFO")
    lines = [f"a.wav\tx\t{'test' if i < 3 else 'train'}\tspeaker {i}" for i in range(23)]
    splits = utterances_of(table_of(folder, lines, "path\ttext\tsplit\tspeaker"), 42)
    assert {split: len(items) for split, items in splits.items()} == {"train": 18, "dev": 2, "test": 3}
    assert "the split column names no dev line: split by speaker" in caplog.text
    with pytest.raises(ValueError, match="names no train line"):
        utterances_of(table_of(folder, lines[:3], "path\ttext\tsplit\tspeaker"), 42)


def test_a_speaker_whom_the_table_itself_puts_into_two_splits_is_told(folder, caplog):
    lines = ["a.wav\tx\ttrain\tanna", "b.wav\ty\tdev\tben", "c d.wav\tz\ttest\tanna"]
    utterances_of(table_of(folder, lines, "path\ttext\tsplit\tspeaker"), 42)
    assert "1 speakers are in both train and test" in caplog.text


@pytest.mark.parametrize("sizes", [[1, 1, 1], [50, 1, 1], [1, 50, 50], [10] * 3, [100, 3, 3, 3, 3], [1] * 30])
def test_each_split_gets_whole_groups_and_train_the_most_it_can(sizes):
    keys = [group for group, size in enumerate(sizes) for _ in range(size)]
    chosen = split_by(keys)
    of_group = {}
    for key, split in zip(keys, chosen, strict=True):
        assert of_group.setdefault(key, split) == split
    counts = Counter(chosen)
    assert set(counts) == {"train", "dev", "test"} and counts["train"] >= max(sizes)


def test_large_corpora_do_not_give_a_tenth_to_each_test_set():
    counts = Counter(split_by(range(50_000)))
    assert counts["dev"] == counts["test"] == 2000


def test_a_corpus_that_grows_keeps_most_of_its_split():
    before, after = split_by(range(1000)), split_by(range(1100))
    assert sum(one == other for one, other in zip(before, after, strict=False)) > 950
