"""The clients of tools/check_server.py: good ones, and every kind of bad one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import aiohttp
import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bench_serve import RATE  # noqa: E402

IDLE, UPLOAD_MB, MAX_STREAMS = 6.0, 2, 64
"""Of the server: short and small, so that every limit is met often."""
PATIENCE = 60.0
"""Seconds in which the server must answer or close."""
PACKET = RATE // 10


class Wrong(Exception):
    """The server did not do what it must."""


class Visitors:
    """All kinds of clients. `recordings` are (samples, the text that the model says of them)."""

    def __init__(self, url: str, recordings: Sequence[tuple[np.ndarray, str]], seed: int) -> None:
        self.url, self.recordings, self.rng = url, recordings, random.Random(seed)
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        self.good: list[Callable[[], Awaitable[None]]] = [self.realtime, self.sherpa, self.upload]
        self.bad: list[Callable[[], Awaitable[None]]] = [
            self.silent, self.deaf, self.vanishing, self.too_large, self.babbling, self.not_numbers, self.slow_request,
            self.bad_frames, self.bad_uploads, self.broken_upload, self.left_upload, self.fickle,
        ]  # fmt: skip

    async def __aenter__(self) -> Visitors:
        self.web = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.web.close()

    def recording(self) -> tuple[np.ndarray, str]:
        return self.rng.choice(self.recordings)

    def expect(self, said: str, text: str) -> None:
        if said != text:
            other = [index for index, (_, each) in enumerate(self.recordings) if each == said]
            raise Wrong(f"a client heard {said[:80]!r} for {text[:80]!r}" + (", the text of another" if other else ""))

    @contextlib.asynccontextmanager
    async def connect(self, path: str):
        async with asyncio.timeout(PATIENCE):
            async with self.web.ws_connect(self.url + path, max_msg_size=0) as socket:
                yield socket

    async def update(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        audio = {"input": {"format": {"type": "audio/pcm", "rate": RATE}}}
        session = {"type": "transcription", "audio": audio, "include": ["cascade.partial"]}
        await socket.send_json({"type": "session.update", "session": session})

    # ---- Good ones ----------------------------------------------------------------------------------------------

    async def realtime(self) -> None:
        async with self.connect("/v1/realtime") as socket:
            await self.update(socket)
            for _ in range(2):
                await self.say_and_check(socket)

    async def say_and_check(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        samples, text = self.recording()
        as_binary = self.rng.random() < 0.5
        for start in range(0, len(samples), PACKET):
            data = samples[start : start + PACKET].tobytes()
            if as_binary:
                await socket.send_bytes(data)
            else:
                event = {"type": "input_audio_buffer.append", "audio": base64.b64encode(data).decode()}
                await socket.send_json(event)
        await socket.send_json({"type": "input_audio_buffer.commit"})
        said = []
        async for message in socket:
            event = json.loads(message.data)
            if event["type"].endswith(".completed"):
                said.append(event["transcript"])
            elif event["type"] == "cascade.finished":
                return self.expect(" ".join(filter(None, said)), text)
            elif event["type"].endswith(".failed"):
                raise Wrong(event["error"]["message"])
        raise Wrong(f"a good client was sent away with {socket.close_code}")

    async def sherpa(self) -> None:
        samples, text = self.recording()
        async with self.connect("/") as socket:
            for start in range(0, len(samples), PACKET):
                await socket.send_bytes((samples[start : start + PACKET] / np.float32(32768)).tobytes())
            await socket.send_str("Done")
            said = []
            while (data := await socket.receive_str()) != "Done!":
                message = json.loads(data)
                if message["is_final"]:
                    said.append(message["text"])
            self.expect(" ".join(filter(None, said)), text)

    async def upload(self) -> None:
        samples, text = self.recording()
        fields = self.rng.choice([{}, {"response_format": "verbose_json"}, {"stream": "true"}])
        status, answer = await self.post(wav(samples), **fields)
        if status != 200:
            raise Wrong(f"a good upload was answered by {status}: {answer}")
        self.expect(answer["text"], text)

    async def post(self, data: bytes, **fields: str) -> tuple[int, dict]:
        """The status and the answer, of a stream the last event."""
        form = aiohttp.FormData(fields, default_to_multipart=True)
        form.add_field("file", data, filename="../x.wav")
        timeout = aiohttp.ClientTimeout(PATIENCE)
        async with self.web.post(f"{self.url}/v1/audio/transcriptions", data=form, timeout=timeout) as response:
            return response.status, json.loads((await response.text()).strip().split("\n\n")[-1].removeprefix("data: "))

    # ---- Bad ones -----------------------------------------------------------------------------------------------

    async def silent(self) -> None:
        async with self.connect(self.rng.choice(["/", "/v1/realtime"])) as socket:
            while (await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
            if socket.close_code != 1008:
                raise Wrong(f"a silent client was closed with {socket.close_code}")

    async def deaf(self) -> None:
        """Reads nothing, sends much."""
        async with self.connect("/v1/realtime") as socket:
            transport = socket._response.connection.transport
            await self.update(socket)
            transport.pause_reading()
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(self.rng.uniform(1, 2 * IDLE)):
                    while True:
                        await socket.send_bytes(self.recording()[0].tobytes())
                        await asyncio.sleep(0)
            transport.abort()

    async def vanishing(self) -> None:
        async with self.connect(self.rng.choice(["/", "/v1/realtime"])) as socket:
            await socket.send_bytes(bytes(2 * PACKET * self.rng.randrange(1, 40)))
            await asyncio.sleep(self.rng.choice([0, 0.1]))
            socket._response.connection.transport.abort()

    async def too_large(self) -> None:
        async with self.connect(self.rng.choice(["/", "/v1/realtime"])) as socket:
            with contextlib.suppress(ConnectionError):
                await socket.send_bytes(bytes(6 << 20))
            while (await socket.receive()).type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                pass
            if socket.close_code not in (1006, 1009):
                raise Wrong(f"an oversize message was closed with {socket.close_code}")

    async def babbling(self) -> None:
        """Events that are none; afterwards it is a good one."""
        events = [
            "", "no JSON", "[" * 50000, "{}", "null", '{"type": []}', '{"type": "x", "event_id": {}}', "\ud7ff\x00",
            '{"type": "session.update", "session": {"audio": {"input": {"format": {"rate": NaN}}}}}',
            '{"type": "session.update", "session": {"include": {"a": 1}}}', '{"type": "session.update", "session": []}',
            '{"type": "input_audio_buffer.append", "audio": 3}', '{"type": "input_audio_buffer.commit"}',
            '{"type": "input_audio_buffer.append", "audio": "AAA"}', '{"type": "response.cancel"}', b"odd",
        ]  # fmt: skip
        async with self.connect("/v1/realtime") as socket:
            await self.update(socket)
            for event in self.rng.sample(events, len(events)):
                await (socket.send_bytes(event) if isinstance(event, bytes) else socket.send_str(event))
            await self.say_and_check(socket)

    async def not_numbers(self) -> None:
        async with self.connect("/") as socket:
            for value in (np.nan, np.inf, 1e30, -np.inf):
                await socket.send_bytes(np.full(PACKET, value, np.float32).tobytes())
            await socket.send_bytes(b"odd")
            await socket.send_str(self.rng.choice(["Done", "done", "x" * 100000]))
            await socket.send_str("Done")
            while await socket.receive_str() != "Done!":
                pass

    async def slow_request(self) -> None:
        """A request byte by byte, and perhaps never whole."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upg"[
                : self.rng.randrange(80)
            ]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
        writer.transport.abort()

    async def bad_frames(self) -> None:
        """A handshake, and then bytes that are no frames."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        key = base64.b64encode(self.rng.randbytes(16)).decode()
        writer.write(
            b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        async with asyncio.timeout(PATIENCE):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.rng.choice([
                b"\x82\x05hello",  # no mask
                b"\x83\x80\x00\x00\x00\x00",  # a reserved opcode
                b"\xf2\x80\x00\x00\x00\x00",  # reserved bits
                b"\x81\x82\x00\x00\x00\x00\xff\xfe",  # no UTF-8
                b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",  # 2^63 bytes will come
                b"\x89\xfe\x01\x00\x00\x00\x00\x00" + bytes(256),  # a ping that is too long
                b"\x80\x80\x00\x00\x00\x00",  # goes on with nothing
                self.rng.randbytes(200),
            ]))  # fmt: skip
            with contextlib.suppress(ConnectionError):
                while await reader.read(1 << 16):
                    pass
        writer.transport.abort()

    async def bad_uploads(self) -> None:
        samples, _ = self.recording()
        whole = wav(samples)
        for data, allowed in (
            (b"no audio", 400), (whole[: len(whole) // 2], 400), (b"", 400), (wav(np.zeros(0, np.int16)), 400),
            (whole[:44] + self.rng.randbytes(999), 400), (bytes((UPLOAD_MB << 20) + 1), 413),
        ):  # fmt: skip
            status, answer = await self.post(data)
            if status != allowed or "error" not in answer:
                raise Wrong(f"a bad upload was answered by {status}: {answer}")

    async def broken_upload(self) -> None:
        """An upload that stops in the middle, and goes or stays for a while."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(
            b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF'
            + bytes(self.rng.randrange(1000))
        )  # fmt: skip
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            await asyncio.sleep(self.rng.choice([0, 0.2, 1.0]))
        writer.transport.abort()

    async def left_upload(self) -> None:
        """A recording whose sender does not wait for its text."""
        samples = np.tile(self.recording()[0], 5)[: UPLOAD_MB << 19]
        sending = asyncio.create_task(self.post(wav(samples), stream=self.rng.choice(["true", "false"])))
        await asyncio.sleep(self.rng.uniform(0, 1))
        sending.cancel()

    async def fickle(self) -> None:
        """Commits and clears in any order; afterwards it is a good one."""
        async with self.connect("/v1/realtime") as socket:
            await self.update(socket)
            cleared = 0
            for _ in range(30):
                kind = self.rng.choice(["commit", "clear", "append"])
                if kind == "append":
                    await socket.send_bytes(self.recording()[0][: self.rng.randrange(20000)].tobytes())
                else:
                    await socket.send_json({"type": f"input_audio_buffer.{kind}"})
                    cleared += kind == "clear"
            await socket.send_json({"type": "input_audio_buffer.clear"})
            async for message in socket:
                cleared -= json.loads(message.data)["type"] == "input_audio_buffer.cleared"
                if cleared < 0:
                    return await self.say_and_check(socket)


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()
