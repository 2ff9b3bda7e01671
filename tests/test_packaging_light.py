"""Decoding exported files needs nothing of training: `pip install .`, and the same by an import hook, which is fast."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np
import pytest
import soundfile

from cascade import Recognizer
from cascade.audio.io import read_audio
from cascade.bin import transcribe
from cascade.checkpoint import load_model
from cascade.export.onnx import build_graphs, write_files
from cascade.export.sherpa import synthetic_recordings
from cascade.text.ngram_training import train_ngram, write_arpa
from cascade.text.tokens import Tokenizer
from tests.export.conftest import GEOMETRY, TEXTS, make_model_dir
from tests.tiny_run import call

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("torch", "lhotse", "omegaconf", "numba", "scipy", "tqdm", "onnx", "sherpa_onnx")
HOOK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
"""
ABOUT = {
    "chunk_ms": 80, "look_ahead_ms": 160, "left_context_ms": 240, "sampling_rate": 16000, "num_mel_bins": 80,
    "decoding": {"blank_penalty": 0.0},
}
SAY = """
import json, sys
import numpy as np, soundfile
from cascade import Recognizer
stream = Recognizer(sys.argv[1]).stream()
samples, rate = soundfile.read(sys.argv[2], dtype="int16")
partials = [stream.accept(packet, rate).text for packet in np.array_split(samples, 9)]
final = stream.finish()
loaded = sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[3].split()))
print(json.dumps([partials, [[word.word, word.start, word.end] for word in final.words], loaded]))
"""


class Model(NamedTuple):
    exp_dir: Path
    onnx_dir: Path
    recording: Path
    """48 kHz, two channels."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    root = tmp_path_factory.mktemp("light")
    exp_dir = make_model_dir(root / "student", "stateless, left, other heads and kernel")  # BPE tokens
    (root / "onnx").mkdir()
    write_files(build_graphs(load_model(exp_dir)[0], GEOMETRY), exp_dir / "tokens", root / "onnx", {"chunk_ms": 80})
    (root / "onnx" / "export.json").write_text(json.dumps(ABOUT))
    samples = synthetic_recordings((2.3,), 48000, seed=5).popitem()[1]
    (root / "hotwords.txt").write_text("seven eight\n")
    (root / "text.txt").write_text("\n".join(TEXTS))
    tokenizer = Tokenizer.load(exp_dir / "tokens")
    write_arpa(train_ngram([root / "text.txt"], tokenizer, 2), tokenizer, root / "ngram.arpa")
    soundfile.write(root / "a.wav", np.stack((samples, samples), axis=1), 48000)
    return Model(exp_dir, root / "onnx", root / "a.wav")


def refuse(folder: Path, *names: str) -> dict[str, str]:
    """The environment of a process that cannot import these packages."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK.format(names=set(names)))
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def install(folder: Path) -> dict[str, str]:
    """The environment of a process in a new venv with `pip install .[server]`.

    The source is copied, because setuptools builds in it; the versions are those of requirements.txt.
    """
    source = folder / "source"
    shutil.copytree(ROOT / "cascade", source / "cascade", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(folder / "venv", with_pip=True)
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "-c", ROOT / "requirements.txt", f"{source}[server]"], capture_output=True, text=True, timeout=900
    )
    if re.search("NameResolution|ConnectionError|unreachable|timed out|ProxyError|SSLError", done.stderr):
        pytest.skip("PyPI does not answer")
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}


@pytest.fixture(scope="module", params=["refused imports", pytest.param("pip install .", marks=pytest.mark.slow)])
def light(request, tmp_path_factory) -> Callable[..., subprocess.Popen]:
    """light(*words) starts a Python that has none of ABSENT."""
    folder = tmp_path_factory.mktemp("without")
    is_real = request.param == "pip install ."
    environment = install(folder) if is_real else refuse(folder, *ABSENT)
    python = folder / "venv" / "bin" / "python" if is_real else sys.executable

    return lambda *words: start(python, words, environment)


def start(python: str | Path, words: Sequence[object], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [python, *map(str, words)], env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    return out, error


def test_nothing_of_training_is_there(light):
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n try: importlib.import_module(name)\n " \
        "except ModuleNotFoundError: continue\n print(name)"
    assert finish(light("-c", code, *ABSENT))[0] == ""


@pytest.mark.parametrize(("method", "with_scores"), [
    ("greedy_search", False), ("modified_beam_search", False), ("modified_beam_search", True),
])  # fmt: skip
def test_transcribe_says_what_it_says_in_the_full_environment(light, model, monkeypatch, capsys, method, with_scores):
    words = ["--onnx-dir", model.onnx_dir, "--json", "--method", method, model.recording]
    if with_scores:
        root = model.onnx_dir.parent
        words += ["--hotwords", root / "hotwords.txt", "--ngram", root / "ngram.arpa", "--lm-scale", 0.3]
    ours = json.loads(finish(light("-m", "cascade.bin.transcribe", *words))[0])
    call(monkeypatch, transcribe, *words)
    theirs = json.loads(capsys.readouterr().out)
    for line in (ours, theirs):
        for segment in line["segments"]:
            for word in segment["words"]:
                assert 0 < word.pop("confidence") <= 1  # sums of numpy and of numba differ in the last digits
    assert ours == theirs and ours["text"] and ours["error"] is None


def test_a_recogniser_says_what_it_says_in_the_full_environment(light, model):
    samples, rate = soundfile.read(model.recording, dtype="int16")
    soundfile.write(model.recording.with_name("mono.wav"), samples[:, 0], rate)
    partials, words, loaded = json.loads(
        finish(light("-c", SAY, model.onnx_dir, model.recording.with_name("mono.wav"), " ".join(ABSENT)))[0]
    )
    stream = Recognizer(model.onnx_dir).stream()
    assert partials == [stream.accept(packet, rate).text for packet in np.array_split(samples[:, 0], 9)]
    assert words == [[word.word, word.start, word.end] for word in stream.finish().words] and words and any(partials)
    assert loaded == []


def test_serve_says_what_it_says_in_the_full_environment(light, model):
    samples = read_audio(model.recording, 16000)[0]
    stream = Recognizer(model.onnx_dir).stream()
    stream.accept(samples, 16000)
    expected = stream.finish().text
    process = light("-m", "cascade.bin.serve", "--onnx-dir", model.onnx_dir, "--port", 0, "--max-streams", 2)
    try:
        log = ""
        while not (match := re.search(r"http://127\.0\.0\.1:\d+", log)):
            log += process.stderr.readline() or pytest.fail(log)

        async def talk() -> str:
            """A turn of sherpa-onnx's client."""
            async with aiohttp.ClientSession() as client, client.ws_connect(match[0]) as socket:
                for packet in np.array_split(samples, 5):
                    await socket.send_bytes(packet.astype("<f4").tobytes())
                await socket.send_str("Done")
                texts = []
                async for message in socket:
                    if message.data == "Done!":
                        break
                    texts.append(json.loads(message.data))
                return " ".join(text["text"].strip() for text in texts if text["is_final"])

        assert asyncio.run(asyncio.wait_for(talk(), 120)) == expected != ""
    finally:
        process.terminate()
        process.wait(60)


def test_a_model_directory_is_refused_in_one_sentence_that_says_what_to_do(light, model):
    said = r"is a model directory .*needs the package torch: run pip install '\.\[train\]' .*cascade\.bin\.export_onnx"
    for words in (["transcribe", model.recording], ["serve", "--port", 0]):
        _, error = finish(light("-m", f"cascade.bin.{words[0]}", "--exp-dir", model.exp_dir, *words[1:]), 1)
        assert re.fullmatch(rf"error: {model.exp_dir} {said}.*\n", error)
    code = "import sys; from cascade import Recognizer\ntry: Recognizer(sys.argv[1])\n" \
        "except ImportError as error: print(error)"
    assert re.fullmatch(rf"{model.exp_dir} {said}.*\n", finish(light("-c", code, model.exp_dir))[0])


@pytest.mark.parametrize("name", ["encoder-streaming.onnx", "encoder-noncausal.onnx"])
def test_a_damaged_file_is_named(model, tmp_path, name):
    shutil.copytree(model.onnx_dir, tmp_path / "onnx")
    (tmp_path / "onnx" / name).write_bytes((model.onnx_dir / name).read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{name} is damaged, or not for this onnxruntime .*: export again"):
        Recognizer(tmp_path / "onnx")


def test_a_program_of_training_says_what_it_needs(light):
    for program, name in (("train", "torch"), ("prepare_data", "(lhotse|omegaconf|numba|torch)")):
        error = finish(light("-m", f"cascade.bin.{program}", "--help"), 1)[1]
        sentence = rf"this program needs the package {name}: run pip install '\.\[train\]' in the repository's folder"
        assert re.fullmatch(f"error: {sentence}\n", error)


def test_what_decoding_can_do_without_is_asked_for_when_it_is_needed(model, tmp_path):
    def run(*words, code=0):
        return finish(start(sys.executable, words, environment), code)

    environment = refuse(tmp_path / "spelling", "sentencepiece", "aiohttp")
    out, _ = run("-m", "cascade.bin.transcribe", "--onnx-dir", model.onnx_dir, "--json", model.recording)
    assert json.loads(out)["text"]
    encode = f"from cascade.text.tokens import Tokenizer; Tokenizer.load({str(model.onnx_dir)!r}).encode('one')"
    error = run("-c", encode, code=1)[1]
    assert "turning text into bpe tokens needs the package sentencepiece: pip install sentencepiece" in error
    error = run("-m", "cascade.bin.serve", "--onnx-dir", model.onnx_dir, code=1)[1]
    assert re.fullmatch(r"error: the server needs aiohttp .*: pip install aiohttp\n", error)
    environment = refuse(tmp_path / "graphs", "onnxruntime")
    error = run("-m", "cascade.bin.transcribe", "--onnx-dir", model.onnx_dir, model.recording, code=1)[1]
    assert error.endswith("error: running ONNX files needs onnxruntime: pip install onnxruntime\n")
