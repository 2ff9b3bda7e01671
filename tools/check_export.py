"""Compare what exported files say with what PyTorch says: every utterance, in every mode and by both searches.

Two utterances at a time are one stream, with a pause between them that ends a segment, so that what is kept behind an
endpoint is compared too; several streams of different age hear packets of random sizes in one batch, which they join
and leave. Both engines hear the same zeros at the end. Exit code 1 if a token, a timestamp or a segment differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import check_values  # noqa: E402
from cascade.corpus.cuts import Speech, read_speech  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.recognizer import Recognizer  # noqa: E402
from cascade.search.methods import METHODS, STREAMING_MODES  # noqa: E402
from cascade.stream.decoder import Final  # noqa: E402
from tools.check_streaming import conclude, stream_all  # noqa: E402

PAUSE_SECONDS = 1.6


def join_pairs(speech: list[Speech], rate: int, chunk_seconds: float) -> list[Speech]:
    """Utterances two by two, pauses behind both, to a whole number of chunks."""
    chunk, pause, pairs = round(rate * chunk_seconds), np.zeros(round(rate * PAUSE_SECONDS), np.float32), []
    for pair in (speech[start : start + 2] for start in range(0, len(speech), 2)):
        samples = np.concatenate([part for utterance in pair for part in (utterance.samples, pause)])
        padded = np.pad(samples, (0, -len(samples) % chunk))
        pairs.append(pair[0]._replace(samples=padded))
    return pairs


def said(final: Final) -> list[tuple[int, str, tuple[int, ...], tuple[int, ...]]]:
    return [
        (part.first_frame, part.rule, part.hypotheses[0].tokens, part.hypotheses[0].timestamps)
        for part in final.segments
    ]


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
    exported = json.loads((arguments.onnx_dir / "export.json").read_text(encoding="utf-8"))
    options = {name: exported[name] for name in ("chunk_ms", "look_ahead_ms", "left_context_ms")}
    rows, speech = [], None
    for mode, method in product(arguments.modes, arguments.methods):
        files = Recognizer(arguments.onnx_dir, mode=mode, method=method)
        model = Recognizer(
            arguments.exp_dir, mode=mode, method=method, device="cpu", threads=arguments.threads, **options,
            **exported["decoding"],
        )  # fmt: skip
        if speech is None:
            speech = join_pairs(
                read_speech(arguments.manifest, model.sampling_rate), model.sampling_rate, model.chunk_seconds
            )
        # The files hear one more chunk of zeros when a stream ends.
        tail = round(model.sampling_rate * model.chunk_seconds)
        longer = [item._replace(samples=np.pad(item.samples, (0, tail))) for item in speech]
        theirs = stream_all(files, speech, arguments.num_streams, arguments.seed)
        ours = stream_all(model, longer, arguments.num_streams, arguments.seed)
        row = {"mode": mode, "method": method, "num_streams": len(ours), "num_segments": 0, "num_tokens": 0}
        row["num_identical"] = 0
        for name, final in ours.items():
            expected, got = said(final), said(theirs[name])
            row["num_segments"] += len(expected)
            row["num_tokens"] += sum(len(tokens) for _, _, tokens, _ in expected)
            row["num_identical"] += expected == got
            if expected != got:
                logging.warning("%s: the files say %s, PyTorch says %s", name, got, expected)
        rows.append(row | {"commit": git_commit(), "command": command_line(), "machine": machine()})
        print(
            f"{mode:<11}{method:<22}{row['num_identical']:>5} of {row['num_streams']} streams identical, "
            f"{row['num_segments']} segments, {row['num_tokens']} tokens", flush=True,
        )  # fmt: skip
    conclude(rows, "num_streams", "the exported files differ from PyTorch", arguments.json)


if __name__ == "__main__":
    run_program(main)
