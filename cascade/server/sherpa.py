"""sherpa-onnx's online WebSocket protocol, spoken to one client.

A client connects to /, sends binary messages of float32 samples at the model's rate and then the text `Done`; it gets
JSON, one message whenever the text has changed, and `Done!` at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from cascade.recognizer import Recognizer
from cascade.server.worker import Cleared, Failure, Result, Session
from cascade.stream.decoder import Final
from cascade.stream.words import Word


class Sherpa:
    """The state of one connection; as `Realtime`."""

    def __init__(self, session: Session, recognizer: Recognizer) -> None:
        self._session, self._rate = session, recognizer.sampling_rate
        self._num_segments, self._start, self._shown = 0, 0.0, ""
        self._is_done = False

    def greeting(self) -> list[str]:
        return []

    async def hear(self, message: str | bytes) -> list[str]:
        """Take samples, or the end of them; anything else is answered by an error, nothing after the end.

        Raises:
          Overloaded, TooLong: as `Session.push`.
        """
        if self._is_done:
            return []
        if isinstance(message, bytes) and len(message) % 4 == 0:
            if message:
                samples = np.frombuffer(message, dtype="<f4").astype(np.float32, copy=False)
                await self._session.push(samples, self._rate)
        elif message == "Done":
            self._is_done = True
            self._session.end(is_last=True)
        else:
            return [json.dumps({"error": "expected binary float32 samples, or the text Done"})]
        return []

    def tell(self, result: Result) -> Iterator[str]:
        """The messages that a text of the recogniser makes."""
        if isinstance(result, Failure | Cleared):
            if isinstance(result, Failure):
                yield json.dumps({"error": result.message})
            return
        is_eof = isinstance(result, Final)
        for segment in result.segments:
            self._start = segment.start
            is_last = is_eof and segment is result.segments[-1]
            yield self._message(segment.text, segment.words, is_final=True, is_eof=is_last)
            self._num_segments, self._shown, self._start = self._num_segments + 1, "", segment.end
        if is_eof:
            if not result.segments:
                yield self._message("", (), is_final=True, is_eof=True)
            yield "Done!"
        elif result.text != self._shown:
            self._shown = result.text
            yield self._message(result.text, result.words)

    def _message(self, text: str, words: tuple[Word, ...], is_final: bool = False, is_eof: bool = False) -> str:
        """Words stand where sherpa-onnx has tokens; their times count from the segment's start."""
        return json.dumps(
            {
                "text": text, "tokens": [f" {word.word}" if word.spaced else word.word for word in words],
                "timestamps": [round(word.start - self._start, 3) for word in words], "segment": self._num_segments,
                "start_time": round(self._start, 3), "is_final": is_final, "is_eof": is_eof,
            },
            ensure_ascii=False,
        )  # fmt: skip
