"""The check of a server among bad clients, for half a minute; that it can fail."""

import asyncio

import pytest

from cascade.server.realtime import Realtime
from tests.server.fake import CHUNK, RATE, speech
from tests.server.harness import run
from tests.tiny_run import make_manifest, make_model_dir
from tools import check_server, visitors


@pytest.mark.slow
def test_good_clients_get_their_texts_among_bad_ones_and_nothing_is_held(tmp_path, capsys):
    make_model_dir(tmp_path / "student", epochs=1)
    make_manifest(tmp_path)
    (tmp_path / "broken.wav").unlink()
    assert check_server.check(tmp_path / "student", [tmp_path], 30.0, 20.0, seed=1) == []
    assert " visits (" in capsys.readouterr().out


def visit(client, kind: str):
    """One visit, to be awaited, of the fake recogniser's server; raises what the visitor raises."""

    async def go():
        recordings = [(speech(1, 2, 3), "w1 w2 w3"), (speech(4, 5), "w4 w5")]
        async with visitors.Visitors(f"http://{client.host}:{client.port}", recordings, seed=0) as guests:
            await getattr(guests, kind)()

    return go()


@pytest.fixture
def fake_rate(monkeypatch):
    monkeypatch.setattr(visitors, "RATE", RATE)
    monkeypatch.setattr(visitors, "PACKET", CHUNK)


def test_a_text_of_another_client_is_found(monkeypatch, fake_rate):
    say = Realtime.tell
    monkeypatch.setattr(Realtime, "tell", lambda self, result: (
        event.replace("w4 w5", "w1 w2 w3") if "completed" in event else event for event in say(self, result)
    ))  # fmt: skip

    async def test(client, server):
        with pytest.raises(visitors.Wrong, match="the text of another"):
            await visit(client, "realtime")

    run(test)


def test_memory_that_grows_is_seen_and_a_steady_one_is_none():
    assert check_server.growth([100.0, 180.0, *[200.0] * 58]) < 1
    assert check_server.growth([100.0 + second for second in range(60)]) > 20


def test_a_silent_client_that_is_not_sent_away_is_found(monkeypatch, fake_rate):
    monkeypatch.setattr(visitors, "PATIENCE", 1.0)

    async def test(client, server):
        with pytest.raises(TimeoutError):
            await visit(client, "silent")
        await asyncio.sleep(0.1)

    run(test, idle=60.0)
