"""What POST /v1/audio/transcriptions takes and gives, as OpenAI's: form fields to a request, texts to an answer."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cascade.server.deltas import Deltas
from cascade.server.realtime import words_as_json
from cascade.server.realtime_session import BadEvent, read_hotwords
from cascade.stream.decoder import Final, Partial, Segment
from cascade.stream.subtitles import format_srt, format_vtt
from cascade.text.normal import join_texts

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
GRANULARITIES = ("word", "segment")


class BadRequest(ValueError):
    """A request that cannot be followed; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass
class Request:
    """The form's fields. Those that nothing here depends on (model, prompt, temperature) are not kept."""

    response_format: str = "json"
    language: str | None = None
    granularities: list[str] = field(default_factory=list)
    stream: bool = False
    phrases: dict[str, list[str]] = field(default_factory=dict)
    """What the search is to prefer, by the field's name."""

    def set(self, name: str, value: str) -> None:
        """Take over a field.

        Raises:
          BadRequest: a value that is not possible, or a field that changes the answer in a way that is not there.
        """
        if name == "response_format":
            if value not in FORMATS:
                raise BadRequest(f"response_format must be one of {' | '.join(FORMATS)}", name)
            self.response_format = value
        elif name in ("timestamp_granularities[]", "timestamp_granularities"):
            if value not in GRANULARITIES:
                raise BadRequest(f"timestamp_granularities must be of {' | '.join(GRANULARITIES)}", name)
            self.granularities.append(value)
        elif name == "language":
            self.language = value[:20]
        elif name == "stream":
            self.stream = value.lower() not in ("false", "0", "")
        elif name.removesuffix("[]") in ("keywords", "hotwords"):
            lines = map(str.strip, value.splitlines())
            self.phrases.setdefault(name.removesuffix("[]"), []).extend(filter(None, lines))

    def check(self) -> None:
        """Raise a BadRequest for fields that do not fit together."""
        if self.granularities and self.response_format != "verbose_json":
            raise BadRequest("timestamp_granularities needs response_format verbose_json", "timestamp_granularities[]")
        if self.stream and self.response_format not in ("json", "text"):
            raise BadRequest("stream needs response_format json or text: events have no other form", "stream")

    def hotwords(self, check: Callable[[Sequence[str]], None]) -> list[str]:
        """The phrases; `check` raises what is wrong with them."""
        try:
            return [phrase for phrases in read_hotwords(self.phrases, check).values() for phrase in phrases]
        except BadEvent as error:
            raise BadRequest(str(error), (error.param or "").rpartition(".")[2]) from error

    def answer(self, segments: list[Segment], duration: float) -> tuple[str, str]:
        """The answer's body and its content type."""
        text = join_texts(segment.text for segment in segments)
        if self.response_format == "text":
            return text + "\n", "text/plain"
        if self.response_format == "srt":
            return format_srt(segments), "application/x-subrip"
        if self.response_format == "vtt":
            return format_vtt(segments), "text/vtt"
        usage = {"type": "duration", "seconds": round(duration, 3)}
        if self.response_format == "json":
            return json.dumps({"text": text, "usage": usage}, ensure_ascii=False), "application/json"
        answer: dict[str, Any] = {
            "task": "transcribe", "language": self.language or "", "duration": round(duration, 3), "text": text,
            "usage": usage,
        }  # fmt: skip
        if "segment" in (self.granularities or ["segment"]):
            answer["segments"] = [_segment_as_json(number, segment) for number, segment in enumerate(segments)]
        if "word" in self.granularities:
            answer["words"] = [word for segment in segments for word in words_as_json(segment.words)]
        return json.dumps(answer, ensure_ascii=False), "application/json"


class Transcript:
    """What is heard of a recording, as it comes."""

    def __init__(self, wanted: Request) -> None:
        self._wanted, self._segments, self._duration, self._deltas = wanted, [], 0.0, Deltas()

    def hear(self, result: Partial | Final) -> Iterator[str]:
        """Take over what the recogniser says; gives the server-sent events that it makes, if some are wanted."""
        self._segments += result.segments
        deltas = [self._deltas.end_segment(segment.text) for segment in result.segments]
        if isinstance(result, Final):
            self._duration = result.duration
        else:
            deltas.append(self._deltas.go_on(result))
        if not self._wanted.stream:
            return
        for delta in filter(None, deltas):
            yield event({"type": "transcript.text.delta", "delta": delta})
        if isinstance(result, Final):
            text = join_texts(segment.text for segment in self._segments)
            yield event({"type": "transcript.text.done", "text": text})

    def answer(self) -> tuple[str, str]:
        return self._wanted.answer(self._segments, self._duration)


def event(fields: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def _segment_as_json(number: int, segment: Segment) -> dict[str, Any]:
    """Clients of OpenAI's interface want all of these keys; `seek` counts 10 ms frames, no tokens are given away, and a
    segment is there only because words were heard in it."""
    data = segment.text.encode()
    confidences = [max(word.confidence, 1e-10) for word in segment.words]
    return {
        "id": number, "seek": round(100 * segment.start), "start": round(segment.start, 3),
        "end": round(segment.end, 3), "text": segment.text, "tokens": [], "temperature": 0.0,
        "avg_logprob": round(sum(map(math.log, confidences)) / max(1, len(confidences)), 4),
        "compression_ratio": round(len(data) / len(zlib.compress(data)), 4), "no_speech_prob": 0.0,
    }  # fmt: skip
