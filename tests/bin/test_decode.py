import json

import pytest
import torch

from cascade.bin import decode, latency
from cascade.checkpoint import load_model
from cascade.config.options import ConfigError
from cascade.data.decode_batches import decode_batches
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.models.transducer import MODES
from cascade.search.methods import (
    METHODS,
    STREAMING_MODES,
    DecodingOptions,
    build_search,
    default_left_context_ms,
)
from tests.tiny_run import call


def decode_arguments(run_dir, out, mode="full", method="greedy_search", model="student"):
    return [
        "--exp-dir", run_dir / model, "--manifest", run_dir / "test.jsonl", "--mode", mode, "--method", method,
        "--out", out,
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_decode_writes_hypotheses_scores_and_a_row(run_dir, tmp_path, monkeypatch, mode, method, model):
    call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path, mode, method, model))
    row = json.loads((tmp_path / "result.json").read_text())
    assert (row["model"], row["mode"], row["method"], row["test_set"]) == (model, mode, method, "test")
    assert row["num_words"] == 7 and row["errors"] == row["ins"] + row["del"] + row["sub"]
    assert row["wer"] == pytest.approx(100 * row["errors"] / 7, abs=1e-3)
    assert row["num_utterances"] == 4 and row["num_set_aside"] == 1
    assert row["beam"] == (4 if method == "modified_beam_search" else None)
    assert row["look_ahead_ms"] == (640 if mode == "look_ahead" else None)
    assert row["left_context_ms"] == 5120 and row["num_params"] > 0 and row["size_bytes"] > 4 * row["num_params"]
    lines = [json.loads(line) for line in (tmp_path / "hyps.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["utt-0", "utt-1", "utt-2", "utt-3"]
    assert [line["speaker"] for line in lines] == ["speaker-0", "speaker-1"] * 2
    assert any(line["tokens"] for line in lines)
    for line in lines:
        assert len(line["tokens"]) == len(line["timestamps"]) == len(line["log_probs"])
        assert line["hyp"] == "".join(line["tokens"]).replace("\u2581", " ").strip()
    text = (tmp_path / "wer.txt").read_text()
    assert "Set aside: 1" in text and "broken" in text


def test_all_rows_of_one_process_are_those_of_single_calls(run_dir, tmp_path, monkeypatch):
    loads, load = [], decode.load_for_decoding
    monkeypatch.setattr(decode, "load_for_decoding", lambda *words, **kinds: loads.append(1) or load(*words, **kinds))
    call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path / "all", "all", "all"))
    assert loads == [1]
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        f"{mode}-{method}" for mode in MODES for method in METHODS
    }
    arguments = decode_arguments(run_dir, tmp_path / "beams", "all", "modified_beam_search")
    call(monkeypatch, decode, *arguments, "--nbest", 2)
    assert len(list((tmp_path / "beams").glob("*-modified_beam_search/nbest.jsonl"))) == len(MODES)
    for folder in (tmp_path / "all").iterdir():
        single = tmp_path / folder.name
        call(monkeypatch, decode, *decode_arguments(run_dir, single, *folder.name.split("-")))
        assert {path.name for path in folder.iterdir()} == {"hyps.jsonl", "wer.txt", "result.json"}
        for name in ("hyps.jsonl", "wer.txt"):
            assert (folder / name).read_text() == (single / name).read_text()
        rows = [json.loads((place / "result.json").read_text()) for place in (folder, single)]
        assert [row.pop("command") for row in rows][0] and rows[0] == rows[1]


def test_wrong_contexts_are_told_before_a_model_is_read_for_all_modes(tmp_path, run_dir, monkeypatch):
    arguments = decode_arguments(run_dir, tmp_path, "all", "all", model="nowhere")
    with pytest.raises(ConfigError, match="--look-ahead-ms must be a multiple of --chunk-ms"):
        call(monkeypatch, decode, *arguments, "--look-ahead-ms", 480)


def test_nbest_writes_hypotheses_best_first_and_an_oracle_that_is_no_worse(run_dir, tmp_path, monkeypatch):
    arguments = decode_arguments(run_dir, tmp_path, "streaming", "modified_beam_search")
    call(monkeypatch, decode, *arguments)
    plain = (tmp_path / "hyps.jsonl").read_text()
    assert not (tmp_path / "nbest.jsonl").exists() and "Oracle" not in (tmp_path / "wer.txt").read_text()
    call(monkeypatch, decode, *arguments, "--nbest", 3)
    assert (tmp_path / "hyps.jsonl").read_text() == plain
    firsts = [json.loads(line) for line in plain.splitlines()]
    lists = [json.loads(line) for line in (tmp_path / "nbest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lists] == [line["id"] for line in firsts]
    for line, first in zip(lists, firsts, strict=True):
        hypotheses = line["nbest"]
        assert 1 < len(hypotheses) <= 3 and line["ref"] == first["ref"]
        assert {key: hypotheses[0][key] for key in ("hyp", "tokens", "timestamps", "log_probs")} == {
            key: first[key] for key in ("hyp", "tokens", "timestamps", "log_probs")
        }
        scores = [item["score"] for item in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(item["tokens"]) for item in hypotheses}) == len(hypotheses)
    row = json.loads((tmp_path / "result.json").read_text())
    assert row["nbest"] == 3 and row["oracle_wer"] <= row["wer"]
    assert "Oracle WER, the best of 3: " in (tmp_path / "wer.txt").read_text()
    call(monkeypatch, decode, *arguments)
    assert not (tmp_path / "nbest.jsonl").exists()  # of the earlier search


def test_an_output_that_cannot_be_is_told_before_anything_is_decoded(run_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(decode, "n_best_batch", None)
    with pytest.raises(OSError, match="file"):
        call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path / "file" / "x", "full", "greedy_search"))


def test_nbest_needs_a_beam(run_dir, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--nbest needs --method modified_beam_search"):
        call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path), "--nbest", 2)
    arguments = decode_arguments(run_dir, tmp_path, method="modified_beam_search")
    with pytest.raises(ConfigError, match=r"--nbest must be at most --beam \(4\), got 5"):
        call(monkeypatch, decode, *arguments, "--nbest", 5)
    with pytest.raises(ConfigError, match="--nbest must be at least 1, got 0"):
        call(monkeypatch, decode, *arguments, "--nbest", 0)


@pytest.mark.parametrize("method", METHODS)
def test_blank_penalty_of_decode_makes_hypotheses_longer(run_dir, tmp_path, monkeypatch, method):
    lengths = []
    for penalty in (-1000, 0, 1000):  # a very negative one says nothing
        call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path, "full", method), "--blank-penalty", penalty)
        lines = [json.loads(line) for line in (tmp_path / "hyps.jsonl").read_text().splitlines()]
        lengths.append(sum(len(line["tokens"]) for line in lines))
        assert json.loads((tmp_path / "result.json").read_text())["blank_penalty"] == penalty
    assert lengths[0] == 0 < lengths[1] <= lengths[2]


def test_batches_of_any_size_decode_alike(run_dir, tmp_path, monkeypatch):
    texts = []
    for seconds in (0.1, 200):
        arguments = decode_arguments(run_dir, tmp_path, "look_ahead", "modified_beam_search")
        call(monkeypatch, decode, *arguments, "--max-seconds", seconds, "--threads", 1)
        lines = [json.loads(line) for line in (tmp_path / "hyps.jsonl").read_text().splitlines()]
        texts.append([(line["id"], line["tokens"], line["timestamps"]) for line in lines])
    assert texts[0] == texts[1]


def test_epoch_and_average_choose_the_weights(run_dir, tmp_path, monkeypatch):
    call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path), "--epoch", 2, "--avg", 2)
    with pytest.raises(FileNotFoundError, match="epochs there"):
        call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path), "--epoch", 9)
    with pytest.raises(ConfigError, match="--avg 2 needs --epoch"):
        call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path), "--avg", 2)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--chunk-ms", 50, "--chunk-ms must be a positive multiple of 40 ms, got 50"),
        ("--left-context-ms", 0, "--left-context-ms must be a positive multiple of 40 ms, got 0"),
        ("--look-ahead-ms", 480, r"--look-ahead-ms must be a multiple of --chunk-ms \(320\), got 480"),
        ("--beam", 0, "--beam must be at least 1, got 0"),
        ("--threads", 0, "--threads must be at least 1, got 0"),
        ("--max-seconds", 0, "--max-seconds must be positive, got 0.0"),
    ],
)
def test_wrong_options_are_usage_errors_that_name_them(run_dir, tmp_path, monkeypatch, option, value, message):
    with pytest.raises(ConfigError, match=message):
        call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path, "look_ahead"), option, value)


def test_missing_files_are_named(run_dir, tmp_path, monkeypatch):
    arguments = decode_arguments(run_dir, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call(monkeypatch, decode, *arguments, "--exp-dir", run_dir / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"--manifest .*none.jsonl not found"):
        call(monkeypatch, decode, *arguments, "--manifest", run_dir / "none.jsonl")


def test_nothing_decodable_is_an_error(run_dir, tmp_path, monkeypatch):
    only_bad = run_dir / "bad.jsonl"
    only_bad.write_text(json.dumps({"id": "broken", "path": "broken.wav", "text": "one"}) + "\n")
    with pytest.raises(ValueError, match=r"holds no utterance that can be decoded \(1 set aside\)"):
        call(monkeypatch, decode, *decode_arguments(run_dir, tmp_path), "--manifest", only_bad)


def test_default_left_context_is_the_longest_finite_one_of_training(run_dir):
    config = load_model(run_dir / "student")[1]
    assert config.context.left_chunks == (4, 8, 16, -1)
    assert default_left_context_ms(config, 320) == 5120


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("method", METHODS)
def test_streamed_chunks_decode_as_the_masked_whole_utterance(run_dir, model, method):
    net, config, tokenizer = load_model(run_dir / model)
    net.double()
    options = DecodingOptions(mode="streaming", method=method, left_context_ms=640)
    search = build_search(TorchEngine(net), options, tokenizer.unk_id)
    batches = list(decode_batches(run_dir / "test.jsonl", config, max_seconds=30.0))
    features, lens = batches[-1].features.double(), batches[-1].feature_lens
    whole = decode_batch(net, search, features, lens, options)
    with torch.inference_mode():
        encoder_state, rows = net.encoder.initial_state(len(lens), 16), [search.join() for _ in lens]
        for start in range(0, features.shape[1], 32):
            chunk_lens = (lens - start).clamp(0, 32)
            out, encoder_state = net.encoder.forward_chunk(features[:, start : start + 32], encoder_state, chunk_lens)
            search.advance(rows, net.joiner.project_encoder(out).numpy(), chunk_lens.numpy() // 4)
    streamed = search.results(rows)
    assert any(hypothesis.tokens for hypothesis in whole)
    for one, other in zip(whole, streamed, strict=True):
        assert (one.tokens, one.timestamps) == (other.tokens, other.timestamps)
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-9)


def test_latency_times_all_models_in_one_run(run_dir, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.json"
    call(
        monkeypatch, latency, "--exp-dir", run_dir / "teacher", run_dir / "student", "--num-chunks", 12,
        "--manifest", run_dir / "test.jsonl", "--num-utterances", 0, "--no-memory", "--out", rows,
        "--config", run_dir / "student" / "config.yaml",
        "--config", "model.d_model=16", run_dir / "teacher" / "config.yaml",
    )  # fmt: skip
    written = json.loads(rows.read_text())
    assert [row["model"] for row in written] == ["teacher", "student", "config", "config"]
    assert [row["weights"] for row in written] == ["trained", "trained", "random", "random"]
    for row in written:
        assert 0 < row["chunk_compute_ms_p50"] <= row["chunk_compute_ms_p95"] <= row["chunk_compute_ms_p99"]
        assert row["rtf"] > 0 and row["threads"] == 1 and row["num_chunks"] == 12 and row["left_context_ms"] == 5120
    assert all(0 < row["symbols_per_second"] <= 3.2 for row in written[2:])  # one of ten frames
    for name, row in zip(("teacher", "student"), written, strict=False):
        assert json.loads((run_dir / name / "latency.json").read_text()) == row
    assert capsys.readouterr().out.count("\n| ") == 2 + 4  # header, rule and rows


def test_latency_measures_delays_in_every_mode(run_dir, tmp_path, monkeypatch, capsys):
    manifest, rows = run_dir / "test.jsonl", tmp_path / "rows.json"
    models = [run_dir / "teacher", run_dir / "student"]
    arguments = ["--exp-dir", *models, "--manifest", manifest, "--num-chunks", 3, "--out", rows]
    call(monkeypatch, latency, *arguments)
    for row in json.loads(rows.read_text()):
        about = row["delays"]
        assert about["reference"] == "model-relative" and row["look_ahead_ms"] == 640
        assert (about["num_utterances"], about["num_left_out"]) == (3, 1)  # one has no words
        assert list(about["modes"]) == list(STREAMING_MODES)
        for found in about["modes"].values():
            assert found["final_compute_ms_p50"] > 0
        assert row["peak_memory_mb"] is None or 0 < row["peak_memory_mb"] < row["process_memory_mb"]
    assert "model-relative" in capsys.readouterr().out
    ctm = tmp_path / "words.ctm"
    ctm.write_text("utt-0 1 0.1 0.2 one\nutt-0 1 0.4 0.2 two\nutt-1 1 0.1 0.2 four\nelse 1 0 1 x\n")
    call(monkeypatch, latency, *arguments, "--no-memory", "--alignment", ctm)
    for row in json.loads(rows.read_text()):
        about = row["delays"]
        assert about["reference"] == "words.ctm" and "peak_memory_mb" not in row
        assert (about["num_utterances"], about["num_left_out"], about["num_reference_words"]) == (1, 3, 2)
        assert about["silence_at_end_ms_mean"] == 700.0
    ctm.write_text("else 1 0 1 x\n")
    with pytest.raises(ValueError, match="words.ctm fits no utterance"):
        call(monkeypatch, latency, *arguments, "--no-memory", "--alignment", ctm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-utterances", -1], "--num-utterances must be at least 0, got -1"),
        (["--alignment", __file__], "--alignment needs --exp-dir, --manifest and --num-utterances above 0"),
        (["--left-context-ms", 0], r"--left-context-ms must be a positive multiple of 40 ms, got 0"),
        (["--look-ahead-ms", 500], r"--look-ahead-ms must be a positive multiple of 40 ms, got 500"),
        (["--look-ahead-ms", 480], r"--look-ahead-ms must be a multiple of --chunk-ms \(320\), got 480"),
    ],
)
def test_wrong_options_of_latency_are_usage_errors(run_dir, monkeypatch, options, message):
    with pytest.raises(ConfigError, match=message):
        call(monkeypatch, latency, "--exp-dir", run_dir / "student", *options)


def test_latency_needs_a_model(monkeypatch):
    with pytest.raises(ConfigError, match="name at least one model"):
        call(monkeypatch, latency)
    with pytest.raises(ConfigError, match="--chunk-ms must be a positive multiple of 40 ms, got 100"):
        call(monkeypatch, latency, "--config", "model.d_model=16", "--chunk-ms", 100)
