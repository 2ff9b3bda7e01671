"""Transcribe recordings, or raw audio from a pipe while it comes in.

FILE is anything libsndfile reads (wav, flac, ogg, opus, mp3); other sampling rates are resampled, channels mixed down,
with a note. `-` reads raw signed 16-bit little-endian mono samples at --sampling-rate from standard input:

    arecord -q -t raw -f S16_LE -r 16000 | python -m cascade.bin.transcribe --exp-dir DIR -

On a terminal the text appears while it is decoded, and a pipe's segments are written as they end. Whatever is wrong
with an input is reported in one sentence, the others still run, and the exit code is 1. Ctrl-C or SIGTERM ends a pipe:
what was heard is decoded to its last word and written, recordings that are not finished are left out, and the exit code
is 75.

With --onnx-dir the exported files decode, in every mode and by both searches: the same text as PyTorch's on the audio
followed by zeros.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values, open_recognizer
from cascade.bin.score_arguments import add_score_arguments
from cascade.config.options import ConfigError
from cascade.processes.exits import EXIT_FAILED, Interrupted
from cascade.search.methods import METHODS, STREAMING_MODES
from cascade.stream.decoder import Segment
from cascade.stream.endpoint import EndpointOptions
from cascade.stream.inputs import PipeStop
from cascade.stream.subtitles import clock, format_srt, format_vtt
from cascade.stream.transcripts import PIPE, Job, Transcript, transcribe


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="recordings, or - for raw samples from a pipe")
    add_model_arguments(parser, or_onnx=True)
    parser.add_argument(
        "--mode", choices=STREAMING_MODES, default="two_pass",
        help="two_pass (default) shows first results at once, corrects them, and ends as full",
    )
    parser.add_argument("--method", choices=METHODS, default="greedy_search")
    add_search_arguments(parser)
    add_score_arguments(parser)
    parser.add_argument("--sampling-rate", type=int, metavar="HZ", help="of the pipe (default: the model's)")
    ends = EndpointOptions()
    for name, what in (
        ("silence-after-speech", "a segment ends after this silence"),
        ("silence-from-start", "a segment without words is dropped after this"),
        ("longest-segment", "a segment ends here at the latest, 30 at most"),
    ):
        default = getattr(ends, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=default, metavar="S", help=f"{what} ({default:g} s)")
    formats = parser.add_mutually_exclusive_group()
    for name, what in (("json", "one JSON object per file, in a line"), ("srt", "subtitles"), ("vtt", "subtitles")):
        formats.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=what)
    parser.add_argument("--out", type=Path, metavar="DIR", help="one file per input there, not standard output")
    parser.add_argument("--num-streams", type=int, default=8, metavar="N", help="files decoded together (default 8)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    arguments = parser.parse_args()
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    check_values(arguments, num_streams=1, threads=1, epoch=1, avg=1, sampling_rate=1000)
    if PIPE in arguments.files and sys.stdin is None:
        raise ConfigError("- is standard input, and it is closed")
    if arguments.files.count(PIPE) > 1:
        raise ConfigError("standard input can be read once: name - once")
    if arguments.sampling_rate is not None and PIPE not in arguments.files:
        raise ConfigError("--sampling-rate is that of the pipe (-); a file says its own")
    if arguments.format in ("srt", "vtt") and len(arguments.files) > 1 and arguments.out is None:
        raise ConfigError(f"--{arguments.format} of several files needs --out DIR, one file for each")
    if arguments.out is not None:
        names = [_stem(path) for path in arguments.files]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"--out DIR needs inputs of different names, got {', '.join(twice)} more than once")


class LiveText:
    """Text while it is decoded: segments stay; on a terminal, what may still change is in the last line."""

    def __init__(self, on_terminal: bool) -> None:
        self._on_terminal = on_terminal
        self._width = 0

    def show(self, job: Job) -> None:
        partial = job.decoder.partial()
        for segment in partial.segments:
            self._clear()
            print(segment_line(segment), flush=True)
        if not self._on_terminal:
            return
        columns = max(10, shutil.get_terminal_size().columns - 1)
        self._clear()
        print(partial.text[-columns:], end="", flush=True)
        self._width = min(len(partial.text), columns)

    def _clear(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="")
        self._width = 0


def segment_line(segment: Segment) -> str:
    return f"{clock(segment.start)} - {clock(segment.end)}  {segment.text}"


def formatted(transcript: Transcript, arguments: argparse.Namespace) -> str:
    """The text of one input in the format that was asked for, with its line ends."""
    if arguments.format == "json":
        return json.dumps(transcript.as_json(arguments.mode), ensure_ascii=False) + "\n"
    if arguments.format is not None:
        return {"srt": format_srt, "vtt": format_vtt}[arguments.format](transcript.segments)
    heading = f"# {transcript.path}\n" if len(arguments.files) > 1 and arguments.out is None else ""
    return heading + "".join(f"{segment_line(segment)}\n" for segment in transcript.segments)


def write(transcript: Transcript, arguments: argparse.Namespace, is_live: bool) -> None:
    """Write what became of one input, unless it is on standard output already; what cannot be written is its error."""
    if arguments.out is not None and (transcript.error is None or arguments.format == "json"):
        path = arguments.out / f"{_stem(transcript.path)}.{arguments.format or 'txt'}"
        try:
            path.write_text(formatted(transcript, arguments), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            transcript.error = transcript.error or f"{transcript.name}: its text cannot be written: {error}"
    elif not is_live and (transcript.error is None or arguments.format == "json"):
        print(formatted(transcript, arguments), end="", flush=True)
    if transcript.error is not None:
        print(f"error: {transcript.error}", file=sys.stderr, flush=True)


def _stem(path: str) -> str:
    return "stdin" if path == PIPE else Path(path).stem


def main() -> None:
    arguments = parse_arguments()
    endpoint = EndpointOptions(
        silence_from_start=arguments.silence_from_start, silence_after_speech=arguments.silence_after_speech,
        longest_segment=arguments.longest_segment,
    )
    recognizer = open_recognizer(arguments, arguments.mode, endpoint)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text, in JSON neither
    on_terminal = sys.stdout.isatty()
    is_live = arguments.format is None and arguments.out is None and (on_terminal or arguments.files == [PIPE])
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    num_failed = num_done = 0
    with PipeStop() as stop:
        transcripts = transcribe(
            arguments.files, recognizer.sampling_rate, lambda: recognizer.stream(keep_segments=not is_live),
            1 if is_live else arguments.num_streams, arguments.sampling_rate,
            LiveText(on_terminal).show if is_live else lambda job: None, stop,
        )
        for transcript in transcripts:
            num_done += 1
            write(transcript, arguments, is_live)
            num_failed += transcript.error is not None
    if stop.asked:
        raise Interrupted(
            f"{num_done} of {len(arguments.files)} inputs were transcribed"
            + (", standard input up to the signal" if PIPE in arguments.files else "")
        )
    if num_failed:
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    run_program(main)
