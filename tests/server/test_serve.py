"""Listening, with TLS and without, and the end at a signal while clients speak."""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time

import aiohttp
import pytest

from cascade.config.options import ConfigError
from cascade.server import serve as serve_module
from cascade.server.app import GOING_AWAY, Server
from cascade.server.security import open_certificate
from cascade.server.serve import serve
from cascade.server.worker import Worker
from tests.server.fake import RATE, FakeRecognizer, speech
from tests.server.test_transcriptions import wav

NUM_CLIENTS = 6


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate of 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "c.pem"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "c.pem", folder / "key.pem"


def run_until_signal(caplog, test, tls=None, keys=(), recognizer=None) -> None:
    """`serve` on a free port; `test(web, url)` must bring the signal that ends it."""

    async def main() -> None:
        server = Server(Worker(lambda: recognizer or FakeRecognizer(), 32), list(keys))
        serving = asyncio.create_task(serve(server, "127.0.0.1", 0, tls, bool(keys)))
        while not (url := re.search(r"https?://127\.0\.0\.1:\d+", caplog.text)):
            await asyncio.sleep(0.01)
            assert not serving.done(), serving
        async with aiohttp.ClientSession() as web:
            await test(web, url[0])
        await serving

    with caplog.at_level(logging.INFO):
        asyncio.run(asyncio.wait_for(main(), 60))


def test_with_a_certificate_all_is_encrypted_and_a_key_still_needed(caplog, certificate):
    trusting = ssl.create_default_context(cafile=certificate[0])

    async def test(web, url):
        assert url.startswith("https://")
        async with web.get(url, ssl=trusting) as page:
            assert page.status == 200 and "Speech to text" in await page.text()
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await web.get(url)
        with pytest.raises(aiohttp.ClientError):
            await web.get(url.replace("https", "http"))
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await web.ws_connect(f"{url}/v1/realtime", ssl=trusting)
        assert refused.value.status == 401
        headers = {"Authorization": "Bearer secret"}
        async with web.ws_connect(f"{url}/v1/realtime", ssl=trusting, headers=headers) as socket:
            assert socket.get_extra_info("ssl_object").version() in ("TLSv1.2", "TLSv1.3")
            assert (await socket.receive_json())["type"] == "session.created"
        os.kill(os.getpid(), signal.SIGTERM)

    run_until_signal(caplog, test, open_certificate(*certificate), keys=[b"secret"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_among_speaking_clients_ends_each_with_all_that_was_heard_of_it(caplog, number):
    recognizer = FakeRecognizer(seconds=0.01)

    async def talk(web, url, client, speaking):
        async with web.ws_connect(f"{url}/v1/realtime") as socket:
            session = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": RATE}}}}
            await socket.send_json({"type": "session.update", "session": session})

            async def speak():
                for word in range(1, 100):
                    await socket.send_bytes(speech(100 * client + word).tobytes())
                    await asyncio.sleep(0.05)

            sending, deltas = asyncio.create_task(speak()), ""
            async for message in socket:
                event = json.loads(message.data)
                deltas += event.get("delta", "")
                if len(deltas.split()) == 5:
                    speaking.release()
                if event["type"].endswith(".completed"):
                    break
            assert event["type"].endswith(".completed"), event
            assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE and socket.close_code == GOING_AWAY
            sending.cancel()
            return event["transcript"], deltas

    async def test(web, url):
        speaking = asyncio.Semaphore(0)
        talks = [asyncio.create_task(talk(web, url, client, speaking)) for client in range(1, NUM_CLIENTS + 1)]
        for _ in talks:
            await speaking.acquire()
        os.kill(os.getpid(), number)
        for client, (text, deltas) in enumerate(await asyncio.gather(*talks), 1):
            words = text.split()
            assert words == [f"w{100 * client + place}" for place in range(1, len(words) + 1)] and len(words) > 5
            assert text == deltas
        with pytest.raises(aiohttp.ClientConnectorError):
            await web.get(url)

    run_until_signal(caplog, test, recognizer=recognizer)


def test_a_connection_that_never_makes_a_request_is_cut_and_others_stay(caplog, monkeypatch):
    monkeypatch.setattr(serve_module, "REQUEST_SECONDS", 0.4)

    async def test(web, url):
        port = int(url.rpartition(":")[2])
        async with web.ws_connect(f"{url}/v1/realtime") as socket:
            assert (await socket.receive_json())["type"] == "session.created"
            for sent in (b"", b"GET / HTTP/1.1\r\nHo"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), 10) == b""
                writer.close()
            await socket.send_json({"type": "session.update", "session": {}})
            assert (await socket.receive_json())["type"] == "session.updated"
        os.kill(os.getpid(), signal.SIGTERM)

    run_until_signal(caplog, test)


@pytest.mark.parametrize("stream", ["false", "true"])
def test_an_upload_whose_client_goes_while_it_is_decoded_leaves_its_slot(caplog, stream):
    recognizer = FakeRecognizer()

    async def test(web, url):
        recognizer.seconds = 0.05
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("stream", stream)
        form.add_field("file", wav(*range(1, 900)), filename="x.wav")
        sending = asyncio.create_task(web.post(f"{url}/v1/audio/transcriptions", data=form))
        while not recognizer.streams:
            await asyncio.sleep(0.01)
        sending.cancel()
        if stream == "true" and sending.done():
            sending.result().close()
        before = time.monotonic()
        while (await (await web.get(f"{url}/ready")).json())["streams"]:
            await asyncio.sleep(0.05)
        assert time.monotonic() - before < 10.0  # all of it takes 45 s
        os.kill(os.getpid(), signal.SIGTERM)

    run_until_signal(caplog, test, recognizer=recognizer)


def test_a_port_that_is_taken_and_a_host_that_is_elsewhere_are_named():
    async def listen(host, port):
        await serve(Server(Worker(FakeRecognizer, 1), []), host, port, None, False)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port} cannot be .*: .*in use"):
            asyncio.run(listen("127.0.0.1", port))
    with pytest.raises(ConfigError, match="--host 192.0.2.1 --port 0 cannot be"):
        asyncio.run(listen("192.0.2.1", 0))
