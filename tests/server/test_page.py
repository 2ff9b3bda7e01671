"""The page in a real browser: what it shows is what the server heard, decoded by `transcribe`.

PAGE_SCREENSHOTS=DIR keeps pictures.
"""

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from aiohttp.test_utils import TestServer

from cascade import Recognizer
from cascade.bin import transcribe
from cascade.server.app import Server
from cascade.server.worker import Worker
from tests.server.browser import CHROMIUM, browsing
from tests.tiny_run import call, make_manifest, make_model_dir

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
FINAL_TEXT = "[...document.querySelectorAll('#final p')].map((line) => line.textContent.trim()).join(' ')"
WATCH = """
    globalThis.seen = new Set();
    const look = () => document.querySelectorAll("#open span").forEach((word) => seen.add(word.className));
    new MutationObserver(look).observe(document.getElementById("open"), { childList: true });
"""
PENALTY = -4.0  # the tiny model says a word at every frame without it
DONE = "document.getElementById('status').textContent.startsWith('Done')"


class Listening(Recognizer):
    """A recogniser that keeps what its streams hear."""

    def stream(self, hotwords=None, *, keep_segments=True):
        stream = super().stream(hotwords, keep_segments=keep_segments)
        push, packets = stream.push, []

        def keep(samples, rate):
            packets.append(samples)
            self.rate = rate
            push(samples, rate)

        stream.push = keep
        self.heard = packets
        return stream


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_model_dir(folder / "student")
    make_manifest(folder)
    sounds = [soundfile.read(folder / f"{number}.wav")[0] for number in (0, 2)]
    soundfile.write(folder / "talk.wav", np.concatenate((*sounds, np.zeros(32000), sounds[0])), 16000)
    return folder


def visit(run_dir: Path, test, **options) -> Listening:
    """Run `test(page, server)` in a browser at a server; returns the recogniser with what it has heard."""

    async def main() -> Listening:
        server = Server(Worker(lambda: Listening(run_dir / "student", threads=1, blank_penalty=PENALTY), **options), [])
        recognizer = await server.start()
        async with TestServer(server.app) as site:
            async with browsing(str(site.make_url("/")), run_dir / "talk.wav") as page:
                await test(page, server)
                errors = [event for event in page.events if event["method"] == "Runtime.exceptionThrown"]
                assert not errors, errors
            while server.num_streams:
                await asyncio.sleep(0.05)
            await server.drain()
        return recognizer

    return asyncio.run(asyncio.wait_for(main(), 300))


def transcribed(recognizer: Listening, run_dir: Path, monkeypatch, capsys, *arguments: str) -> str:
    """What `transcribe` makes of the audio that the server has heard."""
    soundfile.write(run_dir / "heard.wav", np.concatenate(recognizer.heard), recognizer.rate, subtype="PCM_16")
    capsys.readouterr()
    model = ["--exp-dir", run_dir / "student", f"--blank-penalty={PENALTY}"]
    call(monkeypatch, transcribe, *model, *arguments, run_dir / "heard.wav")
    return capsys.readouterr().out


async def picture(page, name: str) -> None:
    if folder := os.environ.get("PAGE_SCREENSHOTS"):
        await page.screenshot(Path(folder) / f"{name}.png")


def test_what_the_page_shows_and_downloads_is_what_the_server_heard(run_dir, tmp_path, monkeypatch, capsys):
    shown = {}

    async def test(page, server):
        await page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        await page.run(WATCH)
        await page.run("document.getElementById('record').click()")
        await page.until("seen.has('stable') && seen.has('streaming')")
        await picture(page, "listening")
        await page.until("parseFloat(document.getElementById('heard').textContent) > 6")
        await page.run("document.getElementById('record').click()")
        await page.until(DONE)
        await picture(page, "done")
        shown["text"] = await page.run(FINAL_TEXT)
        assert await page.run("document.getElementById('open').textContent") == ""
        assert (await page.run("document.getElementById('delay').textContent")).endswith(" s")
        assert (await page.run("document.getElementById('flicker').textContent")).endswith(" %")
        await page.run("document.getElementById('transcript').focus()")
        for key in ("ArrowRight", "ArrowRight"):
            await page.press(key)
        assert await page.run("document.activeElement === document.querySelectorAll('#final span')[1]")
        assert "confidence" in await page.run("document.getElementById('word').textContent")
        await page.run("document.getElementById('download').click()")
        while not (tmp_path / "speech.srt").is_file():
            await asyncio.sleep(0.1)
        await page.run("document.getElementById('clear').click()")
        assert await page.run("document.querySelectorAll('#final *, #open *').length") == 0
        assert server.num_streams == 0

    recognizer = visit(run_dir, test)
    srt = transcribed(recognizer, run_dir, monkeypatch, capsys, "--srt")
    assert (tmp_path / "speech.srt").read_text() == srt.rstrip("\n") + "\n"
    assert shown["text"] == " ".join(line for line in srt.split("\n")[2::4]) != ""


def test_a_recording_is_read_on_a_phone_and_a_full_server_says_so(run_dir):
    shown = {}

    async def test(page, server):
        await page.resize(390, 844, is_phone=True)
        document = await page.call("DOM.getDocument")
        field = await page.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector="#file")
        files = {"files": [str(run_dir / "talk.wav")], "nodeId": field["nodeId"]}
        await page.call("DOM.setFileInputFiles", **files)
        await page.until(DONE)
        shown["text"] = await page.run(FINAL_TEXT)
        assert await page.run("document.documentElement.scrollWidth <= innerWidth")
        await picture(page, "phone")
        with server._worker.session():
            await page.call("DOM.setFileInputFiles", **files)
            await page.until("document.getElementById('problem').textContent.includes('full')")
            await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
            await picture(page, "full, dark")
        await page.run("document.getElementById('record').click()")
        await page.until("document.getElementById('status').textContent === 'Listening.'")
        await server.drain()
        await page.until("document.getElementById('problem').textContent.includes('going down')")
        assert await page.run("document.getElementById('record').textContent") == "Start microphone"
        await picture(page, "server gone")

    visit(run_dir, test, max_streams=1)
    assert shown["text"]


def test_hotwords_reach_the_stream_while_it_listens_and_impossible_ones_are_named(run_dir):
    type_in = "field = document.getElementById('hotwords'); field.value = {}; field.dispatchEvent(new Event('input'))"

    async def test(page, server):
        preferred, problem = (f"document.getElementById('{name}').textContent" for name in ("preferred", "problem"))
        await page.run(type_in.format(r"'two three\n\n five :2.5 '"))
        await page.run("document.getElementById('record').click()")
        await page.until(f"{preferred} === ': 2 preferred'")
        (session,) = server._worker._sessions
        assert session._hotwords == ["two three", "five :2.5"]
        await page.run(type_in.format("'seven'"))
        await page.until(f"{problem}.includes('seven')")
        assert session._hotwords == ["two three", "five :2.5"]
        await page.run(type_in.format("'four'"))
        await page.until(f"{preferred} === ': 1 preferred' && {problem} === ''")
        assert session._hotwords == ["four"]
        await page.run("document.getElementById('record').click()")
        await page.until(DONE)

    visit(run_dir, test)
