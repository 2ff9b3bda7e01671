import gzip
from pathlib import Path

import pytest
import soundfile
import torch
from lhotse import Recording, SupervisionSegment

from cascade.config.options import TokenConfig
from cascade.corpus.cuts import split_name, write_cuts
from cascade.data.decode_batches import decode_batches
from tests.odd_audio import write_odd_files
from tests.synthetic import small_config, tone, write_lines


def collect(path, config=None, max_seconds=3.0):
    """{id: (features, text)} of what could be read, and the iterable."""
    batches = decode_batches(path, config or small_config(), max_seconds)
    found = {}
    for batch in batches:
        assert batch.tokens.shape == (len(batch.ids), 0) and (batch.token_lens == 0).all()
        assert len(batch.ids) == 1 or batch.features.shape[0] * batch.features.shape[1] <= 100 * max_seconds
        for row, name in enumerate(batch.ids):
            found[name] = (batch.features[row, : batch.feature_lens[row]], batch.texts[row])
    return found, batches


def test_manifest_cuts_and_stored_features_give_the_same(exp):
    manifest, _ = collect(exp / "manifests" / "dev.jsonl")
    cuts, _ = collect(exp / "data" / "dev_cuts.jsonl.gz")
    features, _ = collect(exp / "fbank" / "dev_cuts.jsonl.gz")
    assert sorted(manifest) == sorted(cuts) == sorted(features) == [f"dev{index}" for index in range(5)]
    for name, (matrix, text) in manifest.items():
        assert torch.equal(cuts[name][0], matrix)
        torch.testing.assert_close(features[name][0], matrix, atol=2**-8, rtol=0)
        assert text == cuts[name][1] == features[name][1]


def test_bad_utterances_are_listed_and_the_others_decoded(tmp_path, caplog):
    soundfile.write(tmp_path / "a.flac", tone(0.8), 16000)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    manifest = write_lines(tmp_path / "m.jsonl", [
        {"id": "a", "path": "a.flac", "text": "Red", "start": 0.2, "end": 0.7},
        {"id": "cut", "path": "cut.flac", "text": "RED"},
        {"id": "none", "path": "none.flac", "text": "RED"},
        {"id": "short", "path": "a.flac", "text": "RED", "end": 0.026},
        {"id": "a", "path": "a.flac", "text": "RED"},
        "{",
    ])
    found, batches = collect(manifest, small_config(tokens=TokenConfig(kind="word", case="upper")))
    assert set(found) == {"a"} and found["a"][1] == "RED" and len(found["a"][0]) == 50
    assert {(problem.id, problem.kind) for problem in batches.problems} == {
        ("cut", "unreadable audio"), ("none", "unreadable audio"), ("short", "wrong duration"),
        ("a", "duplicate id"), ("line 6", "malformed line"),
    }
    assert "cut is left out" in caplog.text
    list(batches)
    assert len(batches.problems) == 5


def test_odd_files_are_all_listed_and_the_others_decoded(tmp_path):
    odd = write_odd_files(tmp_path / "odd")
    soundfile.write(tmp_path / "good.flac", tone(0.8), 16000)
    lines = [{"id": path.name, "path": str(path), "text": "RED"} for path in [*odd, tmp_path / "good.flac"]]
    found, batches = collect(write_lines(tmp_path / "m.jsonl", lines))
    assert set(found) == {"good.flac"}
    assert {problem.id for problem in batches.problems} == {path.name for path in odd}
    assert {problem.kind for problem in batches.problems} == {"unreadable audio"}


def test_a_cut_that_comes_twice_is_decoded_once(exp, tmp_path):
    lines = gzip.decompress((exp / "data" / "dev_cuts.jsonl.gz").read_bytes())
    (tmp_path / "twice_cuts.jsonl.gz").write_bytes(gzip.compress(lines + lines.splitlines(keepends=True)[0]))
    found, batches = collect(tmp_path / "twice_cuts.jsonl.gz")
    assert len(found) == 5
    assert [(problem.split, problem.kind) for problem in batches.problems] == [("twice", "duplicate id")]


def test_a_recording_that_lhotse_cannot_read_is_listed(tmp_path):
    cuts = []
    for name in ("good", "gone"):
        soundfile.write(tmp_path / f"{name}.wav", tone(0.8), 16000)
        cut = Recording.from_file(tmp_path / f"{name}.wav").to_cut()
        cut.supervisions = [SupervisionSegment(name, cut.recording_id, 0.0, cut.duration, text="RED")]
        cuts.append(cut)
    (tmp_path / "gone.wav").unlink()
    write_cuts(tmp_path / "foreign_cuts.jsonl.gz", cuts)
    found, batches = collect(tmp_path / "foreign_cuts.jsonl.gz")
    assert len(found) == 1 and [problem.kind for problem in batches.problems] == ["unreadable audio"]


@pytest.mark.parametrize(("name", "split"), [
    ("snr2.5.jsonl", "snr2.5"), ("test.clean_cuts.jsonl.gz", "test.clean"), ("dev.jsonl", "dev"), ("x.jsonl.gz", "x"),
])
def test_the_name_of_a_set_is_whole(name, split):
    assert split_name(Path("a.b") / name) == split


def test_missing_manifest_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest not found"):
        decode_batches(tmp_path / "none.jsonl", small_config(), 10)
