"""/v1/realtime: OpenAI's transcription events."""

import asyncio
import base64
import io

import numpy as np
import pytest
import soundfile

from cascade.server.realtime_session import Settings
from tests.server.fake import BROKEN, RATE, REVISED, FakeRecognizer, speech
from tests.server.harness import of_kind, open_realtime, run, until

COMMIT = {"type": "input_audio_buffer.commit"}


def append(samples: np.ndarray) -> dict:
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(samples.tobytes()).decode()}


def text_of_deltas(events):
    return "".join(event["delta"] for event in of_kind(events, ".delta"))


@pytest.mark.parametrize("as_binary", [False, True])
def test_a_segment_gives_all_events_in_order_and_deltas_that_add_up_to_its_text(as_binary):
    async def test(client, server):
        socket = await open_realtime(client)
        for value in (0, 1, 2, 3, 0, 0, 0):
            await (socket.send_bytes(speech(value).tobytes()) if as_binary else socket.send_json(append(speech(value))))
        events = await until(socket, ".completed")
        kinds = [event["type"] for event in events if not event["type"].endswith(".delta")]
        assert kinds == [
            "input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", "input_audio_buffer.committed",
            "conversation.item.input_audio_transcription.completed",
        ]  # fmt: skip
        assert events[0]["audio_start_ms"] == 100 and of_kind(events, "stopped")[0]["audio_end_ms"] == 700
        assert events[-1]["transcript"] == "w1 w2 w3" == text_of_deltas(events)
        assert len({event["item_id"] for event in events}) == 1
        assert len({event["event_id"] for event in events}) == len(events)
        assert all(event["content_index"] == 0 for event in events if "transcription" in event["type"])
        assert events[-1]["usage"] == {"type": "duration", "seconds": 0.7}
        await socket.close()

    run(test)


def test_a_word_that_may_grow_is_not_sent_and_a_revision_comes_in_completed_only():
    async def test(client, server):
        socket = await open_realtime(client)
        await socket.send_bytes(speech(1, REVISED, 2, 3).tobytes())
        events = []
        while text_of_deltas(events) != "w1 maybe":
            events += await until(socket, ".delta")
        await socket.send_json(COMMIT)
        events = await until(socket, ".completed")
        assert not of_kind(events, ".delta") and events[-1]["transcript"] == "w1 surely w2 w3"
        await socket.send_bytes(speech(4, 0, 0, 0).tobytes())
        events = await until(socket, ".completed")
        assert text_of_deltas(events) == events[-1]["transcript"] == "w4"
        await socket.close()

    run(test)


def test_commit_answers_at_once_and_times_go_on_through_the_session():
    async def test(client, server):
        socket = await open_realtime(client, include=["cascade.partial"])
        await socket.send_bytes(speech(1, 2).tobytes())
        await socket.send_json(COMMIT)
        first = await until(socket, "cascade.finished")
        await socket.send_bytes(speech(0, 3).tobytes())
        await socket.send_json(COMMIT)
        second = await until(socket, "cascade.finished")
        (one,), (other,) = of_kind(first, ".completed"), of_kind(second, ".completed")
        assert (one["transcript"], other["transcript"]) == ("w1 w2", "w3")
        assert [word["start"] for word in one["words"] + other["words"]] == [0.0, 0.1, 0.3]
        assert of_kind(second, "committed")[0]["previous_item_id"] == one["item_id"] != other["item_id"]
        assert second[-1]["decoded_ms"] == 400
        await socket.close()

    run(test)


def test_without_turn_detection_an_item_is_what_lies_between_commits():
    async def test(client, server):
        socket = await open_realtime(client, audio={"turn_detection": None})
        await socket.send_bytes(speech(1, 0, 0, 0, 2, 0, 0, 0, 3).tobytes())
        await socket.send_json(COMMIT)
        events = await until(socket, ".completed")
        assert {event["type"].split(".")[-1] for event in events} == {"delta", "committed", "completed"}
        assert events[-1]["transcript"] == text_of_deltas(events) == "w1 w2 w3"
        await socket.send_json(COMMIT)
        error = (await until(socket, "error"))[-1]["error"]
        assert error["code"] == "input_audio_buffer_commit_empty"
        await socket.close()

    run(test)


def test_a_commit_of_silence_is_answered_by_an_empty_transcript():
    async def test(client, server):
        socket = await open_realtime(client)
        await socket.send_bytes(speech(0, 0).tobytes())
        await socket.send_json(COMMIT)
        events = await until(socket, ".completed")
        assert [event["type"].split(".")[-1] for event in events] == ["committed", "completed"]
        assert events[-1]["transcript"] == ""
        await socket.close()

    run(test)


def test_clear_forgets_what_was_heard():
    async def test(client, server):
        socket = await open_realtime(client)
        await socket.send_bytes(speech(1, 2).tobytes())
        await socket.send_json({"type": "input_audio_buffer.clear"})
        await until(socket, "cleared")
        await socket.send_bytes(speech(3).tobytes())
        await socket.send_json(COMMIT)
        events = await until(socket, ".completed")
        assert events[-1]["transcript"] == "w3" == text_of_deltas(events)
        assert of_kind(events, "speech_started")[0]["audio_start_ms"] == 200
        await socket.close()

    run(test)


def test_a_clear_after_a_commit_forgets_nothing_and_moves_no_times():
    async def test(client, server):
        socket = await open_realtime(client, include=["cascade.partial"])
        for values in ((1, 2), (3,)):
            await socket.send_bytes(speech(*values).tobytes())
            await socket.send_json(COMMIT)
            await socket.send_json({"type": "input_audio_buffer.clear"})
            events = await until(socket, "cleared")
        assert of_kind(events, "cascade.finished")[0]["decoded_ms"] == 300
        assert of_kind(events, ".completed")[0]["words"][0]["start"] == 0.2
        await socket.close()

    run(test)


def test_partials_come_to_those_who_ask_and_say_which_words_are_stable():
    async def test(client, server):
        socket = await open_realtime(client, include=["cascade.partial"])
        await socket.send_bytes(speech(1).tobytes())
        (event,) = of_kind(await until(socket, "cascade.partial"), "cascade.partial")
        assert event["text"] == "w1" and event["num_stable_words"] == 0 and event["decoded_ms"] == 100
        await socket.send_bytes(speech(2).tobytes())
        event = (await until(socket, "cascade.partial"))[-1]
        assert event["text"] == "w1 w2" and event["num_stable_words"] == 1
        assert event["words"][1] == {"word": "w2", "start": 0.1, "end": 0.2, "confidence": 0.9}
        await socket.close()

    run(test)


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("no JSON", "invalid_json", None),
        ("[" * 100000, "invalid_json", None),
        ("[1]", "invalid_value", "type"),
        ('{"type": 3}', "invalid_value", "type"),
        ('{"type": "response.create", "event_id": "mine"}', "unknown_event", "type"),
        ('{"type": "odd \\ud800"}', "unknown_event", "type"),
        ('{"type": "input_audio_buffer.append"}', "invalid_value", "audio"),
        ('{"type": "input_audio_buffer.append", "audio": "?"}', "invalid_value", "audio"),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "invalid_value", "audio"),
        ('{"type": "input_audio_buffer.commit"}', "input_audio_buffer_commit_empty", None),
        ('{"type": "session.update"}', "invalid_value", "session"),
        ('{"type": "session.update", "session": {"type": "realtime"}}', "invalid_value", "session.type"),
        ('{"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/opus"}}}}}',
         "invalid_value", "session.audio.input.format.type"),
        ('{"type": "session.update", "session": {"audio": {"input": {"format": {"type": []}}}}}',
         "invalid_value", "session.audio.input.format.type"),
        ('{"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcma", "rate": 9}}}}}',
         "invalid_value", "session.audio.input.format.rate"),
        ('{"type": "session.update", "session": {"audio": {"input": {"turn_detection": "server_vad"}}}}',
         "invalid_value", "session.audio.input.turn_detection"),
        ('{"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "vad"}}}}}',
         "invalid_value", "session.audio.input.turn_detection.type"),
        ('{"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"silence_duration_ms": 0}}}}}',
         "invalid_value", "session.audio.input.turn_detection.silence_duration_ms"),
        ('{"type": "transcription_session.update", "session": {"input_audio_format": {"a": 1}}}',
         "invalid_value", "session.input_audio_format"),
        ('{"type": "session.update", "session": {"audio": {"input": {"format": {"rate": 1e9}}}}}',
         "invalid_value", "session.audio.input.format.rate"),
        (b"odd", "invalid_value", "audio"),
    ],
)  # fmt: skip
def test_a_malformed_message_is_named_and_the_connection_goes_on(message, code, param):
    async def test(client, server):
        socket = await open_realtime(client)
        await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_str(message))
        error = (await until(socket, "error"))[-1]["error"]
        assert (error["code"], error["param"]) == (code, param) and "Traceback" not in error["message"]
        assert error["event_id"] == ("mine" if "mine" in str(message) else None)
        await socket.send_bytes(speech(1).tobytes())
        await socket.send_json(COMMIT)
        assert (await until(socket, ".completed"))[-1]["transcript"] == "w1"
        await socket.close()

    run(test)


def test_a_session_says_what_is_in_force_and_keeps_its_rate_within_audio():
    async def test(client, server):
        socket = await open_realtime(client, include=["cascade.partial", "else"])
        update = {"type": "session.update", "session": {"audio": {"input": {
            "turn_detection": {"type": "semantic_vad"}, "noise_reduction": {"type": "near_field"},
            "transcription": {"model": "whisper-1", "language": "en", "prompt": "names"},
        }}}}  # fmt: skip
        await socket.send_json(update)
        session = (await until(socket, "session.updated"))[-1]["session"]
        assert session["include"] == ["cascade.partial"] and session["type"] == "transcription"
        assert session["audio"]["input"] == {
            "format": {"type": "audio/pcm", "rate": RATE},
            "transcription": {"model": "fake", "hotwords": []},
            "turn_detection": {"type": "server_vad", "silence_duration_ms": 1200}, "noise_reduction": None,
        }  # fmt: skip
        await socket.send_bytes(speech(1).tobytes())
        update["session"]["audio"]["input"] = {"format": {"type": "audio/pcm", "rate": 2 * RATE}}
        await socket.send_json(update)
        assert (await until(socket, "error"))[-1]["error"]["param"] == "session.audio.input.format.rate"
        await socket.close()

    run(test)


def test_hotwords_hold_for_the_open_stream_and_for_those_that_follow():
    recognizer = FakeRecognizer()

    async def heard_with(socket):
        await socket.send_bytes(speech(1).tobytes())
        await until(socket, "cascade.partial")
        return recognizer.streams[-1].hotwords

    async def test(client, server):
        socket = await open_realtime(
            client, include=["cascade.partial"], audio={"transcription": {"hotwords": ["ada :2", "owl"]}}
        )
        assert await heard_with(socket) == ["ada :2", "owl"]
        wrong = (["a?"], ["a!"], "elk", ["elk"] * 1001, ["e" * 201], [1])
        cases = ((["elk"], ["elk"]), *((each, ["elk"]) for each in wrong), (None, []), (["yak"], ["yak"]))
        for hotwords, expected in cases:
            audio = {"input": {"transcription": {"hotwords": hotwords}}}
            await socket.send_json({"type": "session.update", "session": {"audio": audio}})
            if hotwords in (None, expected):
                session = (await until(socket, "session.updated"))[-1]["session"]
                assert session["audio"]["input"]["transcription"] == {"model": "fake", "hotwords": expected}
            else:
                error = (await until(socket, "error"))[-1]["error"]
                assert error["param"] == "session.audio.input.transcription.hotwords"
            assert await heard_with(socket) == expected
        await socket.send_json(COMMIT)
        await until(socket, "cascade.finished")
        assert await heard_with(socket) == ["yak"]
        await socket.close()

    run(test, recognizer=recognizer)


def test_keywords_are_hotwords_as_openai_calls_them():
    recognizer = FakeRecognizer()

    async def test(client, server):
        words = {"keywords": ["ada", "owl"], "hotwords": ["elk :2", "owl"]}
        socket = await open_realtime(client, include=["cascade.partial"], audio={"transcription": words})
        await socket.send_bytes(speech(1).tobytes())
        await until(socket, "cascade.partial")
        assert recognizer.streams[-1].hotwords == ["ada", "owl", "elk :2"]
        update = {"session": {"audio": {"input": {"transcription": {"keywords": ["a?"]}}}}}
        await socket.send_json({"type": "session.update", **update})
        error = (await until(socket, "error"))[-1]["error"]
        assert error["param"] == "session.audio.input.transcription.keywords"
        await socket.close()

    run(test, recognizer=recognizer)


def test_a_client_chooses_the_silence_that_ends_its_items_and_may_change_it():
    async def test(client, server):
        detection = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 100}
        socket, other = await open_realtime(client, audio={"turn_detection": detection}), await open_realtime(client)
        for each in (socket, other):
            await each.send_bytes(speech(1, 0, 2, 0, 3).tobytes())
            await each.send_json(COMMIT)
        texts = [event["transcript"] for event in of_kind(await until(socket, ".completed", 3), ".completed")]
        assert texts == ["w1", "w2", "w3"]
        assert (await until(other, ".completed"))[-1]["transcript"] == "w1 w2 w3"
        audio = {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 200}}}
        await socket.send_bytes(speech(4).tobytes())
        await socket.send_json({"type": "session.update", "session": {"audio": audio}})
        session = (await until(socket, "session.updated"))[-1]["session"]
        assert session["audio"]["input"]["turn_detection"] == {"type": "server_vad", "silence_duration_ms": 200}
        await socket.send_bytes(speech(0, 5, 0, 0, 6).tobytes())
        assert (await until(socket, ".completed"))[-1]["transcript"] == "w4 w5"
        await socket.close()
        await other.close()

    run(test)


@pytest.mark.parametrize("turn_detection", [None, {"type": "none"}])
def test_the_betas_events_and_names_are_understood(turn_detection):
    async def test(client, server):
        url, headers = "/v1/realtime?intent=transcription", {"OpenAI-Beta": "realtime=v1"}
        socket = await client.ws_connect(url, headers=headers)
        created = await socket.receive_json()
        assert created["type"] == "transcription_session.created"
        assert created["session"]["input_audio_format"] == "pcm16"
        session = {
            "input_audio_format": "g711_alaw", "input_audio_transcription": {"model": "whisper-1", "keywords": ["ada"]},
            "turn_detection": turn_detection, "input_audio_noise_reduction": {"type": "near_field"},
        }  # fmt: skip
        await socket.send_json({"type": "transcription_session.update", "session": session})
        updated = await socket.receive_json()
        assert updated["type"] == "transcription_session.updated"
        assert {**updated["session"], "id": 0} == {
            "id": 0, "object": "realtime.transcription_session", "include": [], "input_audio_format": "g711_alaw",
            "input_audio_transcription": {"model": "fake", "keywords": ["ada"], "hotwords": []},
            "turn_detection": None, "input_audio_noise_reduction": None,
        }  # fmt: skip
        await socket.send_json({"type": "session.update", "session": {"input_audio_format": "g711_ulaw"}})
        session = (await socket.receive_json())["session"]
        assert session["audio"]["input"]["format"] == {"type": "audio/pcmu", "rate": 8000}
        await socket.close()
        socket = await client.ws_connect(url)
        assert (await socket.receive_json())["type"] == "session.created"
        await socket.close()

    run(test)


def test_telephone_audio_is_what_another_decoder_makes_of_it():
    recording, laws = np.arange(-32768, 32768, 7).astype(np.int16), {"audio/pcmu": "ULAW", "audio/pcma": "ALAW"}
    for encoding, subtype in laws.items():
        file = io.BytesIO()
        soundfile.write(file, recording, 8000, subtype=subtype, format="RAW")
        samples = Settings(None, encoding, 8000).decode(file.getvalue())
        assert samples.dtype == np.int16 and len(samples) == len(recording)
        assert np.all(np.abs(samples - recording.astype(int)) <= 16 + np.abs(recording.astype(int)) / 16)


def test_audio_that_the_recogniser_refuses_is_one_error_for_a_packet():
    async def test(client, server):
        socket = await open_realtime(client, rate=2 * RATE)  # the fake one takes its own rate only
        await socket.send_bytes(speech(*range(1, 9)).tobytes())
        await socket.send_json(COMMIT)
        events = await until(socket, ".completed")
        assert len(of_kind(events, "error")) == 1 and events[-1]["transcript"] == ""
        await socket.close()

    run(test)


def test_when_decoding_fails_every_stream_is_told_and_begins_anew():
    async def test(client, server):
        sockets = [await open_realtime(client) for _ in range(2)]
        for socket in sockets:
            await socket.send_bytes(speech(1, 2, 3).tobytes())
            await until(socket, ".delta")
        await sockets[0].send_bytes(speech(BROKEN).tobytes())
        for socket in sockets:
            event = (await until(socket, ".failed"))[-1]
            assert event["error"]["code"] == "decoding_failed" and "broken" not in event["error"]["message"]
        for socket in sockets:
            await socket.send_bytes(speech(3).tobytes())
            await socket.send_json(COMMIT)
            assert (await until(socket, ".completed"))[-1]["transcript"] == "w3"
            await socket.close()

    run(test)


def test_clients_share_rounds_and_never_see_each_others_words():
    recognizer = FakeRecognizer(seconds=0.01)

    async def talk(client, number):
        socket = await open_realtime(client)
        mine = [100 * number + index for index in range(1, 10)]
        for value in mine:
            await socket.send_bytes(speech(value).tobytes())
            await asyncio.sleep(0.002 * number)
        await socket.send_json(COMMIT)
        events = await until(socket, ".completed")
        assert events[-1]["transcript"] == " ".join(f"w{value}" for value in mine) == text_of_deltas(events)
        await socket.close()

    async def test(client, server):
        await asyncio.gather(*(talk(client, number) for number in range(6)))

    run(test, recognizer=recognizer)
    assert recognizer.most_streams > 1
