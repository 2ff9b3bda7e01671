"""What POST /v1/audio/transcriptions takes and gives, as OpenAI's: form fields to a request, segments to an answer."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

from cascade.server.realtime import words_as_json
from cascade.stream.decoder import Segment
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
        elif name == "stream" and value.lower() not in ("false", "0", ""):
            raise BadRequest("stream is not supported here: use the WebSocket /v1/realtime", name)

    def check(self) -> None:
        """Raise a BadRequest for fields that do not fit together."""
        if self.granularities and self.response_format != "verbose_json":
            raise BadRequest("timestamp_granularities needs response_format verbose_json", "timestamp_granularities[]")

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
