#!/usr/bin/env python
"""Speak sentences with eSpeak NG: python tools/synthesise.py --plan PLAN.jsonl --manifest DIR/NAME.jsonl.

PLAN.jsonl has one object per line: id, text, voice ("en-us+f3": an accent and a variant), and optionally
  rate_wpm (175), pitch (50, of 0 to 99), speaker
  lead, tail (seconds of silence before and after, 0)
  gain_db (0), noise ({"kind", "snr_db"}: cascade/corpus/synthetic/noise.py), seed (0; of the noise)
DIR gets NAME/<id>.flac (mono, --sampling-rate) and, last, NAME.jsonl: one line per utterance with id, path, text,
speaker and words, a list of [start, end] in seconds for each word of text. Starts are eSpeak's own word events; a word
ends where the next one starts, the last one with the speech.

eSpeak NG (GPL-3.0) comes as a shared library in the PyPI wheel espeakng-loader and is loaded by this program alone. The
same plan gives the same samples, on any number of cores: the library keeps state, so that a line's samples also depend
on the lines before it, but only in its part of the plan, which has a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import sys
import tempfile
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.audio.resample import resample  # noqa: E402
from cascade.bin.cli import run_program  # noqa: E402
from cascade.corpus.synthetic.noise import add_noise  # noqa: E402
from cascade.files import replacing  # noqa: E402
from cascade.log import progress  # noqa: E402
from cascade.processes.parts import check_stopped, compute_parts  # noqa: E402

# Numbers of espeak-ng's speak_lib.h, version 1.52.
AUDIO_OUTPUT_SYNCHRONOUS, INITIALIZE_DONT_EXIT, CHARS_UTF8 = 2, 0x8000, 1
EVENT_LIST_TERMINATED, EVENT_WORD = 0, 1
RATE, PITCH = 1, 3
LINES_PER_PART = 200
LONGEST_PATH = 120  # the library cuts its data path at 160 bytes
BETWEEN_WORDS = "\u200b "  # with a plain space, "in the" is one word to eSpeak; other words sound the same


class Event(ctypes.Structure):
    """espeak_EVENT."""

    _fields_ = [
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    ]


Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


def wheel():
    """The wheel that brings the library and its data."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("speech synthesis needs espeakng-loader: pip install espeakng-loader==0.2.4") from error
    return espeakng_loader


def voice_variants() -> dict[str, str]:
    """eSpeak's voice variants, sorted by name: what their files say."""
    files = sorted((Path(wheel().get_data_path()) / "voices" / "!v").iterdir())
    return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files}


class Espeak:
    """The library; one at a time in a process.

    Raises:
      ImportError: the wheel is not installed.
      OSError: the library does not start.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(wheel().get_library_path())
        data = wheel().get_data_path()
        if len(os.fsencode(data)) > LONGEST_PATH:
            self._short_path = tempfile.TemporaryDirectory(prefix="espeak-")
            link = os.path.join(self._short_path.name, "data")
            os.symlink(data, link)
            data = link
        self.sampling_rate = self._library.espeak_Initialize(
            AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data), INITIALIZE_DONT_EXIT
        )
        if self.sampling_rate <= 0:
            raise OSError(f"eSpeak NG does not start with its data in {data}")
        self._variants = set(voice_variants())
        self._samples: list[np.ndarray] = []
        self._words: list[tuple[int, int]] = []
        self._callback = Callback(self._receive)  # kept: the library holds no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, events) -> int:
        if count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != EVENT_LIST_TERMINATED:
            if events[index].type == EVENT_WORD:
                self._words.append((events[index].text_position - 1, events[index].sample))  # positions count from 1
            index += 1
        return 0

    def say(self, words: list[str], voice: str, rate_wpm: int = 175, pitch: int = 50) -> tuple[np.ndarray, list[int]]:
        """Speak a sentence.

        Returns:
          (num_samples,) float32 samples in [-1, 1] at `sampling_rate`, and the first sample of each word.
        Raises:
          ValueError: no such voice, or eSpeak does not tell a word's start (a rare word in a rare accent).
        """
        variant = voice.partition("+")[2]  # of which the library takes any
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0 or (variant and variant not in self._variants):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        lengths = [len(word) + len(BETWEEN_WORDS) for word in words]
        positions = [0, *accumulate(lengths[:-1])]
        samples, first_sample = self._speak(BETWEEN_WORDS.join(words).encode(), rate_wpm, pitch)
        for word, position in zip(words, positions, strict=True):
            if position not in first_sample:
                sentence = " ".join(words)
                raise ValueError(f"eSpeak NG tells no start for {word!r} in {sentence!r} ({voice}): use other words")
        return samples, [first_sample[position] for position in positions]

    def _speak(self, text: bytes, rate_wpm: int, pitch: int) -> tuple[np.ndarray, dict[int, int]]:
        self._library.espeak_SetParameter(RATE, int(rate_wpm), 0)
        self._library.espeak_SetParameter(PITCH, int(pitch), 0)
        self._samples, self._words = [], []
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breathy voices have noise in them
        self._library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 1, 0, CHARS_UTF8, None, None)
        samples = np.concatenate(self._samples) if self._samples else np.zeros(0, np.int16)
        # A number spelled out has an event for each part at one position: the first counts.
        return samples.astype(np.float32) / 32768, dict(reversed(self._words))


def speech_end(samples: np.ndarray, sampling_rate: int) -> int:
    """The sample after the last 10 ms that are within 40 dB of the loudest."""
    hop = sampling_rate // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    energy = (frames.astype(np.float64) ** 2).mean(axis=1)
    return (int(np.nonzero(energy > energy.max() * 1e-4)[0][-1]) + 1) * hop


def render(line: dict, espeak: Espeak, sampling_rate: int) -> tuple[np.ndarray, list[list[float]]]:
    """The samples of a line of the plan, and [start, end] in seconds of each word."""
    samples, starts = espeak.say(
        line["text"].split(), line["voice"], line.get("rate_wpm", 175), line.get("pitch", 50)
    )
    scale = 1 / espeak.sampling_rate
    samples = resample(samples, espeak.sampling_rate, sampling_rate)
    end = speech_end(samples, sampling_rate)
    lead, tail = (round(line.get(key, 0.0) * sampling_rate) for key in ("lead", "tail"))
    edges = [start * scale + lead / sampling_rate for start in starts] + [(lead + end) / sampling_rate]
    words = [[round(start, 4), round(stop, 4)] for start, stop in pairwise(edges)]
    samples = np.pad(samples[:end], (lead, tail))
    if "noise" in line:
        noise = line["noise"]
        samples = add_noise(samples, noise["kind"], noise["snr_db"], sampling_rate, line.get("seed", 0))
    peak = 0.95 * 10 ** (line.get("gain_db", 0.0) / 20)
    return samples * np.float32(peak / np.abs(samples).max()), words


def speak_part(part: tuple[list[dict], Path, int]) -> dict[str, dict]:
    """Write the audio of some lines of a plan into a folder at a rate; the lines of the manifest by id."""
    lines, folder, sampling_rate = part
    espeak, spoken = Espeak(), {}
    for line in lines:
        check_stopped()
        samples, words = render(line, espeak, sampling_rate)
        path = folder / f"{line['id']}.flac"
        soundfile.write(path, samples, sampling_rate, subtype="PCM_16", compression_level=0.0)
        spoken[line["id"]] = {
            "id": line["id"], "path": f"{folder.name}/{path.name}", "text": line["text"],
            "speaker": line.get("speaker", line["voice"]), "words": words,
        }
    return spoken


def synthesise(plan: Path, manifest: Path, sampling_rate: int) -> list[dict]:
    """Write the audio of a plan; the lines of its manifest."""
    if not plan.is_file():
        raise FileNotFoundError(f"--plan {plan} does not exist")
    wheel()  # where it is missing, this process says so
    folder = manifest.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in plan.read_text(encoding="utf-8").splitlines()]
    if len({line["id"] for line in lines}) < len(lines):
        raise ValueError(f"--plan {plan}: every line needs an id of its own")
    firsts = range(0, len(lines), LINES_PER_PART)
    parts = ((lines[first : first + LINES_PER_PART], folder, sampling_rate) for first in firsts)
    done = compute_parts(speak_part, parts, len(os.sched_getaffinity(0)), fresh=True)
    spoken: dict[str, dict] = {}
    for part in progress(done, f"speaking {manifest.stem}", len(firsts)):
        spoken |= part
    return [spoken[line["id"]] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="what to say, one object per line")
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE",
                        help="DIR/NAME.jsonl, audio in DIR/NAME")
    parser.add_argument("--sampling-rate", type=int, default=16000, metavar="HZ", help="of the audio (default 16000)")
    arguments = parser.parse_args()
    lines = synthesise(arguments.plan, arguments.manifest, arguments.sampling_rate)
    with replacing(arguments.manifest) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    logging.info("%s: %d utterances", arguments.manifest, len(lines))


if __name__ == "__main__":
    run_program(main)
