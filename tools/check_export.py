"""Compare what exported files say with what PyTorch says: every utterance, in every mode and by both searches.

Two utterances at a time are one stream, with a pause between them that ends a segment, so that what is kept behind an
endpoint is compared too; several streams of different age hear packets of random sizes in one batch, which they join
and leave. Both sides hear the same zeros at the end. Rows of engine onnx are our own streams on the files; rows of
sherpa-onnx are its online recognisers with its own endpoints, and for encoder-full.onnx its offline one on whole
utterances. PyTorch then keeps labels at endpoints as sherpa-onnx's greedy search does; its beam search, which goes on
from old hypotheses beside an empty one, is compared without endpoints. Exit code 1 if a token, a timestamp or a segment
differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import check_values  # noqa: E402
from cascade.config.options import ENCODER_FRAME_MS, FRAME_SHIFT_MS, FeatureConfig  # noqa: E402
from cascade.corpus.cuts import Speech, read_speech  # noqa: E402
from cascade.export.onnx import FULL, LOOK_AHEAD, STREAMING  # noqa: E402
from cascade.export.sherpa import decode_offline, open_recogniser, read_results, spell  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.recognizer import PAUSES, Recognizer  # noqa: E402
from cascade.search.methods import METHODS, STREAMING_MODES  # noqa: E402
from cascade.stream.decoder import Final  # noqa: E402
from cascade.stream.endpoint import LONGEST_SEGMENT, EndpointOptions  # noqa: E402
from cascade.text.tokens import Tokenizer  # noqa: E402
from tools.check_streaming import conclude, stream_all  # noqa: E402

PAUSE_SECONDS = 1.6
FILES = {"streaming": STREAMING, "look_ahead": LOOK_AHEAD, "full": FULL}
LIKE_SHERPA = EndpointOptions(late_pause=LONGEST_SEGMENT - 1, longest_segment=LONGEST_SEGMENT)
"""Without the pause that is short in long segments, which sherpa-onnx does not know."""
Said = dict[str, list[Any]]
"""Stream -> what its segments say."""


def join_pairs(speech: list[Speech], rate: int, step_seconds: float) -> list[Speech]:
    """Utterances two by two, pauses behind both, to a whole number of steps."""
    step, pause, pairs = round(rate * step_seconds), np.zeros(round(rate * PAUSE_SECONDS), np.float32), []
    for pair in (speech[start : start + 2] for start in range(0, len(speech), 2)):
        samples = np.concatenate([part for utterance in pair for part in (utterance.samples, pause)])
        padded = np.pad(samples, (0, -len(samples) % step))
        pairs.append(pair[0]._replace(samples=padded))
    return pairs


def with_tail(speech: list[Speech], num_zeros: int) -> list[Speech]:
    return [utterance._replace(samples=np.pad(utterance.samples, (0, num_zeros))) for utterance in speech]


def exact(final: Final) -> list[Any]:
    return [
        (part.first_frame, part.rule, part.hypotheses[0].tokens, part.hypotheses[0].timestamps)
        for part in final.segments
    ]


class SherpaRecognizer:
    """sherpa-onnx's online recogniser, as `stream_all` drives ours; a stream's final is a list of its segments."""

    def __init__(
        self, folder: Path, features: FeatureConfig, mode: str, method: str, step_ms: int, endpoints: bool
    ) -> None:  # fmt: skip
        # Half a frame less than ours, so that no rounding matters; nobody ends a segment before the longest one.
        half = ENCODER_FRAME_MS / 2000
        self.recogniser = open_recogniser(
            folder, FILES[mode], features, decoding_method=method, enable_endpoint_detection=endpoints,
            rule1_min_trailing_silence=LIKE_SHERPA.silence_from_start - half,
            rule2_min_trailing_silence=LIKE_SHERPA.silence_after_speech - half,
            rule3_min_utterance_length=LIKE_SHERPA.longest_segment - step_ms / 1000 + half,
        )
        self.sampling_rate = features.sampling_rate
        self.streams: list[SherpaStream] = []

    def stream(self) -> SherpaStream:
        self.streams.append(SherpaStream(self.recogniser))
        return self.streams[-1]

    def advance(self) -> None:
        while ready := [each for each in self.streams if self.recogniser.is_ready(each.stream)]:
            self.recogniser.decode_streams([each.stream for each in ready])
            for each in ready:
                if self.recogniser.is_endpoint(each.stream):
                    each.end_segment()
        self.streams = [each for each in self.streams if not each.ended]


class SherpaStream:
    def __init__(self, recogniser: Any) -> None:
        self.recogniser, self.stream, self.segments, self.ended = recogniser, recogniser.create_stream(), [], False

    def push(self, samples: np.ndarray, rate: int) -> None:
        self.stream.accept_waveform(rate, samples)

    def end(self) -> None:
        self.stream.input_finished()
        self.ended = True

    def end_segment(self) -> None:
        said = read_results([self.recogniser.get_result_all(self.stream)])[0]
        self.segments += [said] if said else []
        self.recogniser.reset(self.stream)

    def final(self) -> list[Any]:
        self.end_segment()
        return self.segments


def keep_labels(search: Any) -> Callable[..., None]:
    """What a mode does at an endpoint, with the labels of the segment, over silence too, as in sherpa-onnx."""
    return lambda stream, **_: search.restart(stream.row, keep_context=True, over_silence=True)


class Comparison:
    """The exported folder and the model beside each other, on one test set."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        metadata = json.loads((arguments.onnx_dir / "export.json").read_text(encoding="utf-8"))
        self.times = {name: metadata[name] for name in ("chunk_ms", "look_ahead_ms", "left_context_ms")}
        self.decoding = metadata["decoding"]
        self.features = FeatureConfig(metadata["sampling_rate"], metadata["num_mel_bins"])
        self.rate = self.features.sampling_rate
        self.speech = read_speech(arguments.manifest, self.rate)
        self.pairs = join_pairs(self.speech, self.rate, self.times["look_ahead_ms"] / 1000)

    def model(self, mode: str, method: str, endpoint: EndpointOptions | None) -> Recognizer:
        arguments = self.arguments
        return Recognizer(
            arguments.exp_dir, mode=mode, method=method, endpoint=endpoint, device="cpu", threads=arguments.threads,
            **self.times, **self.decoding,
        )  # fmt: skip

    def stream(self, recognizer: Any, speech: list[Speech]) -> dict[str, Any]:
        return stream_all(recognizer, speech, self.arguments.num_streams, self.arguments.seed)

    def our_runtime(self, mode: str, method: str) -> tuple[Said, Said]:
        """What PyTorch and our streams on the files say."""
        files = Recognizer(self.arguments.onnx_dir, mode=mode, method=method)
        theirs = self.stream(files, self.pairs)
        # The files hear one more chunk of zeros when a stream ends.
        longer = with_tail(self.pairs, self.rate * self.times["chunk_ms"] // 1000)
        ours = self.stream(self.model(mode, method, PAUSES), longer)
        return *({name: exact(final) for name, final in finals.items()} for finals in (ours, theirs)),  # fmt: skip

    def sherpa(self, mode: str, method: str) -> tuple[Said, Said]:
        """What PyTorch and sherpa-onnx say."""
        tokenizer = Tokenizer.load(self.arguments.onnx_dir)
        if mode == "full":
            recogniser = open_recogniser(self.arguments.onnx_dir, FULL, self.features, decoding_method=method)
            theirs, size = {}, self.arguments.num_streams
            for part in (self.speech[start : start + size] for start in range(0, len(self.speech), size)):
                said = decode_offline(recogniser, [utterance.samples for utterance in part], self.rate)
                theirs |= {utterance.id: [each] if each else [] for utterance, each in zip(part, said, strict=True)}
            ours = self.stream(self.model(mode, method, None), self.speech)
        else:
            step_ms = self.times["look_ahead_ms" if mode == "look_ahead" else "chunk_ms"]
            endpoint = LIKE_SHERPA if method == "greedy_search" else None
            folder, features = self.arguments.onnx_dir, self.features
            files = SherpaRecognizer(folder, features, mode, method, step_ms, endpoint is not None)
            speech = with_tail(self.pairs, self.rate * FRAME_SHIFT_MS // 1000)  # a step needs a frame behind it
            theirs = self.stream(files, speech)
            model = self.model(mode, method, endpoint)
            model._batch.mode.restart = keep_labels(model._batch.mode.search)
            ours = self.stream(model, speech)
        spelled = {
            name: [spell(segment.hypotheses[0], tokenizer) for segment in final.segments]
            for name, final in ours.items()
        }
        return spelled, theirs


def comparisons(arguments: argparse.Namespace, both: Comparison) -> Iterator[tuple[str, str, str, tuple[Said, Said]]]:
    """Engine, mode, method and what both say."""
    for mode, method in product(arguments.modes, arguments.methods):
        yield "onnx", mode, method, both.our_runtime(mode, method)
    if not (arguments.onnx_dir / FULL).is_file():
        logging.warning("sherpa-onnx has no LSTM predictor: it is not compared")
        return
    if importlib.util.find_spec("sherpa_onnx") is None:
        logging.warning("sherpa-onnx is not installed, it is not compared: pip install sherpa-onnx")
        return
    for mode, method in product((mode for mode in arguments.modes if mode in FILES), arguments.methods):
        yield "sherpa-onnx", mode, method, both.sherpa(mode, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", type=Path, required=True, metavar="DIR", help="the model directory")
    parser.add_argument("--onnx-dir", type=Path, required=True, metavar="DIR", help="what export_onnx made of it")
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="CUTS.jsonl.gz or MANIFEST.jsonl")
    parser.add_argument("--modes", nargs="+", choices=STREAMING_MODES, default=STREAMING_MODES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--num-streams", type=int, default=6, metavar="N", help="streams at once (default 6)")
    parser.add_argument("--seed", type=int, default=1, help="of packets and of the streams' order (default 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of PyTorch (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    arguments = parser.parse_args()
    check_values(arguments, num_streams=1, threads=1)
    rows = []
    for engine, mode, method, (ours, theirs) in comparisons(arguments, Comparison(arguments)):
        row = {"engine": engine, "mode": mode, "method": method, "num_streams": len(ours), "num_segments": 0}
        row |= {"num_tokens": 0, "num_identical": 0}
        for name, expected in ours.items():
            row["num_segments"] += len(expected)
            row["num_tokens"] += sum(len(part[2] if engine == "onnx" else part) for part in expected)
            row["num_identical"] += expected == theirs[name]
            if expected != theirs[name]:
                logging.warning("%s: the files say %s, PyTorch says %s", name, theirs[name], expected)
        rows.append(row | {"commit": git_commit(), "command": command_line(), "machine": machine()})
        print(
            f"{engine:<12}{mode:<11}{method:<22}{row['num_identical']:>5} of {row['num_streams']} streams identical, "
            f"{row['num_segments']} segments, {row['num_tokens']} tokens", flush=True,
        )  # fmt: skip
    conclude(rows, "num_streams", "the exported files differ from PyTorch", arguments.json)


if __name__ == "__main__":
    run_program(main)
