"""An upgrade on /: sherpa-onnx's online WebSocket protocol."""

import json

import numpy as np

from tests.server.fake import speech
from tests.server.harness import run


def floats(*values: int) -> bytes:
    return speech(*values).astype("<f4").tobytes()


async def messages(socket) -> list[dict]:
    """All JSON messages up to `Done!`."""
    texts = []
    while (text := await socket.receive_str()) != "Done!":
        texts.append(json.loads(text))
    return texts


def test_results_come_as_the_text_changes_then_the_segments_then_done():
    async def test(client, server):
        socket = await client.ws_connect("/")
        for value in (0, 1, 2, 0, 0, 0, 3):
            await socket.send_bytes(floats(value))
        await socket.send_str("Done")
        texts = await messages(socket)
        assert len({json.dumps(text) for text in texts}) == len(texts)
        first, last = [text for text in texts if text["is_final"]]
        assert (first["text"], first["segment"], first["is_eof"]) == ("w1 w2", 0, False)
        assert (last["text"], last["segment"], last["is_eof"]) == ("w3", 1, True) and last == texts[-1]
        assert first["tokens"] == [" w1", " w2"] and first["start_time"] == 0.0
        np.testing.assert_allclose(first["timestamps"], [0.1, 0.2])
        np.testing.assert_allclose([last["start_time"], *last["timestamps"]], [0.6, 0.0])
        await socket.close()

    run(test)


def test_the_end_without_speech_is_an_empty_final_result():
    async def test(client, server):
        socket = await client.ws_connect("/")
        await socket.send_str("Done")
        (text,) = await messages(socket)
        assert text["text"] == "" and text["is_final"] and text["is_eof"]
        await socket.close()

    run(test)


def test_what_is_no_audio_is_answered_by_an_error_and_nothing_follows_done():
    async def test(client, server):
        socket = await client.ws_connect("/")
        for message in ("hello", b"odd"):
            await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_str(message))
            assert "float32" in (await socket.receive_json())["error"]
        await socket.send_bytes(floats(1))
        await socket.send_str("Done")
        await socket.send_bytes(floats(2))
        assert (await messages(socket))[-1]["text"] == "w1"
        await socket.close()

    run(test)
