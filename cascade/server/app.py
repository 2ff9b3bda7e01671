"""The web application: who is let in, how long a connection may last, and how everything ends.

Every connection has a slot, a `Session` of the worker, from before its upgrade (or before its upload is read) until it
is gone, whatever happened to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from aiohttp import BodyPartReader, ClientPayloadError, WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError

from cascade.audio.io import read_audio_blocks
from cascade.recognizer import Recognizer
from cascade.server.metrics import Metrics
from cascade.server.realtime import Realtime
from cascade.server.realtime_session import MOST_HOTWORDS
from cascade.server.security import HEADERS, Handler, error_response, guard
from cascade.server.sherpa import Sherpa
from cascade.server.transcriptions import BadRequest, Request, Transcript
from cascade.server.worker import Failure, Full, Overloaded, Session, TooLong, Worker
from cascade.stream.decoder import Final, Partial

WEB = Path(__file__).parent / "web"
PAGE = {"/": "index.html", "/page.js": "page.js", "/microphone.js": "microphone.js", "/page.css": "page.css"}
MESSAGE_BYTES = 4 << 20
FIELD_BYTES = 16 << 10
MOST_FIELDS = 32 + MOST_HOTWORDS
SEND_SECONDS = 20.0
"""A client that takes nothing for so long has gone."""
SECOND_LOOK_SECONDS = 0.1
"""For what has come while this process stood still: the machine may be busy."""
UPLOAD_SECONDS = 600.0
RETRY_SECONDS = "5"
DRAIN_SECONDS = 30.0
"""What is left of all streams is decoded in this time, at the end."""
BYE_SECONDS = 2.0
BLOCK_SECONDS = 1.0
GOING_AWAY, TOO_MUCH, TRY_AGAIN = 1001, 1008, 1013
"""Close codes of RFC 6455 and its registry."""


class Server:
    """All endpoints on one worker.

    Args:
      keys: API keys, see `guard`.
      idle: seconds without a message after which a connection ends.
      upload_bytes: the largest recording that POST takes.
    """

    def __init__(self, worker: Worker, keys: list[bytes], idle: float = 60.0, upload_bytes: int = 64 << 20) -> None:
        self._worker, self._idle, self._upload_bytes = worker, idle, upload_bytes
        self._files = {path: (WEB / name).read_bytes() for path, name in PAGE.items()}
        self._types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
        self._stopping = asyncio.Event()
        self.metrics = Metrics(worker)
        self.connections: set[object] = set()
        """That have made a request."""
        self.app = web.Application(middlewares=[self._answer_errors, guard(keys, set(PAGE))])
        self.app.on_response_prepare.append(_add_headers)
        self.app.router.add_get("/", self._page_or_sherpa)
        for path in PAGE:
            if path != "/":
                self.app.router.add_get(path, self._page)
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/ready", self._ready)
        self.app.router.add_get("/metrics", self._metrics)
        self.app.router.add_get("/v1/models", self._models)
        self.app.router.add_get("/v1/realtime", self._realtime)
        self.app.router.add_post("/v1/audio/transcriptions", self._transcribe)

    async def start(self) -> Recognizer:
        """Make the recogniser; connections may come then."""
        self._recognizer = await self._worker.start()
        self._started = int(time.time())
        return self._recognizer

    @property
    def num_streams(self) -> int:
        return self._worker.num_sessions

    @property
    def max_streams(self) -> int:
        return self._worker.max_streams

    async def drain(self) -> None:
        """Let nobody in any more, decode what was heard to its end, send it, and say goodbye."""
        self._stopping.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.num_streams:
                    await asyncio.sleep(0.02)
        self._worker.stop()

    @contextlib.contextmanager
    def _slot(self, what: str) -> Iterator[Session]:
        """A session, counted and logged.

        Raises:
          Full: the server has no slot, or is going down.
        """
        if self._stopping.is_set():
            raise Full
        start = time.monotonic()
        with self._worker.session() as session:
            self.metrics.num_streams += 1
            try:
                yield session
            finally:
                logging.info("%s: %.1f s of audio in %.1f s", what, session.seconds, time.monotonic() - start)

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors in words: a client never sees a traceback."""
        self.connections.add(request.protocol)
        try:
            return await handler(request)
        except Full:
            self.metrics.num_rejected += 1
            message = f"all {self.max_streams} streams are in use, or the server is going down: try again later"
            return error_response(503, message, "overloaded", headers={"Retry-After": RETRY_SECONDS})
        except web.HTTPException as error:
            return error_response(error.status, error.reason, "http_error")
        except (HttpProcessingError, ClientPayloadError):
            return error_response(400, "the request is malformed", "malformed_request")
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            logging.exception("%s failed", request.path)
            return error_response(500, "the server failed, its log says why", "internal_error")

    async def _page_or_sherpa(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._converse(request, "sherpa", Sherpa)
        return await self._page(request)

    async def _page(self, request: web.Request) -> web.Response:
        kind = self._types[Path(PAGE[request.path]).suffix]
        return web.Response(body=self._files[request.path], content_type=kind, charset="utf-8")

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        is_ready = self._worker.is_alive and not self._stopping.is_set()
        state = {"ready": is_ready, "streams": self.num_streams, "max_streams": self.max_streams}
        return web.json_response(state, status=200 if is_ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics.text(), content_type="text/plain", charset="utf-8")

    async def _models(self, request: web.Request) -> web.Response:
        """OpenAI's list of models: clients look into it before they speak."""
        model = {"id": self._recognizer.name, "object": "model", "created": self._started, "owned_by": "cascade"}
        return web.json_response({"object": "list", "data": [model]})

    async def _realtime(self, request: web.Request) -> web.StreamResponse:
        offered = request.headers.get("Sec-WebSocket-Protocol", "")
        is_beta = "OpenAI-Beta" in request.headers or "openai-beta." in offered
        is_beta &= request.query.get("intent") == "transcription"
        return await self._converse(request, "realtime", partial(Realtime, is_beta=is_beta))

    async def _converse(
        self, request: web.Request, name: str, open_protocol: Callable[[Session, Recognizer], Realtime | Sherpa]
    ) -> web.StreamResponse:
        """A WebSocket from its upgrade to its end, in one of the protocols."""
        socket = web.WebSocketResponse(
            max_msg_size=MESSAGE_BYTES, compress=False, timeout=BYE_SECONDS, protocols=("realtime",)
        )
        if not socket.can_prepare(request).ok:
            return error_response(426, "this is a WebSocket: connect with an upgrade", "upgrade_required")
        code, reason = 1000, ""
        with self._slot(name) as session:
            await socket.prepare(request)
            protocol = open_protocol(session, self._recognizer)
            reader = asyncio.create_task(self._read(socket, protocol, session))
            writer = asyncio.create_task(self._write(socket, protocol, session))
            stopping = asyncio.create_task(self._stopping.wait())
            try:
                await asyncio.wait({reader, writer, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if reader.done() and not reader.cancelled() and reader.exception() is None:
                    code, reason = reader.result()
                elif stopping.done():
                    code, reason = GOING_AWAY, "the server is going down"
                if code != 1000 and not writer.done():  # nobody's last words are lost
                    reader.cancel()
                    session.end(is_last=True)
                    await asyncio.wait({writer}, timeout=DRAIN_SECONDS)
                elif writer.done() and not writer.exception():  # the client has all, and closes
                    await asyncio.wait({reader}, timeout=BYE_SECONDS)
            finally:
                await _end_tasks(reader, writer, stopping)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * BYE_SECONDS):
                await socket.close(code=code, message=reason.encode())
        return socket

    async def _read(
        self, socket: web.WebSocketResponse, protocol: Realtime | Sherpa, session: Session
    ) -> tuple[int, str]:
        """Hear a client until it closes; returns the close code and the reason why it ends."""
        await _send(socket, protocol.greeting())
        is_second_look = False
        while True:
            try:
                async with asyncio.timeout(SECOND_LOOK_SECONDS if is_second_look else self._idle):  # pings do not count
                    message = await socket.receive()
            except TimeoutError:
                if is_second_look and not session.is_waiting:
                    return TOO_MUCH, f"nothing came for {self._idle:g} s"
                is_second_look = not session.is_waiting  # otherwise the client waits for us
                continue
            is_second_look = False
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                return 1000, ""
            try:
                answers = await protocol.hear(message.data)
            except TooLong:
                return TOO_MUCH, "the longest stream ends here: connect again"
            except Overloaded:
                return TRY_AGAIN, "the server does not keep up: try again later"
            await _send(socket, answers)

    async def _write(self, socket: web.WebSocketResponse, protocol: Realtime | Sherpa, session: Session) -> None:
        async for result in session.results():
            self.metrics.count(result)
            await _send(socket, protocol.tell(result))

    async def _transcribe(self, request: web.Request) -> web.StreamResponse:
        """A recording to text, at the end or, as events, while it is decoded."""
        if not request.content_type.startswith("multipart/"):
            return error_response(415, "send multipart/form-data with a field `file`", "invalid_content_type")
        events: web.StreamResponse | None = None
        with self._slot("transcription") as session, tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recording"
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    wanted = await self._read_form(request, path)
                session.prefer(wanted.hotwords(self._recognizer.check_hotwords))
                transcript = Transcript(wanted)
                async with contextlib.aclosing(self._decode(path, session)) as results:
                    async for result in results:
                        if request.transport is None or request.transport.is_closing():
                            raise ConnectionResetError("the client has gone")
                        for event in transcript.hear(result):
                            events = events or await _open_events(request)
                            await _write(events, event)
            except (BadRequest, ValueError, OSError, TooLong, Overloaded) as error:
                refusal = _refuse(error, path)
                if events is None:
                    return refusal
                if not isinstance(error, OSError):
                    await _write(events, f"data: {refusal.text}\n\n")
            if events is not None:
                return events
            body, kind = transcript.answer()
            return web.Response(text=body, content_type=kind, charset="utf-8")

    async def _read_form(self, request: web.Request, path: Path) -> Request:
        """The form's fields; its file goes to `path`, whatever name it has."""
        wanted, has_file, num_fields = Request(), False, 0
        form = await request.multipart()
        while (part := await form.next()) is not None:
            num_fields += 1
            if not isinstance(part, BodyPartReader) or num_fields > MOST_FIELDS:
                raise BadRequest("the form has parts in parts, or too many fields")
            if part.name == "file":
                has_file = True
                with open(path, "wb") as file:
                    async for data in _limited(part, self._upload_bytes):
                        file.write(data)
            else:
                value = b"".join([data async for data in _limited(part, FIELD_BYTES)])
                wanted.set(part.name or "", value.decode("utf-8", "replace"))
        if not has_file:
            raise BadRequest("the field `file` is missing: the recording", "file")
        wanted.check()
        return wanted

    async def _decode(self, path: Path, session: Session) -> AsyncIterator[Partial | Final]:
        """What is heard of a recording.

        Raises:
          ValueError, TooLong, Overloaded: it cannot be read, or not be decoded.
        """
        reader = asyncio.create_task(self._hear_file(path, session))
        try:
            async for result in session.results():
                self.metrics.count(result)
                if isinstance(result, Failure):
                    raise ValueError(result.message)
                if isinstance(result, Final) and (error := await reader) is not None:
                    raise error
                yield result
        finally:
            await _end_tasks(reader)

    async def _hear_file(self, path: Path, session: Session) -> Exception | None:
        """Push a recording, read block by block outside of the event loop; returns what was wrong with it."""
        blocks = read_audio_blocks(path, self._recognizer.sampling_rate, BLOCK_SECONDS)
        try:
            while (block := await asyncio.to_thread(next, blocks, None)) is not None:
                samples, rate, _ = block
                await session.push(samples, rate)
        except Exception as error:
            return error
        finally:
            session.end(is_last=True)
        return None


def _refuse(error: Exception, path: Path) -> web.Response:
    """What is wrong with an upload; `path`, where it lies, is not said."""
    if isinstance(error, BadRequest):
        return error_response(400, str(error), "invalid_value", error.param)
    if isinstance(error, TooLong):
        return error_response(413, "the recording is longer than a stream may be", "too_long", "file")
    if isinstance(error, Overloaded):
        headers = {"Retry-After": RETRY_SECONDS}
        return error_response(503, "the server does not keep up: try again later", "overloaded", headers=headers)
    if isinstance(error, ConnectionError | TimeoutError):
        return error_response(408, "the recording did not arrive in time", "timeout")
    return error_response(400, str(error).replace(str(path), "the recording"), "invalid_audio", "file")


async def _open_events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


async def _write(response: web.StreamResponse, text: str) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await response.write(text.encode())


async def _limited(part: BodyPartReader, most: int) -> AsyncIterator[bytes]:
    """A part's data, as it comes; beyond `most` bytes an error 413."""
    count = 0
    while data := await part.read_chunk():
        count += len(data)
        if count > most:
            raise web.HTTPRequestEntityTooLarge(most, count)
        yield data


async def _send(socket: web.WebSocketResponse, messages: Iterable[str]) -> None:
    for message in messages:
        async with asyncio.timeout(SEND_SECONDS):
            await socket.send_str(message)


async def _end_tasks(*tasks: asyncio.Task) -> None:
    """Cancel what still runs; what a lost connection cannot explain goes to the log."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for error in (task.exception() for task in tasks if not task.cancelled()):
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            logging.error("a connection failed", exc_info=error)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
