"""The benchmark of the server: what a lag is, how the largest number of streams is found, its rows."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

import aiohttp
import numpy as np
import pytest

from tests.server.fake import CHUNK, RATE, FakeRecognizer, speech
from tests.server.harness import run
from tests.tiny_run import make_manifest, tiny_config
from tools import bench_serve
from tools.random_model import make_random_model


def lags_of(monkeypatch, recognizer: FakeRecognizer, samples: np.ndarray) -> bench_serve.Heard:
    monkeypatch.setattr(bench_serve, "RATE", RATE)
    heard = []

    seconds, recognizer.seconds = recognizer.seconds, 0.0  # of the measurement at the start

    async def test(client, server):
        recognizer.seconds = seconds
        url = f"http://{client.host}:{client.port}"
        load = bench_serve.Load(url, [time.monotonic() + 0.2], 1.0, 1000 * CHUNK // RATE, [samples])
        async with aiohttp.ClientSession() as web:
            heard.append(await bench_serve.Client(load, 0).talk(web))

    run(test, recognizer=recognizer)
    return heard[0]


@pytest.mark.parametrize("samples", [speech(*[0] * 6), speech(1, 2, 3, 4, 5, 6)], ids=["silence", "speech"])
def test_every_chunk_has_a_lag_whether_or_not_the_text_changes(monkeypatch, samples):
    heard = lags_of(monkeypatch, FakeRecognizer(), samples)
    assert (len(heard.lags), len(heard.finals), heard.errors) == (12, 2, [])  # two turns of six chunks
    assert all(lag > 0 for lag in heard.lags)


def test_the_time_of_decoding_is_in_lags_and_finals(monkeypatch):
    heard = lags_of(monkeypatch, FakeRecognizer(seconds=0.08), speech(1, 2, 3, 4, 5))
    assert min(heard.lags) > 0.08 and min(heard.finals) > 0.08 and not heard.errors


def test_a_server_that_fails_and_one_that_is_not_there_are_errors(monkeypatch):
    assert any("decoding failed" in error for error in lags_of(monkeypatch, FakeRecognizer(), speech(1, 998)).errors)

    async def nobody() -> bench_serve.Heard:
        load = bench_serve.Load("http://127.0.0.1:9", [time.monotonic()], 1.0, 320, [speech(1)])
        async with aiohttp.ClientSession() as web:
            return await bench_serve.Client(load, 0).talk(web)

    assert len(asyncio.run(nobody()).errors) == 1


@pytest.mark.parametrize("capacity", [0, 1, 2, 9, 33, 240, 1000])
def test_the_search_finds_the_largest_number_of_streams_to_a_sixteenth(capacity):
    rows = []
    while (streams := bench_serve.next_streams(rows, 400.0)) is not None:
        share = 0.02 + 0.8 * streams / max(capacity, 0.5)
        lag = 50.0 if streams <= capacity else 900.0
        rows.append({"streams": streams, "partial_lag_ms_p95": lag, "errors": 0, "cpu_share": min(1.0, share)})
    found = max((row["streams"] for row in rows if row["partial_lag_ms_p95"] < 400), default=0)
    assert capacity - max(1, capacity / 15) < found <= capacity and len(rows) <= 14


def test_a_core_that_seems_full_is_tried_with_a_quarter_more():
    rows = [{"streams": 20, "partial_lag_ms_p95": 145.0, "errors": 0, "cpu_share": 0.97}]
    assert bench_serve.next_streams(rows, 400.0) == 25


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_rows_hold_what_the_interface_names(tmp_path, monkeypatch):
    make_manifest(tmp_path)
    (tmp_path / "broken.wav").unlink()
    samples = np.concatenate(bench_serve.read_turns([tmp_path], limit=4))
    assert 0.05 < make_random_model(tiny_config(), tmp_path / "student", samples) < 0.2
    words = ["bench_serve", "--exp-dir", tmp_path / "student", "--wav", tmp_path, "--seconds", 2, "--streams", 3]
    monkeypatch.setattr(sys, "argv", list(map(str, [*words, "--json", tmp_path / "rows.json"])))
    bench_serve.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    names = {f"{what}_ms_p{share}" for what in ("partial_lag", "final") for share in (50, 95, 99)}
    names |= {"streams", "mode", "engine", "precision", "errors", "cpu_share", "rss_mb"}
    assert names <= set(row) and all(row[name] is not None for name in names)
    assert (row["streams"], row["mode"], row["engine"], row["precision"], row["errors"]) == (
        3, "two_pass", "torch", "float32", 0,
    )  # fmt: skip
    assert row["partial_lag_ms_p50"] <= row["partial_lag_ms_p99"] and row["rss_mb"] > 50 and row["num_finals"] >= 3
