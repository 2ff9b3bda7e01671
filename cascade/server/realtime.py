"""OpenAI's realtime transcription events, spoken to one client; `README.md` beside this file lists them.

An item is what one `completed` event is about: a segment between two pauses (turn detection server_vad, the default),
or all audio between two commits (turn detection null). Its deltas are append-only: a word is sent when only the full
pass could still change it, so that most items need no revision; where that pass does change a word, `completed` has the
text that counts. Who wants every change as it comes asks for `cascade.partial` in the session's `include`.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from cascade.recognizer import Recognizer
from cascade.server.deltas import Deltas, stable_words
from cascade.server.realtime_session import PARTIALS, BadEvent, Settings
from cascade.server.worker import Cleared, Failure, Result, Session
from cascade.stream.decoder import Final, Partial, Segment
from cascade.stream.words import Word
from cascade.text.normal import join_texts

FINISHED = "cascade.finished"
_ITEM = "conversation.item.input_audio_transcription."


def words_as_json(words: Iterable[Word], offset: float = 0.0) -> list[dict[str, Any]]:
    """Words with times in seconds, `offset` later; `spaced` is false for those without a space before them."""
    return [
        {
            "word": word.word, "start": round(offset + word.start, 3), "end": round(offset + word.end, 3),
            "confidence": round(word.confidence, 4), **({} if word.spaced else {"spaced": False}),
        }
        for word in words
    ]  # fmt: skip


class Realtime:
    """The state of one connection.

    Args:
      session: where audio goes.
      recognizer: for its name and pauses, and to check hotwords.
      is_beta: it expects the greeting of OpenAI's beta.
    """

    def __init__(self, session: Session, recognizer: Recognizer, is_beta: bool = False) -> None:
        self._session, self._is_beta = session, is_beta
        self._model, self._check_hotwords = recognizer.name, recognizer.check_hotwords
        endpoint = recognizer.endpoint
        self._silence_ms = None if endpoint is None else round(1000 * endpoint.silence_after_speech)
        self._id = _new_id("sess")
        self._settings = Settings(self._silence_ms)
        self._heard = False  # audio since the last end
        self._num_commits = 0  # that are not answered
        self._offset = 0.0  # seconds of the streams before this one
        self._previous: str | None = None
        self._begin_item()

    def greeting(self) -> list[str]:
        """What a client is told before it has said anything."""
        kind = "transcription_session.created" if self._is_beta else "session.created"
        return [_event(kind, session=self._describe(self._is_beta))]

    async def hear(self, message: str | bytes) -> list[str]:
        """Follow a client's event (a binary message is audio, as in append); returns what is answered at once.

        Raises:
          Overloaded, TooLong: as `Session.push`.
        """
        event_id = None
        try:
            if isinstance(message, bytes):
                await self._append(message)
                return []
            event = _parse(message)
            event_id = event.get("event_id") if isinstance(event.get("event_id"), str) else None
            return await self._follow(event)
        except BadEvent as error:
            return [_error(str(error), "invalid_request_error", error.code, error.param, event_id)]

    async def _follow(self, event: dict[str, Any]) -> list[str]:
        kind = event["type"]
        if kind == "input_audio_buffer.append":
            await self._append(_decode_audio(event.get("audio")))
            return []
        if kind == "input_audio_buffer.commit":
            if not self._heard:
                raise BadEvent("there is no audio to commit", code="input_audio_buffer_commit_empty")
            self._heard = False
            self._num_commits += 1
            self._session.end()
            return []
        if kind == "input_audio_buffer.clear":
            self._heard = False
            self._session.clear()
            return []
        if kind in ("session.update", "transcription_session.update"):
            self._update(event.get("session"))
            return [_event(f"{kind}d", session=self._describe(is_beta=kind != "session.update"))]
        raise BadEvent(f"there is no event {kind[:60]!r} here", "type", "unknown_event")

    async def _append(self, data: bytes) -> None:
        samples = self._settings.decode(data)
        if samples.size:
            self._heard = True
            await self._session.push(samples, self._settings.rate)

    def _update(self, session: Any) -> None:
        """Take over what a session.update names; everything is checked before anything changes."""
        settings = self._settings.updated(session, self._silence_ms, self._check_hotwords)
        if settings.rate != self._settings.rate and self._heard:
            field = "session.audio.input.format.rate"
            raise BadEvent("rate cannot change within audio: commit or clear first", field)
        if settings.by_pauses != self._settings.by_pauses and (self._heard or self._num_commits):
            field = "session.audio.input.turn_detection"
            raise BadEvent("turn_detection cannot change within audio: commit or clear first", field)
        if settings.hotwords != self._settings.hotwords:
            self._session.prefer(settings.hotwords)
        self._settings = settings
        own_silence = settings.by_pauses and settings.silence_ms != self._silence_ms
        self._session.end_segments_after(settings.silence_ms / 1000 if own_silence else None)

    def _describe(self, is_beta: bool) -> dict[str, Any]:
        return self._settings.describe(self._id, self._model, is_beta)

    def tell(self, result: Result) -> Iterator[str]:
        """The events that a text of the recogniser makes."""
        if isinstance(result, Failure):
            yield from self._fail(result)
        elif isinstance(result, Cleared):
            self._offset += result.duration
            self._begin_item()
            yield _event("input_audio_buffer.cleared")
        else:
            for segment in result.segments:
                yield from self._end_segment(segment)
            yield from self._end_stream(result) if isinstance(result, Final) else self._go_on(result)

    def _end_segment(self, segment: Segment) -> Iterator[str]:
        yield from self._start(segment.words)
        yield from self._delta(self._deltas.end_segment(segment.text))
        self._texts.append(segment.text)
        self._words += words_as_json(segment.words, self._offset)
        if self._settings.by_pauses:
            end = self._ms(segment.end)
            yield _event("input_audio_buffer.speech_stopped", item_id=self._item, audio_end_ms=end)
            yield from self._complete(segment.end - segment.start)

    def _end_stream(self, final: Final) -> Iterator[str]:
        answered = self._settings.by_pauses and final.segments
        if self._texts or (self._num_commits and not answered):
            yield from self._complete(final.duration)
        is_answer, self._num_commits = self._num_commits > 0, max(0, self._num_commits - 1)
        self._offset += final.duration
        if is_answer and PARTIALS in self._settings.include:
            yield _event(FINISHED, decoded_ms=self._ms(0.0), num_changed_words=final.num_changed_words)

    def _go_on(self, partial: Partial) -> Iterator[str]:
        yield from self._start(partial.words)
        yield from self._delta(self._deltas.go_on(partial))
        if PARTIALS in self._settings.include:
            words = words_as_json(partial.words, self._offset)
            num_stable = len(stable_words(partial))
            yield _event(
                PARTIALS, item_id=self._item, content_index=0, text=join_texts([*self._texts, partial.text]),
                words=[*self._words, *words], num_stable_words=len(self._words) + num_stable,
                decoded_ms=self._ms(partial.decoded),
            )  # fmt: skip

    def _start(self, words: tuple[Word, ...]) -> Iterator[str]:
        if words and self._settings.by_pauses and not self._speaking:
            self._speaking = True
            start = self._ms(words[0].start)
            yield _event("input_audio_buffer.speech_started", item_id=self._item, audio_start_ms=start)

    def _delta(self, delta: str) -> Iterator[str]:
        if delta:
            yield _event(f"{_ITEM}delta", item_id=self._item, content_index=0, delta=delta)

    def _complete(self, seconds: float) -> Iterator[str]:
        """The item is final; the next one begins."""
        text = join_texts(self._texts)
        yield _event("input_audio_buffer.committed", item_id=self._item, previous_item_id=self._previous)
        more = {"words": self._words} if PARTIALS in self._settings.include else {}
        yield _event(
            f"{_ITEM}completed", item_id=self._item, content_index=0, transcript=text,
            usage={"type": "duration", "seconds": round(seconds, 3)}, **more,
        )  # fmt: skip
        self._previous = self._item
        self._begin_item()

    def _fail(self, failure: Failure) -> Iterator[str]:
        if failure.is_fault_of_client:
            yield _error(failure.message, "invalid_request_error", "invalid_value", "audio", None)
            return
        error = {"type": "server_error", "code": "decoding_failed", "message": failure.message, "param": None}
        yield _event(f"{_ITEM}failed", item_id=self._item, content_index=0, error=error)
        self._num_commits = max(0, self._num_commits - 1)
        self._offset += failure.duration
        self._begin_item()

    def _begin_item(self) -> None:
        self._item = _new_id("item")
        self._texts: list[str] = []
        self._words: list[dict[str, Any]] = []
        self._deltas = Deltas()
        self._speaking = False

    def _ms(self, seconds: float) -> int:
        return round(1000 * (self._offset + seconds))


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


def _event(kind: str, **fields: Any) -> str:
    text = json.dumps({"type": kind, "event_id": _new_id("event"), **fields}, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # half of a surrogate pair, which a client sent, is no text


def _error(message: str, kind: str, code: str, param: str | None, event_id: str | None) -> str:
    return _event("error", error={"type": kind, "code": code, "message": message, "param": param, "event_id": event_id})


def _parse(message: str) -> dict[str, Any]:
    try:
        event = json.loads(message)
    except (ValueError, RecursionError):
        raise BadEvent("the message is not JSON", code="invalid_json") from None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise BadEvent("an event is a JSON object with a type", "type")
    return event


def _decode_audio(audio: Any) -> bytes:
    try:
        return base64.b64decode(audio, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise BadEvent("audio must be base64 of 16-bit samples", "audio") from None
