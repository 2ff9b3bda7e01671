import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from cascade.audio.io import read_audio
from cascade.bin.prepare_data import prepare
from cascade.bin.train_tokens import train_tokens
from cascade.config.options import DataConfig, TokenConfig
from cascade.corpus.cuts import load_samples, read_cuts
from cascade.corpus.manifests import Utterance, read_manifest, write_manifest
from cascade.corpus.quarantine import Problem, read_quarantine
from cascade.data.batches import TrainBatches
from tests.odd_audio import write_odd_files
from tests.synthetic import AN4, small_config, tone, write_corpus, write_lines


def prepare_lines(root, lines, config=None, **options):
    """Stage 0 on a train manifest of `lines` and a good dev split: (cuts of train, problems)."""
    manifests = write_corpus(root, num_train=1, num_dev=1)
    write_lines(manifests / "train.jsonl", lines)
    prepare(manifests, root / "data", config or small_config(), **options)
    return list(read_cuts(root / "data" / "train_cuts.jsonl.gz")), read_quarantine(root / "data" / "quarantine.jsonl")


def good(root, name="good", seconds=1.0, rate=16000, **changes):
    path = root / "wav" / f"{name}.flac"
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, tone(seconds, rate), rate)
    return {"id": name, "path": str(path), "text": "RED", **changes}


def truncated_flac(root):
    line = good(root, "cut")
    content = open(line["path"], "rb").read()
    open(line["path"], "wb").write(content[: len(content) // 2])
    return line


BAD = {
    "truncated": (truncated_flac, "unreadable audio: ", "truncated audio"),
    "missing": (lambda root: {"id": "x", "path": "nowhere.wav", "text": "RED"}, "unreadable audio: ", "nowhere.wav"),
    "no audio": (lambda root: {"id": "x", "path": "train.jsonl", "text": "RED"}, "unreadable audio: ", "train.jsonl"),
    "empty text": (lambda root: good(root, "x", text=" \t"), "empty text: ", ""),
    "too long": (lambda root: good(root, "x", seconds=4.0), "wrong duration: ", "longer than data.max_duration=3"),
    "too short": (lambda root: good(root, "x", seconds=0.15), "wrong duration: ", "shorter than data.min_duration"),
    "no frame": (lambda root: good(root, "x", start=0.0, end=0.03), "wrong duration: ", ""),
    "end outside": (lambda root: good(root, "x", start=0.5, end=1.5), "wrong duration: ", "end 1.5 s lies outside"),
    "start outside": (lambda root: good(root, "x", start=1.5), "wrong duration: ", "start 1.5 s lies outside"),
    "start after end": (lambda root: good(root, "x", start=0.5, end=0.4), "wrong duration: ", "0.5"),
    "same id": (lambda root: good(root, "good"), "duplicate id: ", "line 2, first seen in line 1"),
    "not JSON": (lambda root: '{"id": "x", "path"', "malformed line: ", "train.jsonl line 2: not JSON"),
    "a list": (lambda root: '["x"]', "malformed line: ", "line 2: not a JSON object"),
    "no text": (lambda root: {"id": "x", "path": "a.wav"}, "malformed line: ", "text must be a string, got None"),
    "number as id": (lambda root: {"id": 3, "path": "a", "text": "RED"}, "malformed line: ", "id must be a string"),
    "empty id": (lambda root: {"id": "", "path": "a", "text": "RED"}, "malformed line: ", "id must not be empty"),
    "endless start": (lambda root: good(root, "x", start=10**400), "malformed line: ", "start must be a number"),
    "infinite end": (lambda root: good(root, "x", end=float("inf")), "malformed line: ", "end must be a number"),
    "half a character": (
        lambda root: json.dumps(good(root, "x", speaker="\ud800")), "malformed line: ", "speaker holds half a character"
    ),
    "nested": (lambda root: "[" * 100_000, "malformed line: ", "line 2: not a JSON object of this kind"),
    "bad start": (lambda root: good(root, "x", start="1"), "malformed line: ", "start must be a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_utterance_is_set_aside_with_its_reason(tmp_path, name):
    make, kind, detail = BAD[name]
    config = small_config(data=DataConfig(min_duration=0.2, max_duration=3.0, max_quarantine_share=0.5))
    if name == "no frame":
        config = small_config(data=DataConfig(min_duration=0.0, max_quarantine_share=0.5))
    cuts, problems = prepare_lines(tmp_path, [good(tmp_path), make(tmp_path)], config)
    assert [cut.id for cut in cuts] == ["good"]
    (problem,) = problems
    assert problem.split == "train" and problem.path
    assert problem.reason.startswith(kind) and detail in problem.reason, problem.reason
    entries = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [set(entry) for entry in entries] == [{"id", "split", "path", "reason"}]


def test_odd_files_are_all_set_aside_and_nothing_else_happens(tmp_path):
    odd = write_odd_files(tmp_path / "odd")
    lines = [{"id": path.name, "path": str(path), "text": "RED"} for path in odd]
    config = small_config(data=DataConfig(max_quarantine_share=1.0))
    cuts, problems = prepare_lines(tmp_path, [*lines, good(tmp_path)], config)
    assert [cut.id for cut in cuts] == ["good"] and [problem.id for problem in problems] == [path.name for path in odd]
    assert {problem.kind for problem in problems} == {"unreadable audio"}


def test_line_that_is_not_utf8_is_set_aside_and_a_byte_order_mark_is_not(tmp_path):
    manifest = tmp_path / "a.jsonl"
    manifest.write_bytes(b'\xef\xbb\xbf{"id": "a", "path": "a.wav", "text": "A"}\n\n{"id": "\xff"}\n')
    lines = list(read_manifest(manifest))
    assert lines[0] == Utterance("a", tmp_path / "a.wav", "A")
    assert isinstance(lines[1], Problem) and lines[1].reason.endswith("a.jsonl line 3: not UTF-8 text")


def test_written_manifest_reads_back(tmp_path):
    path = tmp_path / "a.wav"
    utterances = [Utterance("a", path, "GRÜN", "s1"), Utterance("b", path, "X", None, 0.5, 1)]
    write_manifest(tmp_path / "m" / "train.jsonl", utterances)
    assert list(read_manifest(tmp_path / "m" / "train.jsonl")) == utterances


def test_cut_samples_equal_the_part_of_the_file(tmp_path):
    lines = [good(tmp_path, "whole"), good(tmp_path, "part", start=0.25, end=0.75), good(tmp_path, "rest", start=0.6)]
    cuts, problems = prepare_lines(tmp_path, lines)
    samples = soundfile.read(lines[0]["path"], dtype="float32")[0]
    assert not problems
    for cut, (first, last) in zip(cuts, [(0, 16000), (4000, 12000), (9600, 16000)], strict=True):
        np.testing.assert_array_equal(load_samples(cut, 16000), samples[first:last])
        np.testing.assert_array_equal(cut.load_audio()[0], samples[first:last])
        assert cut.num_samples == last - first


def test_other_rates_and_channels_are_used_and_noted(tmp_path, caplog):
    stereo = good(tmp_path, "stereo")
    both = np.stack([tone(1.0, 8000, 1), tone(1.0, 8000, 2)], 1)
    soundfile.write(stereo["path"], both, 8000)
    lines = [stereo, good(tmp_path, "a", rate=8000, start=0.1, end=0.9), good(tmp_path, "b", rate=44100)]
    with caplog.at_level("INFO"):
        cuts, problems = prepare_lines(tmp_path, lines)
    assert not problems
    assert "train: 1 utterances mixed down from 2 channels; resampled from 8000 Hz" in caplog.text
    assert "train: 1 utterances resampled from 44100 Hz" in caplog.text
    for cut, line in zip(cuts, lines, strict=True):
        assert cut.sampling_rate == 16000
        expected, _ = read_audio(line["path"], 16000, line.get("start"), line.get("end"))
        np.testing.assert_array_equal(load_samples(cut, 16000), expected[: cut.num_samples])
        assert abs(cut.load_audio().shape[1] - len(expected)) <= 1  # lhotse's own users get the same stretch


def test_too_large_a_share_stops_with_the_counts_and_keeps_the_earlier_cuts(tmp_path):
    lines = [good(tmp_path), good(tmp_path, "x", text="")]
    prepare_lines(tmp_path, lines)
    before = (tmp_path / "data" / "train_cuts.jsonl.gz").read_bytes()
    config = small_config(data=DataConfig(max_quarantine_share=0.4))
    with pytest.raises(ValueError, match=r"train: 1 of 2 utterances \(50.0 %\).*empty text 1.*share=0.4"):
        prepare_lines(tmp_path, lines, config)
    assert (tmp_path / "data" / "train_cuts.jsonl.gz").read_bytes() == before
    assert len(read_quarantine(tmp_path / "data" / "quarantine.jsonl")) == 1


def test_a_split_without_a_usable_utterance_stops(tmp_path):
    with pytest.raises(ValueError, match="train: no usable utterance"):
        prepare_lines(tmp_path, [], small_config())


def test_a_missing_split_is_an_error(tmp_path):
    manifests = write_corpus(tmp_path, 1, 1)
    (manifests / "dev.jsonl").unlink()
    with pytest.raises(ValueError, match="must hold dev.jsonl"):
        prepare(manifests, tmp_path / "data", small_config())


def test_a_split_that_is_gone_is_told(tmp_path, caplog):
    manifests = write_corpus(tmp_path, 1, 1)
    (manifests / "test.jsonl").write_bytes((manifests / "dev.jsonl").read_bytes())
    prepare(manifests, tmp_path / "data", small_config())
    assert "earlier run" not in caplog.text
    (manifests / "test.jsonl").unlink()
    prepare(manifests, tmp_path / "data", small_config())
    assert "test_cuts.jsonl.gz is of an earlier run, without test.jsonl now" in caplog.text


def test_a_recording_that_was_replaced_since_is_told(tmp_path):
    manifests = write_corpus(tmp_path, 1, 1)
    prepare(manifests, tmp_path / "data", small_config())
    (cut,) = read_cuts(tmp_path / "data" / "train_cuts.jsonl.gz")
    samples, rate = soundfile.read(cut.recording.sources[0].source)
    soundfile.write(cut.recording.sources[0].source, samples[:-1000], rate)
    with pytest.raises(ValueError, match=r"samples and had \d+: run stage 0 again"):
        load_samples(cut, rate)
    cut.recording = None
    with pytest.raises(ValueError, match="cut train0 has no recording"):
        load_samples(cut, rate)


@pytest.mark.parametrize("line", ["{", '{"id": 1}', "[]"])
def test_a_damaged_quarantine_file_is_named(line, tmp_path):
    (tmp_path / "quarantine.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match="quarantine.jsonl line 2 is damaged"):
        read_quarantine(tmp_path / "quarantine.jsonl")


def test_threads_do_not_change_the_cuts(tmp_path):
    manifests = write_corpus(tmp_path)
    for num_jobs in (1, 3):
        prepare(manifests, tmp_path / f"data{num_jobs}", small_config(), num_jobs)
    one, three = (list(read_cuts(tmp_path / f"data{jobs}" / "train_cuts.jsonl.gz")) for jobs in (1, 3))
    assert one == three and [cut.id for cut in one] == [f"train{index}" for index in range(13)]


def test_max_utterances_takes_evenly_spaced_ones(tmp_path):
    prepare(write_corpus(tmp_path), tmp_path / "data", small_config(), max_utterances=4)
    ids = [cut.id for cut in read_cuts(tmp_path / "data" / "train_cuts.jsonl.gz")]
    assert ids == ["train0", "train3", "train6", "train9"]


def test_train_tokens_sets_aside_what_the_tokenizer_cannot_take_and_a_rerun_repeats_nothing(tmp_path, exp, caplog):
    lines = [good(tmp_path, f"g{index}", text="RED BLUE") for index in range(6)]
    lines += [good(tmp_path, "rare", text="RED ZEBRA"), good(tmp_path, "wordy", text="RED " * 24), "{"]
    config = small_config(tokens=TokenConfig(kind="word", vocab_size=4))
    cuts, problems = prepare_lines(tmp_path, lines, config)
    assert len(cuts) == 8 and len(problems) == 1
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            tokenizer = train_tokens(tmp_path / "data", tmp_path / "tokens", config)
        problems = read_quarantine(tmp_path / "data" / "quarantine.jsonl")
        assert Counter((problem.id, problem.kind) for problem in problems) == Counter([
            ("line 9", "malformed line"), ("rare", "unknown characters"),
        ])
        assert "set aside: unknown characters 1" in caplog.text
        assert "dev: 1 utterances have what the tokenizer lacks" in caplog.text
    assert tokenizer.vocab_size == 4


def test_the_slowest_copy_decides_how_many_tokens_fit(tmp_path):
    lines = [good(tmp_path, "g"), good(tmp_path, "wordy", text="RED " * 23)]  # 25 encoder frames, 22 at speed 1.1
    for speeds, expected in (((1.0,), []), ((1.0, 1.1), []), ((1.1, 1.2), ["wordy"])):
        config = small_config(data=DataConfig(speed_factors=speeds, max_quarantine_share=0.5))
        prepare_lines(tmp_path, lines, config)
        train_tokens(tmp_path / "data", tmp_path / "tokens", config)
        problems = read_quarantine(tmp_path / "data" / "quarantine.jsonl")
        assert [problem.id for problem in problems] == expected
        assert not expected or "23 tokens, 22 encoder frames at speed 1.1" in problems[0].reason


def test_training_leaves_out_what_stage_2_has_listed(tmp_path, caplog):
    from cascade.bin.compute_features import compute_features

    lines = [good(tmp_path, "g"), good(tmp_path, "wordy", text="RED " * 26)]
    config = small_config(data=DataConfig(speed_factors=(1.0, 1.1), max_quarantine_share=0.5))
    prepare_lines(tmp_path, lines, config)
    compute_features(tmp_path / "data", tmp_path / "fbank", config, num_jobs=1)
    tokenizer = train_tokens(tmp_path / "data", tmp_path / "tokens", config)
    batches = TrainBatches(tmp_path / "fbank" / "train_cuts.jsonl.gz", tokenizer, config)
    assert sorted(name for batch in batches for name in batch.ids) == ["g", "g_sp1.1"]
    assert "1 training utterances do not fit the tokenizer" in caplog.text


@pytest.mark.skipif(not AN4.is_dir(), reason="no copy of AN4 in ../shared/corpora")
def test_a_truncated_real_recording_is_set_aside_and_its_neighbours_are_kept(tmp_path):
    recordings = sorted((AN4 / "wav/an4_clstk/fash").glob("*.flac"))[:4]
    lines = [{"id": path.stem, "path": str(path), "text": "RED"} for path in recordings]
    (tmp_path / "cut.flac").write_bytes(recordings[1].read_bytes()[:-2000])
    lines[1]["path"] = str(tmp_path / "cut.flac")
    cuts, problems = prepare_lines(tmp_path, lines)
    assert [cut.id for cut in cuts] == [lines[index]["id"] for index in (0, 2, 3)]
    assert [problem.id for problem in problems] == [lines[1]["id"]]
    assert problems[0].reason.startswith("unreadable audio: ")
