"""POST /v1/audio/transcriptions."""

import io
import json

import numpy as np
import pytest
import soundfile
from aiohttp import FormData

from tests.server.fake import BROKEN, RATE, REVISED, FakeRecognizer, speech
from tests.server.harness import run

URL = "/v1/audio/transcriptions"
PATH = "../../etc/passwd"


def wav(*values: int, rate: int = RATE) -> bytes:
    """A recording of floats, which the fake recogniser takes as they are."""
    file = io.BytesIO()
    soundfile.write(file, speech(*values).astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


async def post(client, data: bytes | None, **fields):
    form = FormData(default_to_multipart=True)
    for name, value in fields.items():
        for part in value if isinstance(value, list) else [value]:
            form.add_field(f"{name}[]" if name in ("timestamp_granularities", "keywords") else name, part)
    if data is not None:
        form.add_field("file", data, filename=PATH, content_type="audio/wav")
    response = await client.post(URL, data=form)
    return response.status, response.content_type, await response.text()


SPEECH = (0, 1, 2, 0, 0, 0, 3)
SRT = "1\n00:00:00,100 --> 00:00:00,600\nw1 w2\n\n2\n00:00:00,600 --> 00:00:01,600\nw3\n"


@pytest.mark.parametrize(
    ("response_format", "kind", "body"),
    [
        ("json", "application/json", '{"text": "w1 w2 w3", "usage": {"type": "duration", "seconds": 0.7}}'),
        ("text", "text/plain", "w1 w2 w3\n"),
        ("srt", "application/x-subrip", SRT),
    ],
)
def test_a_recording_comes_back_in_the_form_that_is_asked_for(response_format, kind, body):
    async def test(client, server):
        answer = await post(client, wav(*SPEECH), model="whisper-1", response_format=response_format)
        assert answer == (200, kind, body)

    run(test)


def test_subtitles_for_the_web_begin_with_their_name():
    async def test(client, server):
        status, kind, body = await post(client, wav(*SPEECH), response_format="vtt")
        assert (status, kind) == (200, "text/vtt") and body.startswith("WEBVTT\n\n00:00:00.100 --> 00:00:00.600\nw1 w2")

    run(test)


@pytest.mark.parametrize("granularities", [[], ["segment"], ["word"], ["word", "segment"]])
def test_verbose_json_has_the_granularities_that_are_asked_for(granularities):
    async def test(client, server):
        status, _, body = await post(
            client, wav(*SPEECH), response_format="verbose_json", timestamp_granularities=granularities, language="en"
        )
        answer = json.loads(body)
        assert status == 200 and answer["text"] == "w1 w2 w3" and answer["language"] == "en"
        assert ("words" in answer) == ("word" in granularities)
        assert ("segments" in answer) == (granularities in ([], ["segment"], ["word", "segment"]))
        for word in answer.get("words", [])[:1]:
            assert word == {"word": "w1", "start": 0.1, "end": 0.2, "confidence": 0.9}
        for segment in answer.get("segments", [])[1:]:
            assert (segment["id"], segment["start"], segment["end"], segment["text"]) == (1, 0.6, 0.7, "w3")
            assert segment["avg_logprob"] == round(np.log(0.9), 4)

    run(test)


@pytest.mark.parametrize(
    ("data", "fields", "status", "param", "says"),
    [
        (None, {"model": "any"}, 400, "file", "missing"),
        (b"no audio", {}, 400, "file", "the recording: unreadable"),
        (b"", {}, 400, "file", "WAV, FLAC, Ogg, MP3"),
        (wav(1)[:-9], {}, 400, "file", "truncated"),
        (wav(1), {"response_format": "docx"}, 400, "response_format", "verbose_json"),
        (wav(1), {"stream": "true", "response_format": "srt"}, 400, "stream", "json"),
        (b"no audio", {"stream": "true"}, 400, "file", "the recording: unreadable"),
        (wav(1), {"keywords": ["ada", "a?"]}, 400, "keywords", "cannot say"),
        (wav(1), {"hotwords": "ada\na!"}, 400, "hotwords", "sentencepiece"),
        (wav(1), {"keywords": ["a" * 201]}, 400, "keywords", "200 characters"),
        (wav(1), {"timestamp_granularities": ["word"]}, 400, "timestamp_granularities[]", "verbose_json"),
        (wav(1), {"timestamp_granularities": ["line"]}, 400, "timestamp_granularities[]", "word"),
        (wav(1, rate=2 * RATE), {}, 400, "file", "sampling_rate"),  # of the fake recogniser
        (wav(*range(100)), {}, 413, "file", "longer"),
    ],
)
def test_a_bad_request_is_one_sentence_without_a_path(data, fields, status, param, says):
    async def test(client, server):
        answered, kind, body = await post(client, data, **fields)
        error = json.loads(body)["error"]
        assert (answered, kind, error["param"]) == (status, "application/json", param)
        assert says in error["message"] and "/tmp" not in body and "passwd" not in body and "Traceback" not in body

    run(test, longest=5.0)


def test_an_upload_that_is_too_large_or_no_form_is_refused():
    async def test(client, server):
        assert (await post(client, wav(*range(40))))[0] == 413
        assert (await post(client, wav(1), prompt="x" * 20000))[0] == 413
        assert (await post(client, wav(1), **{f"field{number}": "" for number in range(1040)}))[0] == 400
        assert (await client.post(URL, data=wav(1))).status == 415
        for body in (b"--x\r\nbroken", b"", b"--x\r\n\r\n--x--"):
            response = await client.post(URL, data=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
            assert response.status == 400, await response.text()
        response = await client.post(URL, data=b"", headers={"Content-Type": "multipart/form-data"})
        assert response.status == 400

    run(test, upload_bytes=10000)


def events_of(body: str) -> list[dict]:
    return [json.loads(part.removeprefix("data: ")) for part in body.split("\n\n") if part]


@pytest.mark.parametrize("response_format", ["json", "text"])
def test_a_recording_may_come_as_events_whose_deltas_add_up(response_format):
    async def test(client, server):
        options = {"stream": "true", "response_format": response_format}
        status, kind, body = await post(client, wav(*SPEECH), **options)
        *deltas, done = events_of(body)
        assert (status, kind) == (200, "text/event-stream")
        assert {event["type"] for event in deltas} == {"transcript.text.delta"} and len(deltas) > 1
        assert "".join(event["delta"] for event in deltas) == "w1 w2 w3"
        assert done == {"type": "transcript.text.done", "text": "w1 w2 w3"}
        assert events_of((await post(client, wav(1, REVISED, 2), **options))[2])[-1]["text"] == "w1 surely w2"
        assert events_of((await post(client, wav(0), **options))[2]) == [{"type": "transcript.text.done", "text": ""}]

    run(test)


def test_an_error_behind_the_first_event_is_an_event():
    async def test(client, server):
        status, _, body = await post(client, wav(1, 2, 3, *[4] * 20, BROKEN), stream="true")
        *deltas, last = events_of(body)
        assert status == 200 and deltas and last["error"]["code"] == "invalid_audio"
        assert (await post(client, wav(BROKEN)))[0] == 400

    run(test)


def test_a_recording_has_hotwords_of_its_own():
    recognizer, heard_with = FakeRecognizer(), []
    advance = recognizer.advance

    def watch() -> None:
        heard_with.extend(stream.hotwords for stream in recognizer.streams)
        advance()

    async def test(client, server):
        recognizer.advance = watch
        assert (await post(client, wav(1), keywords=["ada", "owl"], hotwords="elk :2\n\n yak \n"))[0] == 200
        assert heard_with[-1] == ["ada", "owl", "elk :2", "yak"]
        assert (await post(client, wav(1), prompt="a talk about owls"))[0] == 200 and heard_with[-1] == []

    run(test, recognizer=recognizer)
