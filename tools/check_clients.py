"""Clients that others wrote talk to a server of this model: they must get the text that `Recognizer` gives.

    python tools/check_clients.py --exp-dir egs/an4/exp/student recording.flac

OpenAI's Python package (realtime connection, its beta too, and transcription call) and sherpa-onnx's WebSocket client
(C++). They are no dependencies: both are installed from PyPI into an environment of their own, --environment DIR, made
when it is not there.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import re
import socket
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.serving import serving  # noqa: E402

PACKAGES = ("openai[realtime]==3.57.0", "sherpa-onnx-bin==2.0.1")
RATE = 16000
PACKET = 1600


def talk_as_openai(url: str, recording: Path) -> None:
    """Run by the environment's Python: print what each of OpenAI's calls says, a line each."""
    import wave

    import openai

    with wave.open(str(recording)) as file:
        samples = file.readframes(file.getnframes())
    client = openai.OpenAI(base_url=f"{url}/v1", websocket_base_url=f"{url}/v1".replace("http", "ws"), api_key="none",
                           max_retries=0)  # fmt: skip
    if not client.models.list().data:
        sys.exit("error: /v1/models names no model")

    def talk(connection) -> str:
        """The items' texts, until what is committed is answered."""
        for start in range(0, len(samples), 2 * PACKET):
            packet = base64.b64encode(samples[start : start + 2 * PACKET]).decode()
            connection.input_audio_buffer.append(audio=packet)
        connection.input_audio_buffer.commit()
        deltas = ""
        for event in connection:
            if event.type.endswith("transcription.delta"):
                deltas += event.delta
            elif event.type.endswith("transcription.completed"):
                return f"{event.transcript}\nits deltas: {deltas}"
            assert event.type != "error", event
        raise AssertionError("the connection ended")

    for turn_detection in (None, {"type": "server_vad", "silence_duration_ms": 5000}):
        with client.realtime.connect(model="any") as connection:
            assert connection.recv().type == "session.created"
            audio = {"input": {"format": {"type": "audio/pcm", "rate": RATE}, "turn_detection": turn_detection}}
            connection.session.update(session={"type": "transcription", "audio": audio})
            updated = connection.recv()
            assert updated.type == "session.updated", updated
            in_force = updated.session.audio.input.turn_detection
            assert (in_force and in_force.silence_duration_ms) == (turn_detection and 5000), updated
            print(f"openai realtime, turn detection {turn_detection}: {talk(connection)}")
    with client.realtime.connect(model="any") as connection:
        connection.recv()
        connection.session.update(session={"type": "realtime"}, event_id="mine")
        error = connection.recv().error
        assert (error.event_id, error.param) == ("mine", "session.type"), error
    with client.beta.realtime.connect(model="any", extra_query={"intent": "transcription"}) as connection:
        assert connection.recv().type == "transcription_session.created"
        session = {"input_audio_format": "pcm16", "turn_detection": None}
        connection.transcription_session.update(session=session)
        assert connection.recv().type == "transcription_session.updated"
        connection.session.update(session={"audio": {"input": {"format": {"type": "audio/pcm", "rate": RATE}}}})
        assert connection.recv().type == "session.updated"
        print(f"openai beta.realtime: {talk(connection)}")
    with open(recording, "rb") as file:
        events = list(client.audio.transcriptions.create(model="any", file=file, stream=True, response_format="text"))
    print(f"openai transcription, stream: {events[-1].text}")
    print(f"its deltas: {''.join(event.delta for event in events[:-1])}")
    with open(recording, "rb") as file:
        try:
            client.audio.transcriptions.create(model="any", file=file, keywords=["a" * 300])
        except openai.BadRequestError as error:
            assert error.param == "keywords", error
        else:
            raise AssertionError("a keyword of 300 characters was taken")
    for response_format in ("json", "verbose_json", "text", "srt"):
        with open(recording, "rb") as file:
            granularities = ["word", "segment"] if response_format == "verbose_json" else openai.omit
            answer = client.audio.transcriptions.create(
                model="any", file=file, response_format=response_format, timestamp_granularities=granularities
            )
        text = answer if isinstance(answer, str) else answer.text
        if response_format == "verbose_json":
            assert " ".join(word.word for word in answer.words) == text and answer.segments[0].start >= 0
        lines = [line for line in text.splitlines() if line and not line.isdigit() and "-->" not in line]
        print(f"openai transcription, {response_format}: {' '.join(lines)}")


def talk_as_sherpa(environment: Path, url: str, recording: Path) -> str:
    """The last text of sherpa-onnx's client."""
    command = [environment / "bin" / "sherpa-onnx-online-websocket-client", "--seconds-per-message=0.1"]
    port = url.rpartition(":")[2]
    command += [f"--server-port={port}", f"--samples-per-message={PACKET}", recording]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    output = finished.stdout + finished.stderr
    if "Done!" not in output:
        sys.exit(f"error: sherpa-onnx's client ended with {finished.returncode}: {output}")
    return " ".join(re.findall(r'"text": "([^"]+)"[^\n]*"is_final": true', output))


def make_environment(folder: Path) -> None:
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)


def free_port() -> int:
    """A port below 32768: sherpa-onnx's client keeps ports in 16 bits with a sign."""
    for port in range(20000, 32768):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    sys.exit("error: no port from 20000 to 32767 is free")


def write_recording(source: str, path: Path) -> None:
    """The recording as 16-bit samples at 16 kHz, which is what all these clients read."""
    import soundfile

    from cascade.audio.io import read_audio

    soundfile.write(path, read_audio(source, RATE)[0], RATE, subtype="PCM_16")


def expected_text(model: Path, recording: Path) -> str:
    import soundfile

    from cascade import Recognizer

    stream = Recognizer(model, threads=1).stream()
    samples = soundfile.read(recording, dtype="int16")[0]
    for start in range(0, len(samples), PACKET):
        stream.accept(samples[start : start + PACKET], RATE)
    return stream.finish().text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording")
    parser.add_argument("--exp-dir", type=Path, metavar="DIR", help="model directory")
    parser.add_argument("--onnx-dir", type=Path, metavar="DIR", help="what export_onnx wrote, instead")
    parser.add_argument("--environment", type=Path, metavar="DIR", help="of the clients (default: a temporary one)")
    parser.add_argument("--url", help=argparse.SUPPRESS)  # for the part that runs in that environment
    arguments = parser.parse_args()
    if arguments.url:
        talk_as_openai(arguments.url, Path(arguments.recording))
        return
    model = arguments.onnx_dir or arguments.exp_dir
    if model is None:
        parser.error("--exp-dir or --onnx-dir: name a model")
    source = "--onnx-dir" if arguments.onnx_dir else "--exp-dir"
    with tempfile.TemporaryDirectory() as folder:
        environment, recording = arguments.environment or Path(folder) / "clients", Path(folder) / "recording.wav"
        make_environment(environment)
        write_recording(arguments.recording, recording)
        with serving(source, model, "--port", free_port()) as server:
            lines = subprocess.run(
                [environment / "bin" / "python", __file__, recording, "--url", server.url],
                check=True, stdout=subprocess.PIPE, text=True, env={},
            ).stdout.splitlines()  # fmt: skip
            lines.append(f"sherpa-onnx: {talk_as_sherpa(environment, server.url, recording)}")
        text = expected_text(model, recording)
    print(f"Recognizer: {text}", *lines, sep="\n")
    wrong = [line for line in lines if not line.endswith(f": {text}") and not line.startswith("its deltas")]
    if wrong or not text:
        sys.exit(f"error: {len(wrong)} of {len(lines)} answers differ")


if __name__ == "__main__":
    main()
