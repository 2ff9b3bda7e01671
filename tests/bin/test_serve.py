"""The program, as a process: it listens, says what `transcribe` says, and ends with everybody's last words."""

import asyncio
import json
import re
import signal
import subprocess
import sys

import aiohttp
import numpy as np
import pytest
import soundfile

from cascade import Recognizer
from cascade.bin import serve
from cascade.config.options import ConfigError
from tests.tiny_run import call


def pcm(run_dir, number):
    return soundfile.read(run_dir / f"{number}.wav", dtype="int16")[0]


async def talk(base: str, run_dir, ready: asyncio.Event) -> str:
    """The text of a recording that is sent in two packets and never committed."""
    update = {"type": "session.update", "session": {"audio": {"input": {"format": {"rate": 16000}}}}}
    async with aiohttp.ClientSession() as client, client.ws_connect(f"{base}/v1/realtime") as socket:
        await socket.send_json(update)
        for packet in np.array_split(pcm(run_dir, 2), 2):
            await socket.send_bytes(packet.tobytes())
        async for message in socket:
            event = json.loads(message.data)
            if event["type"].endswith("speech_started"):
                ready.set()
            if event["type"].endswith(".completed"):
                assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE and socket.close_code == 1001
                return event["transcript"]


def test_a_signal_ends_the_program_after_the_last_words(run_dir):
    stream = Recognizer(run_dir / "student").stream()
    for packet in np.array_split(pcm(run_dir, 2), 2):
        stream.accept(packet, 16000)
    expected = stream.finish().text
    command = [sys.executable, "-m", "cascade.bin.serve", "--exp-dir", str(run_dir / "student"), "--port", "0"]
    process = subprocess.Popen([*command, "--max-streams", "2"], stderr=subprocess.PIPE, text=True)
    try:
        log = []
        while not (match := re.search(r"student: (http://127\.0\.0\.1:\d+), 2 streams at most", "".join(log))):
            log.append(process.stderr.readline())
            assert log[-1], "".join(log)

        async def main() -> str:
            ready = asyncio.Event()
            talking = asyncio.create_task(talk(match[1], run_dir, ready))
            await ready.wait()
            process.send_signal(signal.SIGTERM)
            return await talking

        assert asyncio.run(asyncio.wait_for(main(), 120)) == expected != ""
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (["--max-streams", 0], ConfigError, "--max-streams must be at least 1, got 0"),
    (["--port", 70000], ConfigError, "--port must be 0 to 65535"),
    (["--idle", 0], ConfigError, "--idle must be positive, got 0"),
    (["--certificate", "c.pem"], ConfigError, "--certificate and --key belong together"),
    (["--api-key-file", "none"], FileNotFoundError, "none"),
    (["--chunk-ms", 50], ConfigError, "--chunk-ms must be a positive multiple of 40 ms"),
    (["--epoch", 9], FileNotFoundError, "epoch-9"),
])  # fmt: skip
def test_wrong_options_are_errors_that_name_them(run_dir, monkeypatch, arguments, error, message):
    with pytest.raises(error, match=message):
        call(monkeypatch, serve, "--exp-dir", run_dir / "student", "--port", 0, *arguments)


def test_a_folder_that_is_no_export_is_named(run_dir, monkeypatch):
    with pytest.raises(FileNotFoundError, match="export.json not found: --onnx-dir is a folder that export_onnx wrote"):
        call(monkeypatch, serve, "--onnx-dir", run_dir, "--port", 0)
