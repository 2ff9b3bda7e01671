"""Who is let in, what clients may cost, and how connections end."""

import asyncio
import contextlib
import json
import logging
import time

import pytest
from aiohttp import WSMsgType, WSServerHandshakeError

from cascade.config.options import ConfigError
from cascade.server import app, worker
from cascade.server.security import open_certificate, read_api_keys
from tests.server.fake import FakeRecognizer, speech
from tests.server.harness import of_kind, open_realtime, run, until
from tests.server.test_transcriptions import post, wav

COMMIT = {"type": "input_audio_buffer.commit"}


async def end_of(socket) -> tuple[int, list[dict]]:
    """The close code, and the events before it."""
    events = []
    while (message := await socket.receive()).type is WSMsgType.TEXT:
        events.append(json.loads(message.data))
    return socket.close_code, events


def test_a_full_server_refuses_before_the_upgrade_and_takes_the_next_when_one_has_gone():
    async def test(client, server):
        sockets = [await open_realtime(client) for _ in range(2)]
        for path in ("/", "/v1/realtime"):
            with pytest.raises(WSServerHandshakeError) as refused:
                await client.ws_connect(path)
            assert refused.value.status == 503 and refused.value.headers["Retry-After"]
        assert (await post(client, wav(1)))[0] == 503
        await sockets[0].close()
        while server.num_streams == 2:
            await asyncio.sleep(0.01)
        socket = await open_realtime(client)
        metrics = await (await client.get("/metrics")).text()
        assert "cascade_streams 2\n" in metrics and "cascade_rejected_total 3\n" in metrics
        await socket.close()
        await sockets[1].close()

    run(test, max_streams=2)


def test_a_slower_recogniser_is_given_fewer_streams():
    slow, fast = (worker.measure_capacity(FakeRecognizer(seconds)) for seconds in (0.05, 0.001))
    assert 1 <= slow <= 3 < fast

    async def test():
        measured = worker.Worker(lambda: FakeRecognizer(seconds=0.05))
        await measured.start()
        assert 1 <= measured.max_streams <= 3
        measured.stop()

    asyncio.run(test())


def test_openai_s_list_of_models_names_the_one_that_is_served():
    async def test(client, server):
        answer = await (await client.get("/v1/models")).json()
        [model] = answer["data"]
        assert answer["object"] == "list" and model["object"] == "model" and isinstance(model["created"], int)
        async with client.ws_connect("/v1/realtime") as socket:
            session = (await socket.receive_json())["session"]
        assert model["id"] == session["audio"]["input"]["transcription"]["model"]

    run(test)


def test_probes_say_how_full_the_server_is_and_that_it_goes_down():
    async def test(client, server):
        assert await (await client.get("/health")).json() == {"status": "ok"}
        assert await (await client.get("/ready")).json() == {"ready": True, "streams": 0, "max_streams": 8}
        await server.drain()
        assert (await client.get("/ready")).status == 503 and (await client.get("/health")).status == 200
        assert (await post(client, wav(1)))[0] == 503

    run(test)


@pytest.mark.parametrize("how", ["vanish", "close", "refuse to read"])
def test_a_client_that_goes_in_any_way_leaves_no_slot_and_no_stream(how):
    async def test(client, server):
        for _ in range(3):
            socket = await open_realtime(client)
            await socket.send_bytes(speech(*range(1, 90)).tobytes())
            if how == "vanish":
                socket._response.connection.transport.abort()
            elif how == "close":
                await socket.close()
            else:  # the whole process of a client hangs: only the idle limit can know
                socket._response.connection.transport.pause_reading()
                while server.num_streams:
                    await asyncio.sleep(0.01)
                socket._response.connection.transport.abort()

    run(test, idle=2.0)  # and run() waits until none is left


def test_a_handshake_that_fails_leaves_no_slot():
    async def test(client, server):
        for headers in ({"Upgrade": "websocket"}, {"Upgrade": "websocket", "Connection": "upgrade"}, {}):
            assert (await client.get("/v1/realtime", headers=headers)).status in (400, 426)
        assert server.num_streams == 0

    run(test, max_streams=1)


def test_audio_waits_in_the_socket_while_the_queue_is_full(monkeypatch):
    monkeypatch.setattr(worker, "QUEUE_SECONDS", 0.5)
    recognizer = FakeRecognizer(seconds=0.005)

    async def test(client, server):
        socket = await open_realtime(client)
        (session,) = server._worker._sessions
        most = 0.0
        for number in range(1, 101):
            await socket.send_bytes(speech(number % 7 + 1).tobytes())
            await asyncio.sleep(0)
            most = max(most, session._waiting)
        await socket.send_json(COMMIT)
        text = (await until(socket, ".completed"))[-1]["transcript"]
        assert text == " ".join(f"w{number % 7 + 1}" for number in range(1, 101)) and most <= 0.6
        await socket.close()

    run(test, recognizer=recognizer)


def test_texts_that_a_slow_reader_has_not_fetched_become_one():
    async def test(client, server):
        with server._worker.session() as session:
            for number in range(1, 30):
                await session.push(speech(number), 1000)
                await asyncio.sleep(0.002)
            while session._waiting > 1e-6:
                await asyncio.sleep(0.01)
            assert len(session._outbox) == 1
            session.end(is_last=True)
            results = [result async for result in session.results()]
            assert len(results) <= 3 and results[-1].text.endswith("w29")  # one may be under way

    run(test)


def test_a_server_that_does_not_keep_up_sends_its_client_away(monkeypatch):
    monkeypatch.setattr(worker, "OVERLOAD_SECONDS", 0.1)
    monkeypatch.setattr(worker, "QUEUE_SECONDS", 0.1)
    recognizer = FakeRecognizer()

    async def test(client, server):
        recognizer.seconds = 0.3
        socket = await open_realtime(client)
        for _ in range(4):
            await socket.send_bytes(speech(1).tobytes())
        code, events = await end_of(socket)
        assert code == app.TRY_AGAIN and of_kind(events, ".completed")

    run(test, recognizer=recognizer)


def test_idle_and_long_connections_end_with_their_last_words():
    async def test(client, server):
        idle, long = [await open_realtime(client, include=["cascade.partial"]) for _ in range(2)]
        await idle.send_bytes(speech(1, 2).tobytes())
        await long.send_bytes(speech(3, 4, 5).tobytes())
        await long.send_bytes(speech(6, 7, 8).tobytes())
        ends = await asyncio.gather(end_of(idle), end_of(long))
        for (code, events), text in zip(ends, ("w1 w2", "w3 w4 w5"), strict=True):
            assert code == app.TOO_MUCH and of_kind(events, ".completed")[-1]["transcript"] == text
            assert not of_kind(events, "cascade.finished")  # which answers a commit

    run(test, idle=2.0, longest=0.5)


def test_a_client_that_waits_for_its_text_is_not_idle():
    recognizer = FakeRecognizer()

    async def test(client, server):
        recognizer.seconds = 1.5  # not of the measurement at the start
        socket = await open_realtime(client)
        for word in (1, 2):
            await socket.send_bytes(speech(word).tobytes())
            await socket.send_json(COMMIT)
            assert (await until(socket, ".completed"))[-1]["transcript"] == f"w{word}"
        assert (await end_of(socket))[0] == app.TOO_MUCH

    run(test, recognizer=recognizer, idle=0.5)


def test_what_came_while_the_server_stood_still_counts():
    async def test(client, server):
        socket = await open_realtime(client)
        for word in range(1, 4):
            await socket.send_bytes(speech(word).tobytes())
            time.sleep(0.8)  # of the event loop, which is the server's too
            await asyncio.sleep(0.1)
        await socket.send_json(COMMIT)
        assert (await until(socket, ".completed"))[-1]["transcript"] == "w1 w2 w3"
        await socket.close()

    run(test, idle=0.5)


def test_pings_do_not_keep_a_silent_connection():
    async def test(client, server):
        socket = await open_realtime(client)

        async def ping():
            while not socket.closed:
                await socket.ping()
                await asyncio.sleep(0.05)

        pinging = asyncio.create_task(ping())
        assert (await end_of(socket))[0] == app.TOO_MUCH
        pinging.cancel()

    run(test, idle=2.0)


def test_a_message_that_is_too_large_ends_its_connection_only():
    async def test(client, server):
        other, socket = await open_realtime(client), await open_realtime(client)
        with contextlib.suppress(ConnectionError):  # it ends before all of it is sent
            await socket.send_bytes(bytes(app.MESSAGE_BYTES + 2))
        assert (await end_of(socket))[0] in (1006, 1009)
        while server.num_streams == 2:
            await asyncio.sleep(0.01)
        await other.send_bytes(speech(1).tobytes())
        await other.send_json(COMMIT)
        assert (await until(other, ".completed"))[-1]["transcript"] == "w1"
        await other.close()

    run(test)


def test_at_the_end_of_the_server_everyone_gets_the_text_of_what_was_heard():
    async def test(client, server):
        talking, pausing = await open_realtime(client), await open_realtime(client)
        sherpa = await client.ws_connect("/")
        await talking.send_bytes(speech(1, 2, 3).tobytes())
        await sherpa.send_bytes(speech(4, 5).astype("<f4").tobytes())
        await until(talking, ".delta")
        while "w5" not in (await sherpa.receive_json())["text"]:
            pass
        await server.drain()
        code, events = await end_of(talking)
        assert code == app.GOING_AWAY and of_kind(events, ".completed")[0]["transcript"] == "w1 w2 w3"
        assert await end_of(pausing) == (app.GOING_AWAY, [])
        final = await sherpa.receive_json()
        assert final["text"] == "w4 w5" and final["is_final"] and await sherpa.receive_str() == "Done!"

    run(test)


def test_an_api_key_opens_all_but_page_and_probes():
    async def test(client, server):
        assert (await client.get("/")).status == (await client.get("/ready")).status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
            response = await client.get("/metrics", headers=headers)
            assert response.status == 401 and (await response.json())["error"]["code"] == "invalid_api_key"
            for path in ("/", "/v1/realtime"):
                with pytest.raises(WSServerHandshakeError) as refused:
                    await client.ws_connect(path, headers=headers)
                assert refused.value.status == 401
        for key in ("first", "second"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.get("/metrics", headers=headers)).status == 200
            await (await client.ws_connect("/v1/realtime", headers=headers)).close()
            protocols = ("realtime", f"openai-insecure-api-key.{key}")
            socket = await client.ws_connect("/v1/realtime", protocols=protocols)
            assert socket.protocol == "realtime"
            await socket.close()

    run(test, keys=(b"first", b"second"))


def test_pages_of_other_origins_are_refused():
    async def test(client, server):
        own = f"http://{client.host}:{client.port}"
        for path in ("/", "/v1/realtime"):
            await (await client.ws_connect(path, headers={"Origin": own})).close()
            for origin in ("http://evil.example", "null", f"http://{client.host}:1", "http://["):
                with pytest.raises(WSServerHandshakeError) as refused:
                    await client.ws_connect(path, headers={"Origin": origin})
                assert refused.value.status == 403
        response = await client.post("/v1/audio/transcriptions", headers={"Origin": "http://evil.example"})
        assert response.status == 403

    run(test)


def test_nothing_but_the_pages_own_files_is_served_and_their_policy_forbids_the_rest():
    async def test(client, server):
        for path, kind in {
            "/": "text/html", "/page.css": "text/css",
            "/page.js": "text/javascript", "/microphone.js": "text/javascript",
        }.items():  # fmt: skip
            response = await client.get(path)
            assert (response.status, response.content_type) == (200, kind)
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert response.headers["Server"] == "cascade"
        for path in ("/index.html", "/app.py", "/..%2fapp.py", "/web/page.js", "/.git/config"):
            assert (await client.get(path)).status == 404
        assert (await client.post("/health")).status == 405

    run(test)


def test_an_error_of_the_server_itself_is_in_its_log_and_not_in_the_answer(monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("secret detail")

    async def test(client, server):
        monkeypatch.setattr(server.metrics, "text", fail)
        response = await client.get("/metrics")
        assert response.status == 500 and "secret" not in await response.text()

    with caplog.at_level(logging.ERROR):
        run(test)
    assert "secret detail" in caplog.text


def test_the_log_holds_no_words(caplog):
    async def test(client, server):
        socket = await open_realtime(client)
        await socket.send_bytes(speech(77).tobytes())
        await socket.send_json(COMMIT)
        await until(socket, ".completed")
        await socket.close()

    with caplog.at_level(logging.DEBUG):
        run(test)
    assert "0.1 s of audio" in caplog.text and "w77" not in caplog.text


def test_key_files_and_certificates_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "keys").write_text("\n one \n\ntwo\n")
    assert read_api_keys(tmp_path / "keys") == [b"one", b"two"]
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(FileNotFoundError, match="--api-key-file .* not found"):
        read_api_keys(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(tmp_path / "empty")
    assert open_certificate(None, None) is None
    with pytest.raises(ConfigError, match="belong together"):
        open_certificate(tmp_path / "keys", None)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_certificate(tmp_path / "keys", tmp_path / "empty")
