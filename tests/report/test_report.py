import json
import math
import re
import shutil

import pytest

from cascade.report.collect import MODELS, collect, ratio, write_rows
from cascade.report.markdown import table, write_report
from cascade.report.plots import draw_plots
from cascade.search.methods import METHODS

PARAMS = {"teacher": 4_000_000, "student_alone": 2_000_000, "student": 2_000_000}
WER = {"teacher": 10.0, "student_alone": 14.0, "student": 11.0}
KEYS = (
    "model mode method test_set wer cer num_words errors ins del sub num_params num_params_training size_bytes "
    "chunk_ms look_ahead_ms left_context_ms beam chunk_compute_ms_p50 chunk_compute_ms_p95 chunk_compute_ms_p99 "
    "rtf threads seed train_minutes commit command"
).split()


def result(model, mode, method):
    wer = WER[model] + {"streaming": 4.0, "look_ahead": 2.0, "full": 0.0}[mode] - 0.5 * (method != "greedy_search")
    return {
        "model": model, "mode": mode, "method": method, "test_set": "test", "wer": wer, "cer": wer / 2,
        "num_words": 773, "errors": 80, "ins": 20, "del": 30, "sub": 30, "num_utterances": 130, "num_set_aside": 0,
        "num_params": PARAMS[model], "num_params_training": 9000, "size_bytes": 4 * PARAMS[model],
        "params_by_part": {"front end": 1000, "causal encoder": PARAMS[model] - 1000, "total": PARAMS[model]},
        "chunk_ms": 320, "look_ahead_ms": 640 if mode == "look_ahead" else None, "left_context_ms": 5120,
        "beam": None if method == "greedy_search" else 4, "blank_penalty": 0.0,
        "chunk_compute_ms_p50": None, "chunk_compute_ms_p95": None,
        "chunk_compute_ms_p99": None, "rtf": None, "threads": 2, "seed": 1, "train_minutes": None, "commit": "abc",
        "command": f"python -m cascade.bin.decode --exp-dir exp/{model}", "machine": "a machine",
    }


def timed(model):
    speed = PARAMS[model] / 1e6
    return {
        "model": model, "chunk_ms": 320, "left_context_ms": 5120, "blank_penalty": 0.0, "chunk_compute_ms_p50": speed,
        "chunk_compute_ms_p95": 1.2 * speed, "chunk_compute_ms_p99": 1.5 * speed, "rtf": speed / 320,
        "num_chunks": 300, "symbols_per_second": 2.5, "features": "noise", "threads": 1, "commit": "abc",
        "num_params": PARAMS[model], "command": "python -m cascade.bin.latency", "machine": "a machine",
    }


@pytest.fixture
def exp_dir(tmp_path):
    for model in MODELS:
        for mode in ("streaming", "look_ahead", "full"):
            for method in ("greedy_search", "modified_beam_search"):
                folder = tmp_path / model / "decode" / f"{mode}-{method}"
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps(result(model, mode, method)))
        (tmp_path / model / "latency.json").write_text(json.dumps(timed(model)))
        summary = {"train_minutes": 12.5, "seed": 7, "commit": "abc", "command": "train", "machine": "a machine"}
        (tmp_path / model / "train_summary.json").write_text(json.dumps(summary))
        points = []
        for step in range(20, 1001, 20):
            loss = 3 * math.exp(-step / (300 if model == "teacher" else 400)) + 0.2
            point = {"step": step, "epoch": step // 100, "split": "train", "causal_pruned": loss * 1.1}
            points.append(point | {"noncausal_pruned": loss})
            if step % 100 == 0:
                points.append(points[-1] | {"split": "dev", "causal_pruned": loss + 0.1})
        lines = "".join(json.dumps(point) + "\n" for point in points)
        (tmp_path / model / "losses.jsonl").write_text(lines + '{"step": 1001, "spl')
    return tmp_path


def test_rows_have_every_key_and_join_training_and_timing(exp_dir):
    experiment = collect(exp_dir)
    write_rows(experiment.rows, exp_dir / "results.json")
    rows = json.loads((exp_dir / "results.json").read_text())
    assert len(rows) == 18 and experiment.missing == []
    assert all(key in row for row in rows for key in KEYS)
    assert all((row["seed"], row["train_minutes"]) == (7, 12.5) for row in rows)
    for row in rows:
        streaming_greedy = (row["mode"], row["method"]) == ("streaming", "greedy_search")
        assert (row["rtf"] is not None) == (row["chunk_compute_ms_p50"] is not None) == streaming_greedy


def test_ratios_are_student_over_teacher(exp_dir):
    experiment = collect(exp_dir)
    assert ratio(experiment, "num_params", "full", "greedy_search") == 0.5
    assert ratio(experiment, "wer", "full", "greedy_search") == pytest.approx(1.1)
    assert ratio(experiment, "chunk_compute_ms_p50", "streaming", "greedy_search") == 0.5
    assert ratio(experiment, "rtf", "full", "greedy_search") is None


@pytest.mark.parametrize("other", [{"chunk_ms": 640}, {"blank_penalty": 0.5}])
def test_timing_of_another_chunk_or_search_is_not_joined(exp_dir, other):
    path = exp_dir / "student" / "latency.json"
    path.write_text(json.dumps(timed("student") | {"look_ahead_ms": 640, "delays": delays()} | other))
    row = collect(exp_dir).find("student", "streaming", "greedy_search")
    assert row["rtf"] is None and "word_delay_ms_p50" not in row


def test_rows_with_a_language_model_stand_apart(exp_dir):
    plain = collect(exp_dir)
    aided = {"ngram": "lm.arpa.gz", "lm_scale": 0.3, "lodr_scale": 0.2, "hotwords": None}
    for mode, method, more in (("streaming", "greedy_search", {}), ("full", "modified_beam_search", {"rescore": True})):
        folder = exp_dir / "student" / "decode" / "a-lm" / f"{mode}-{method}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result("student", mode, method) | aided | {"wer": 3.21} | more))
    experiment = collect(exp_dir)
    assert len(experiment.rows) == len(plain.rows) + 2 and not experiment.missing
    assert all(experiment.find(row["model"], row["mode"], row["method"]) == row for row in plain.rows)
    assert [row["rtf"] for row in experiment.rows if row["wer"] == 3.21] == [None, None]
    text = write_report(experiment, "an4", [])
    section = text[text.index("## With scores from outside") :].split("\n## ")[0]
    lines = [re.sub(r" +", " ", line) for line in section.splitlines()]
    assert any("greedy_search | lm.arpa.gz | - | 0.30 | 0.20 | - | 15.00 | 3.21 |" in line for line in lines)
    assert any("modified_beam_search, rescoring | lm.arpa.gz" in line and "| 10.50 | 3.21 |" in line for line in lines)
    assert write_report(plain, "an4", []).count("With scores from outside") == 0
    before = text[: text.index("## With scores from outside")]
    assert before == write_report(plain, "an4", [])[: len(before)]


def test_folders_of_several_test_sets_are_all_collected(exp_dir):
    for path in list((exp_dir / "student" / "decode").iterdir()):
        other = exp_dir / "student" / "decode" / "other" / path.name
        shutil.copytree(path, other)
        row = json.loads((other / "result.json").read_text()) | {"test_set": "test-other"}
        (other / "result.json").write_text(json.dumps(row))
    rows = collect(exp_dir).rows
    assert sorted(row["test_set"] for row in rows if row["model"] == "student") == ["test"] * 6 + ["test-other"] * 6


def write_result(folder, row):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(row))


def test_a_second_result_of_the_same_search_takes_no_published_ones_place(exp_dir):
    write_result(exp_dir / "student" / "decode" / "chunk1280", result("student", "full", "greedy_search") | {"wer": 55})
    with pytest.raises(ValueError, match=r"chunk1280/result.json and .*full-greedy_search/result.json are both of st"):
        collect(exp_dir)


def test_a_set_that_one_model_was_tried_on_changes_no_claim(exp_dir):
    before = collect(exp_dir)
    row = result("student", "full", "greedy_search") | {"test_set": "dev"}
    write_result(exp_dir / "student" / "decode" / "dev", row)
    after = collect(exp_dir)
    assert after.test_set == "test" and after.missing == before.missing
    assert ratio(after, "wer", "full", "greedy_search") == ratio(before, "wer", "full", "greedy_search") is not None
    assert "Error rates are those on `test`" in write_report(after, "an4", [])


@pytest.mark.parametrize("text", [b"{}", b'{"mode": "two", "method": "greedy_search"}', b"\xff{}"])
def test_a_file_that_is_no_result_is_named(text, exp_dir):
    (exp_dir / "student" / "decode" / "full-greedy_search" / "result.json").write_bytes(text)
    with pytest.raises(ValueError, match="full-greedy_search/result.json is damaged"):
        collect(exp_dir)


def test_report_shows_claims_tables_and_commands(exp_dir):
    (exp_dir / "latency_full_size.json").write_text(json.dumps([timed("teacher"), timed("student")]))
    text = write_report(collect(exp_dir), "an4", [("Loss", "plots/loss.png")])
    assert "Incomplete" not in text
    assert "one error is 0.13 points" in text
    for needle in (" 0.500 |", " 1.100 |", "![Loss](plots/loss.png)", "`python -m cascade.bin.decode --exp-dir exp/"):
        assert needle in text, needle
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_character_tokens_bring_the_character_error_rate_into_every_table(exp_dir):
    assert "Character" not in write_report(collect(exp_dir), "an4", [])
    for path in exp_dir.glob("*/decode/*/result.json"):
        row = json.loads(path.read_text()) | {"token_kind": "char", "num_characters": 2000}
        path.write_text(json.dumps(row))
    text = write_report(collect(exp_dir), "zh", [])
    assert text.index("## Character error rate") < text.index("## Word error rate")
    assert "130 utterances, 2000 characters, one error is 0.05 points" in text
    assert re.search(r"CER, streaming, greedy search, % +\| about 1 +\| +7.00 +\| +7.50 +\| +1.071 \|", text)


def delays():
    """What latency.json says of delays, as its program writes it."""
    modes = {}
    for number, mode in enumerate(("streaming", "look_ahead", "full", "two_pass"), start=1):
        wait = {"streaming": 327.5, "look_ahead": 647.5, "full": None, "two_pass": 327.5}[mode]
        found = {"algorithmic_delay_ms_mean": wait and wait - 160, "algorithmic_delay_ms_max": wait}
        for kind in ("emission", "word", "final", "endpoint"):
            found |= {f"{kind}_delay_ms_{key}": 100.0 * number for key in ("mean", "p50", "p90")}
        for kind in ("emission", "word"):
            found[f"{kind}_delay_ms_quantiles"] = [50.0 * number * place / 10 for place in range(21)]
        times = {"step_compute_ms_p50": 3.0, "final_compute_ms_p50": 4.0}
        modes[mode] = found | times | {"num_correct_words": 90}
    return {
        "reference": "true", "num_utterances": 100, "num_left_out": 0, "audio_seconds": 240.0, "num_words": 110,
        "num_reference_words": 112, "silence_at_end_ms_mean": 612.0, "num_changed_words": 11,
        "changed_words_percent": 10.0, "changed_by_look_ahead": 6, "changed_by_full": 5, "flicker_per_minute": 2.75,
        "modes": modes,
    }


def test_delays_join_the_rows_of_their_mode_and_the_report(exp_dir):
    for model in ("teacher", "student"):
        row = timed(model) | {"look_ahead_ms": 640, "peak_memory_mb": 20.0, "process_memory_mb": 220.0}
        (exp_dir / model / "latency.json").write_text(json.dumps(row | {"delays": delays()}))
    experiment = collect(exp_dir)
    for number, mode in enumerate(("streaming", "look_ahead", "full"), start=1):
        row = experiment.find("student", mode, "greedy_search")
        assert row["word_delay_ms_p50"] == 100.0 * number and row["delay_reference"] == "true"
        assert ("flicker_per_minute" in row) == ("peak_memory_mb" in row) == (mode == "streaming")
        assert not any(key.endswith("quantiles") for key in row)
        for other in (
            experiment.find("student", mode, "modified_beam_search"), experiment.find("student_alone", mode, METHODS[0])
        ):
            assert "word_delay_ms_p50" not in other
    text = " ".join(write_report(experiment, "an4", []).split())
    for needle in ("## Delays, ms", "the corpus says when its words end", "| the utterance |", "2.75 a minute", "| 20"):
        assert needle in text, needle
    assert "plots/delay.png" in [path for _, path in draw_plots(experiment, exp_dir)]


@pytest.mark.filterwarnings("error")
def test_a_model_without_a_correct_word_still_has_a_picture(exp_dir):
    nothing = delays()
    for found in nothing["modes"].values():
        found.update({key: [] if key.endswith("quantiles") else None for key in found if "_delay_ms_" in key})
    row = timed("student") | {"look_ahead_ms": 640, "delays": nothing}
    (exp_dir / "student" / "latency.json").write_text(json.dumps(row))
    assert "plots/delay.png" in [path for _, path in draw_plots(collect(exp_dir), exp_dir)]


def test_delays_of_another_block_are_not_joined(exp_dir):
    row = timed("student") | {"look_ahead_ms": 1280, "delays": delays()}
    (exp_dir / "student" / "latency.json").write_text(json.dumps(row))
    experiment = collect(exp_dir)
    found = {mode: experiment.find("student", mode, "greedy_search") for mode in ("streaming", "look_ahead", "full")}
    assert [mode for mode, row in found.items() if "word_delay_ms_p50" in row] == ["streaming", "full"]


def test_missing_pieces_are_named_with_their_stage(exp_dir):
    (exp_dir / "student" / "latency.json").unlink()
    (exp_dir / "student" / "train_summary.json").unlink()
    (exp_dir / "teacher" / "decode" / "full-greedy_search" / "result.json").unlink()
    experiment = collect(exp_dir)
    assert experiment.missing == [
        "student has not finished training: run stage 5",
        "student has not been timed: run stage 7",
        "teacher has not been decoded with full greedy_search: run stage 6",
    ]
    text = write_report(experiment, "an4", draw_plots(experiment, exp_dir))
    assert "**Incomplete.**" in text and "student has not been timed: run stage 7" in text


@pytest.mark.parametrize("there", MODELS)
def test_one_model_alone_is_reported(exp_dir, there):
    for model in set(MODELS) - {there}:
        shutil.rmtree(exp_dir / model)
    experiment = collect(exp_dir)
    text = write_report(experiment, "an4", draw_plots(experiment, exp_dir))
    assert len(experiment.rows) == 6 and f"{WER[there]:.1f}" in text and "**Incomplete.**" in text


def test_no_result_at_all_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="run stage 6"):
        collect(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such experiment directory"):
        collect(tmp_path / "nowhere")


def test_damaged_file_is_named(exp_dir):
    (exp_dir / "student" / "latency.json").write_text("{")
    with pytest.raises(ValueError, match=r"student/latency.json is damaged"):
        collect(exp_dir)


def test_plots_are_written_as_png(exp_dir):
    for _, path in draw_plots(collect(exp_dir), exp_dir):
        assert (exp_dir / path).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (exp_dir / "plots").iterdir()} == {"loss.png", "wer.png"}


def test_undefined_error_rate_shows_as_a_dash(exp_dir):
    path = exp_dir / "student" / "decode" / "full-greedy_search" / "result.json"
    path.write_text(json.dumps(result("student", "full", "greedy_search") | {"wer": None, "cer": None}))
    experiment = collect(exp_dir)
    assert ratio(experiment, "wer", "full", "greedy_search") is None
    draw_plots(experiment, exp_dir)
    assert "-" in write_report(experiment, "an4", [])


def test_table_columns_line_up():
    lines = table(["name", "value"], [["a", "1.00"], ["longer", "10.00"]]).splitlines()
    assert lines == ["| name   | value |", "| ------ | ----: |", "| a      |  1.00 |", "| longer | 10.00 |"]


def test_what_int8_costs_stands_in_the_report(exp_dir):
    row = {
        "part": "encoder-streaming.onnx", "mode": "streaming", "num_words": 773, "wer_float32": 9.573, "wer": 9.702,
        "errors_float32": 74, "errors": 75, "del_float32": 20, "del": 21, "equal_tokens_percent": 99.41,
        "within_limit": True,
    }
    int8 = {
        "weight_bits": 8, "test_set": "test", "limit_percent": 2.0, "rows": [row],
        "files": {"encoder-streaming.onnx": "encoder-streaming.int8.onnx"}, "float32": {"joiner.onnx": "9 word errors"},
    }
    about = {
        "int8": int8, "command": "python -m cascade.bin.export_onnx --int8", "commit": "abc", "machine": "a machine",
        "bytes": {"encoder-streaming.onnx": 4_000_000, "encoder-streaming.int8.onnx": 1_200_000},
    }
    assert "## int8" not in write_report(collect(exp_dir), "test", [])
    (exp_dir / "student" / "export").mkdir()
    (exp_dir / "student" / "export" / "export.json").write_text(json.dumps(about))
    text = write_report(collect(exp_dir), "test", [])
    assert "student: encoder-streaming.int8.onnx 1.20 MB (0.30)" in text
    assert "joiner.onnx stays float32: 9 word errors." in text and "`python -m cascade.bin.export_onnx --int8`" in text
    cells = ["encoder-streaming.onnx", "streaming", "9.57", "9.70", "1", "20", "21", "99.41", "yes"]
    assert cells in [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
