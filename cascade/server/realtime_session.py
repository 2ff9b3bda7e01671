"""What a client of /v1/realtime has set: the objects of session.update to `Settings`, and back for session.updated.

OpenAI's beta had the same under flat names (`input_audio_format: pcm16`, ...) in transcription_session.update, and
clients still send that. Flat names count in both events; the answer has the form of the event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cascade.audio.g711 import G711_RATE, decode_g711
from cascade.audio.io import HIGHEST_RATE, LOWEST_RATE

PARTIALS = "cascade.partial"
"""In `include`: events of our own, this one and cascade.finished, and words in `completed`."""
DEFAULT_RATE = 24000
MOST_HOTWORDS, LONGEST_HOTWORD = 1000, 200
"""Phrases of a session, characters of a phrase."""
LONGEST_SILENCE_MS = 30_000
LAWS = {"audio/pcmu": "ulaw", "audio/pcma": "alaw"}
BETA_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_BETA_NAMES = {
    "input_audio_transcription": "transcription", "turn_detection": "turn_detection",
    "input_audio_noise_reduction": "noise_reduction",
}  # fmt: skip
_INPUT = "session.audio.input"


class BadEvent(ValueError):
    """An event that cannot be followed; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Settings:
    """What is in force."""

    silence_ms: int | None
    """That ends an item; None: only commits do."""
    encoding: str = "audio/pcm"
    rate: int = DEFAULT_RATE
    include: list[str] = field(default_factory=list)
    phrases: dict[str, list[str]] = field(default_factory=dict)
    """That the search prefers, by the field that brought them."""

    @property
    def by_pauses(self) -> bool:
        """Silence ends items."""
        return self.silence_ms is not None

    @property
    def hotwords(self) -> list[str]:
        return list(dict.fromkeys(phrase for phrases in self.phrases.values() for phrase in phrases))

    def decode(self, data: bytes) -> np.ndarray:
        """(num_samples,) int16 samples of what a client sends."""
        if self.encoding in LAWS:
            return decode_g711(data, LAWS[self.encoding])
        if len(data) % 2:
            raise BadEvent(f"audio must be 16-bit samples, got {len(data)} bytes", "audio")
        return np.frombuffer(data, dtype="<i2").astype(np.int16, copy=False)

    def updated(self, session: Any, silence_ms: int | None, check: Callable[[Sequence[str]], None]) -> Settings:
        """With what a client's `session` names.

        Args:
          silence_ms: the server's own; None: nothing but commits can end an item.
          check: raises a ValueError or an ImportError for hotwords that cannot be.
        """
        session = mapping(session, "session")
        if session.get("type", "transcription") != "transcription":
            raise BadEvent("session.type must be transcription: this server speaks nothing else", "session.type")
        audio = mapping(mapping(session.get("audio") or {}, "session.audio").get("input") or {}, _INPUT)
        audio = {**_read_beta(session), **audio}
        include = session.get("include", self.include) or []
        if not isinstance(include, list):
            raise BadEvent("include must be a list", "session.include")
        settings = replace(self, include=[PARTIALS] if PARTIALS in include else [])
        if audio.get("format") is not None:
            settings = settings._with_format(mapping(audio["format"], f"{_INPUT}.format"))
        if "turn_detection" in audio:
            settings = replace(settings, silence_ms=_read_silence(audio["turn_detection"], silence_ms))
        transcription = mapping(audio.get("transcription") or {}, f"{_INPUT}.transcription")
        return replace(settings, phrases=settings.phrases | read_hotwords(transcription, check))

    def _with_format(self, form: dict[str, Any]) -> Settings:
        encoding = form.get("type", self.encoding)
        if encoding in tuple(LAWS):
            if form.get("rate", G711_RATE) != G711_RATE:
                raise BadEvent(f"rate must be {G711_RATE} Hz for {encoding}", f"{_INPUT}.format.rate")
            return replace(self, encoding=encoding, rate=G711_RATE)
        if encoding != "audio/pcm":
            possible = "audio/pcm (16-bit little-endian mono), audio/pcmu or audio/pcma (G.711)"
            raise BadEvent(f"audio must be {possible}", f"{_INPUT}.format.type")
        rate = form.get("rate", self.rate if encoding == self.encoding else DEFAULT_RATE)
        if type(rate) is not int or not LOWEST_RATE <= rate <= HIGHEST_RATE:
            possible = f"a whole number from {LOWEST_RATE} to {HIGHEST_RATE} Hz"
            raise BadEvent(f"rate must be {possible}", f"{_INPUT}.format.rate")
        return replace(self, encoding=encoding, rate=rate)

    def describe(self, identifier: str, model: str, is_beta: bool) -> dict[str, Any]:
        """The session in force: what a client asked for and did not get is not in it."""
        pauses = {"type": "server_vad", "silence_duration_ms": self.silence_ms}
        audio = {
            "transcription": {"model": model, "hotwords": [], **self.phrases},
            "turn_detection": None if self.silence_ms is None else pauses, "noise_reduction": None,
        }  # fmt: skip
        session = {"id": identifier, "object": "realtime.transcription_session", "include": self.include}
        if not is_beta:
            audio["format"] = {"type": self.encoding, "rate": self.rate}
            return {**session, "type": "transcription", "audio": {"input": audio}}
        beta_format = next(beta for beta, encoding in BETA_FORMATS.items() if encoding == self.encoding)
        flat = {beta: audio[name] for beta, name in _BETA_NAMES.items()}
        return {**session, "input_audio_format": beta_format, **flat}


def mapping(value: Any, name: str) -> dict[str, Any]:
    """The value, which must be a JSON object."""
    if not isinstance(value, dict):
        raise BadEvent(f"{name} must be an object", name)
    return value


def _read_beta(session: dict[str, Any]) -> dict[str, Any]:
    """The flat names of a session as `audio.input` has them."""
    audio = {name: session[beta] for beta, name in _BETA_NAMES.items() if beta in session}
    if session.get("input_audio_format") is not None:
        beta = session["input_audio_format"]
        if not isinstance(beta, str) or beta not in BETA_FORMATS:
            raise BadEvent(
                f"input_audio_format must be one of {' | '.join(BETA_FORMATS)}", "session.input_audio_format"
            )
        audio["format"] = {"type": BETA_FORMATS[beta]}
    return audio


def _read_silence(turn_detection: Any, default_ms: int | None) -> int | None:
    """Milliseconds of silence that end an item."""
    param = f"{_INPUT}.turn_detection"
    turn_detection = mapping({"type": "none"} if turn_detection is None else turn_detection, param)
    kind = turn_detection.get("type", "server_vad")
    if kind not in ("server_vad", "semantic_vad", "none"):
        raise BadEvent("turn_detection.type must be server_vad; null: only commits end an item", f"{param}.type")
    silence = turn_detection.get("silence_duration_ms")
    if silence is not None and (type(silence) is not int or not 1 <= silence <= LONGEST_SILENCE_MS):
        possible = f"a whole number from 1 to {LONGEST_SILENCE_MS}"
        raise BadEvent(f"silence_duration_ms must be {possible}", f"{param}.silence_duration_ms")
    if kind == "none" or default_ms is None:
        return None
    return silence or default_ms


def read_hotwords(fields: dict[str, Any], check: Callable[[Sequence[str]], None]) -> dict[str, list[str]]:
    """The lists of phrases among the fields: OpenAI's `keywords`, and `hotwords`, our older name."""
    lists = {name: fields[name] or [] for name in ("keywords", "hotwords") if name in fields}
    for name, phrases in lists.items():
        param = f"{_INPUT}.transcription.{name}"
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            raise BadEvent(f"{name} must be a list of strings", param)
        if len(phrases) > MOST_HOTWORDS or any(len(phrase) > LONGEST_HOTWORD for phrase in phrases):
            raise BadEvent(f"{name} must be at most {MOST_HOTWORDS}, of {LONGEST_HOTWORD} characters each", param)
        try:
            check(phrases)
        except (ValueError, ImportError) as error:
            raise BadEvent(str(error), param) from error
    return lists
