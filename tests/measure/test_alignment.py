import json
import sys

import pytest
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.supervision import AlignmentItem

from cascade.bin import align
from cascade.checkpoint import load_file, load_model, save_file
from cascade.data.alignments import TimedWord, read_alignments, read_ctm, write_aligned_cuts, write_ctm
from cascade.data.decode_batches import decode_batches
from cascade.measure.alignment import align_batch
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.search.methods import DecodingOptions, build_search
from tests.tiny_run import make_manifest, make_model_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, predictor, rnnt_type in (
        ("student", "tied_reduced", "modified"), ("teacher", "lstm", "modified"), ("regular", "lstm", "regular")
    ):
        weights = make_model_dir(folder / name, predictor, epochs=1) / "averaged.pt"
        values = load_file(weights)
        values["config"]["loss"]["rnnt_type"] = rnnt_type
        save_file(values, weights)
    path = make_manifest(folder)
    extra = {"id": "stranger", "path": "0.wav", "text": "one seven"}
    wordy = {"id": "wordy", "path": "1.wav", "text": " ".join(["one"] * 60)}
    spaced = {"id": "an id", "path": "0.wav", "text": "one"}
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in (extra, wordy, spaced)))
    return folder


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["align", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        align.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("model", "mode"), [("student", "full"), ("student", "look_ahead"), ("teacher", "streaming")])
def test_ctm_holds_the_words_of_the_references_in_their_order(run_dir, tmp_path, monkeypatch, model, mode):
    manifest = run_dir / "test.jsonl"
    call(monkeypatch, "--exp-dir", run_dir / model, "--manifest", manifest, "--mode", mode, "--out", tmp_path)
    lines = [line.split(" ") for line in (tmp_path / "alignment.ctm").read_text().splitlines()]
    assert all(len(line) == 6 and line[1] == "1" for line in lines)
    texts = {}
    for name, _, start, duration, word, confidence in lines:
        assert float(start) >= 0 and float(duration) > 0 and 0 <= float(confidence) <= 1
        texts.setdefault(name, []).append(word)
    assert texts == {
        "utt-0": ["one", "two"], "utt-1": ["three"], "utt-2": ["two", "three", "four", "five"], "an%20id": ["one"],
    }
    for words in read_ctm(tmp_path / "alignment.ctm").values():
        for one, other in zip(words, words[1:], strict=False):
            assert one.end <= other.start + 1e-9  # one symbol per frame at most, a word is a symbol
    summary = json.loads((tmp_path / "alignment.json").read_text())
    assert (summary["num_utterances"], summary["num_words"], summary["num_set_aside"]) == (4, 8, 4)
    kinds = {item["id"]: item["reason"].split(":")[0] for item in summary["set_aside"]}
    assert kinds == {
        "utt-3": "empty text", "broken": "unreadable audio", "stranger": "unknown characters",
        "wordy": "too many tokens",
    }
    assert any("seven" in item["reason"] for item in summary["set_aside"])


def test_a_regular_model_may_say_more_words_than_there_are_frames(run_dir, tmp_path, monkeypatch):
    call(monkeypatch, "--exp-dir", run_dir / "regular", "--manifest", run_dir / "test.jsonl", "--out", tmp_path)
    words = read_ctm(tmp_path / "alignment.ctm")["wordy"]
    assert [word.word for word in words] == ["one"] * 60
    assert [word.start for word in words] == sorted(word.start for word in words)


def test_no_path_scores_better_than_the_alignment(run_dir):
    """Greedy search walks one path of its own text: the alignment of that text scores at least as well."""
    model, config, tokenizer = load_model(run_dir / "student")
    model.double()
    options = DecodingOptions(mode="full")
    search = build_search(TorchEngine(model), options, None)
    batch = list(decode_batches(run_dir / "test.jsonl", config, max_seconds=30.0))[-1]
    features = batch.features.double()
    greedy = decode_batch(model, search, features, batch.feature_lens, options)
    tokens = [hypothesis.tokens for hypothesis in greedy]
    assert sum(map(len, tokens)) > 3
    aligned = align_batch(model, features, batch.feature_lens, tokens, options, "modified")
    for one, best in zip(greedy, aligned, strict=True):
        assert best.tokens == one.tokens and list(best.timestamps) == sorted(set(best.timestamps))
        assert best.log_prob >= one.log_prob - 1e-9
        if best.timestamps == one.timestamps:
            assert best.token_log_probs == pytest.approx(one.token_log_probs)


def test_batches_of_any_size_align_alike(run_dir, tmp_path, monkeypatch):
    found = []
    for seconds in (0.1, 200):
        arguments = ("--exp-dir", run_dir / "teacher", "--manifest", run_dir / "test.jsonl", "--out", tmp_path)
        call(monkeypatch, *arguments, "--max-seconds", seconds)
        found.append([line.rsplit(" ", 1)[0] for line in (tmp_path / "alignment.ctm").read_text().splitlines()])
    assert found[0] == found[1]


def test_nothing_to_align_is_an_error(run_dir, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "x", "path": str(run_dir / "0.wav"), "text": "nine"}) + "\n")
    with pytest.raises(ValueError, match=r"no utterance that can be aligned \(1 set aside\)"):
        call(monkeypatch, "--exp-dir", run_dir / "student", "--manifest", tmp_path / "bad.jsonl", "--out", tmp_path)


def test_ctm_is_read_as_it_was_written(tmp_path):
    words = {"a": [TimedWord("eins", 0.0, 0.04, 0.5), TimedWord("zw\u00f6lf", 0.48, 0.56, 1.0)], "b": []}
    write_ctm(tmp_path / "x.ctm", words)
    assert (tmp_path / "x.ctm").read_text().splitlines() == [
        "a 1 0.000 0.040 eins 0.5000", "a 1 0.480 0.080 zw\u00f6lf 1.0000"
    ]  # fmt: skip
    (found,) = read_ctm(tmp_path / "x.ctm").values()
    assert [(word.word, word.start, round(word.end, 6), word.confidence) for word in found] == [
        ("eins", 0.0, 0.04, 0.5), ("zw\u00f6lf", 0.48, 0.56, 1.0)
    ]  # fmt: skip


def test_ctm_holds_any_id(tmp_path):
    words = {name: [TimedWord("yes", 0.5, 1.0)] for name in ("two words", "5 %", "a%20b", "tab\there", ";;x")}
    write_ctm(tmp_path / "x.ctm", words)
    assert read_ctm(tmp_path / "x.ctm") == words


@pytest.mark.parametrize(
    "line", ["a 1 0.0 word", "a 1 x 0.1 word", "a 1 -1 0.1 word", "a 1 0 nan word", "a 1 0 1 word x"]
)
def test_a_bad_ctm_line_is_named(tmp_path, line):
    (tmp_path / "x.ctm").write_text(f";; a comment\n\nb A 0.1 0.2 fine\n{line}\n")
    with pytest.raises(ValueError, match=r"x.ctm line 4: expected 'utterance channel start"):
        read_ctm(tmp_path / "x.ctm")


def test_cuts_carry_their_alignment(tmp_path):
    source = AudioSource("file", [0], "r.wav")
    recording = Recording(id="r", sources=[source], sampling_rate=16000, num_samples=32000, duration=2.0)
    cuts = []
    for name, texts in (("one", ["a b"]), ("two", ["c", "d"]), ("three", ["e"])):
        supervisions = [
            SupervisionSegment(id=f"{name}{place}", recording_id="r", start=0.0, duration=2.0, text=text)
            for place, text in enumerate(texts)
        ]
        cuts.append(MonoCut(id=name, start=0, duration=2.0, channel=0, recording=recording, supervisions=supervisions))
    cuts[2].supervisions[0].alignment = {"phone": [AlignmentItem("E", 0.5, 0.1)]}
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    words = [TimedWord("a", 0.04, 0.12, 0.9), TimedWord("b", 1.0, 1.04, 0.8)]
    alignments = {"one": words, "two": words, "three": [TimedWord("e", 0.52, 0.56, 0.7)]}
    write_aligned_cuts(tmp_path / "cuts.jsonl.gz", tmp_path / "new.jsonl.gz", alignments)
    found = read_alignments(tmp_path / "new.jsonl.gz")
    assert sorted(found) == ["one", "three"]  # which of its two supervisions says which word, a cut does not tell
    assert [(word.word, word.start, round(word.end, 6), word.confidence) for word in found["one"]] == [
        ("a", 0.04, 0.12, 0.9), ("b", 1.0, 1.04, 0.8)
    ]  # fmt: skip
    three = list(CutSet.from_file(tmp_path / "new.jsonl.gz"))[2].supervisions[0].alignment
    assert sorted(three) == ["phone", "word"]


def test_a_manifest_gives_its_words_times(tmp_path):
    line = {"id": "x", "path": "x.wav", "text": "on  off", "words": [[0.1, 0.4], [0.5, 0.9]]}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "id": "y", "words": None}) + "\n")
    assert read_alignments(tmp_path / "m.jsonl") == {"x": [TimedWord("on", 0.1, 0.4), TimedWord("off", 0.5, 0.9)]}
