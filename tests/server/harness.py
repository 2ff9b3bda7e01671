"""A server on a free port of this machine, and clients of it, in one event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import WSMsgType
from aiohttp.test_utils import TestClient, TestServer

from cascade.server.app import Server
from cascade.server.worker import Worker
from tests.server.fake import RATE, FakeRecognizer


@asynccontextmanager
async def serving(
    recognizer: FakeRecognizer, max_streams: int = 8, longest: float = 3600.0, keys: tuple[bytes, ...] = (), **options
) -> AsyncIterator[tuple[TestClient, Server]]:
    worker = Worker(lambda: recognizer, max_streams, longest)
    server = Server(worker, list(keys), **options)
    await server.start()
    async with TestClient(TestServer(server.app)) as client:
        yield client, server
    await server.drain()


def run(test: Callable[..., Awaitable], *arguments, recognizer: FakeRecognizer | None = None, **options) -> None:
    """Run `test(client, server, *arguments)`; afterwards no stream and no slot may be left."""
    recognizer = recognizer or FakeRecognizer()

    async def main() -> None:
        async with asyncio.timeout(60):
            async with serving(recognizer, **options) as (client, server):
                await test(client, server, *arguments)
                while server.num_streams or recognizer.streams:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


async def open_realtime(client: TestClient, rate: int = RATE, **session):
    """A connection of /v1/realtime after its session.update."""
    socket = await client.ws_connect("/v1/realtime")
    assert (await socket.receive_json())["type"] == "session.created"
    audio = {"input": {"format": {"type": "audio/pcm", "rate": rate}, **session.pop("audio", {})}}
    await socket.send_json({"type": "session.update", "session": {"type": "transcription", "audio": audio, **session}})
    assert (await socket.receive_json())["type"] == "session.updated"
    return socket


async def until(socket, kind: str, count: int = 1) -> list[dict]:
    """All events up to the count-th of this kind; kinds may be given by their end."""
    events = []
    while count:
        message = await socket.receive()
        assert message.type is WSMsgType.TEXT, (message, events)
        events.append(json.loads(message.data))
        count -= events[-1]["type"].endswith(kind)
    return events


def of_kind(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["type"].endswith(kind)]
