#!/usr/bin/env python
"""Measure what a list of hotwords does: errors in its words, in all others, false alarms, and what the search costs.

Rare words of the references, those outside of the --common most frequent words of --text, are the listed words. A list
holds them and so many distractors, rare words of the text that no reference has; an unused list is distractors alone.
Utterances are encoded once and searched with every list and scale. Rows of --json: {mode, method, beam, list (none |
listed | unused), phrases, distractors, scale; all, listed and others: error rates in all words, in the listed ones and
in the others (a deletion or substitution counts where the reference's word belongs, an insertion where its own does);
alarms: false alarms, words of the list that were not said, of 100 reference words; each of the four without a list
(wer_a) and with it (wer_b), the difference in points and its 95 % intervals over utterances and speakers
(`cascade.bin.compare`); false_alarms and base_false_alarms: their numbers with and without the list; cpu_ratio: the
search's processor time over that without a list}.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values, load_for_decoding  # noqa: E402
from cascade.data.decode_batches import decode_batches  # noqa: E402
from cascade.files import read_lines  # noqa: E402
from cascade.measure.compare import Hypotheses, compare  # noqa: E402
from cascade.measure.wer import Alignment, score  # noqa: E402
from cascade.models.torch_engine import TorchEngine, encode_batch  # noqa: E402
from cascade.models.transducer import MODES  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.search.hotwords import Hotwords  # noqa: E402
from cascade.search.methods import METHODS, DecodingOptions, build_search  # noqa: E402
from cascade.text.normal import split_words  # noqa: E402
from cascade.text.tokens import Tokenizer  # noqa: E402
from cascade.threads import limit_threads  # noqa: E402


@dataclass(frozen=True)
class Encoded:
    """Utterances through the encoder, a batch."""

    ids: list[str]
    frames: np.ndarray
    lens: np.ndarray


@dataclass(frozen=True)
class Decoded:
    """Alignments of one search's results with the references, and its time."""

    alignments: dict[str, Alignment]
    cpu_seconds: float


def words_by_frequency(paths: Iterable[Path], tokenizer: Tokenizer) -> list[str]:
    """The words of texts, most frequent first, ties in alphabetical order."""
    counts: Counter[str] = Counter()
    for path in paths:
        for line in read_lines(path):
            counts.update(line.decode().split())
    normal: Counter[str] = Counter()
    for word, count in counts.items():
        for part in split_words(tokenizer.normalize(word)):
            normal[part] += count
    return sorted(normal, key=lambda word: (-normal[word], word))


def search_all(batches: Sequence[Encoded], references: dict[str, str], search: Any, tokenizer: Tokenizer) -> Decoded:
    start, texts = time.process_time(), {}
    for batch in batches:
        for name, hypotheses in zip(batch.ids, search.decode(batch.frames, batch.lens), strict=True):
            texts[name] = tokenizer.decode(hypotheses[0].tokens)
    seconds = time.process_time() - start
    scored = score((name, references[name], text) for name, text in texts.items())
    return Decoded({utterance.id: utterance.alignment for utterance in scored.utterances}, seconds)


def errors_of(alignment: Alignment, words: set[str], inside: bool) -> tuple[int, int]:
    """Errors and reference words of an alignment that belong to `words`, or (inside=False) that do not."""
    own = [(ref, hyp) for ref, hyp in alignment if ((hyp if ref is None else ref) in words) == inside]
    return sum(ref != hyp for ref, hyp in own), sum(ref is not None for ref, _ in own)


def false_alarms(alignment: Alignment, phrases: set[str]) -> tuple[int, int]:
    """Words of the list that were recognised where something else, or nothing, was said; and all reference words."""
    alarms = sum(hyp in phrases and ref != hyp for ref, hyp in alignment)
    return alarms, sum(ref is not None for ref, _ in alignment)


def measure(decoded: Decoded, base: Decoded, speakers: dict[str, str], listed: set[str], phrases: set[str]) -> dict:
    def of(side: Decoded, count: Callable[[Alignment], tuple[int, int]]) -> Hypotheses:
        counts = {name: count(alignment) for name, alignment in side.alignments.items()}
        errors, words = ({name: pair[place] for name, pair in counts.items()} for place in (0, 1))
        return Hypotheses(errors, dict.fromkeys(counts, ""), words, speakers)

    row: dict[str, Any] = {}
    for name, count in {
        "all": lambda alignment: errors_of(alignment, set(), False),
        "listed": lambda alignment: errors_of(alignment, listed, True),
        "others": lambda alignment: errors_of(alignment, listed, False),
        "alarms": lambda alignment: false_alarms(alignment, phrases),
    }.items():
        comparison = compare([(of(base, count), of(decoded, count))])
        row[name] = asdict(comparison) | {"difference": comparison.difference, "relative": comparison.relative}
    row["false_alarms"], row["base_false_alarms"] = (
        sum(false_alarms(alignment, phrases)[0] for alignment in side.alignments.values()) for side in (decoded, base)
    )
    row["cpu_ratio"] = round(decoded.cpu_seconds / base.cpu_seconds, 3)
    return row


def show(row: dict[str, Any]) -> None:
    def interval(name: str) -> str:
        bounds = row[name]["over_utterances"]
        return f"{row[name]['difference']:+.2f} [{bounds['low']:+.2f}, {bounds['high']:+.2f}]"

    logging.info(
        "%s %s: %s list of %d, scale %g: WER %.2f %s, listed %.2f %s, others %.2f %s, false alarms %d (%d), "
        "of 100 words %s, cpu x %.2f",
        row["mode"], row["method"], row["list"], row["phrases"], row["scale"], row["all"]["wer_b"], interval("all"),
        row["listed"]["wer_b"], interval("listed"), row["others"]["wer_b"], interval("others"), row["false_alarms"],
        row["base_false_alarms"], interval("alarms"), row["cpu_ratio"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_search_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="CUTS.jsonl.gz or MANIFEST.jsonl")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="says which words are rare")
    parser.add_argument("--common", type=int, default=5000, metavar="K", help="this many words are not rare (5000)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["streaming", "full"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--distractors", type=int, nargs="+", default=[0, 100, 1000], metavar="N")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0], metavar="S")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of distractors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    arguments = parser.parse_args()
    check_values(arguments, epoch=1, avg=1, common=1)
    limit_threads(1)
    model, config, tokenizer, options = load_for_decoding(arguments, "look_ahead", beam=arguments.beam)
    engine, batches = TorchEngine(model), decode_batches(arguments.manifest, config, 200.0)
    loaded = list(batches)
    references = {name: text for batch in loaded for name, text in zip(batch.ids, batch.texts, strict=True)}
    frequent = words_by_frequency(arguments.text, tokenizer)
    said = {word for text in references.values() for word in split_words(text)}
    rare = [word for word in frequent[arguments.common :] if word not in said]
    listed = sorted(word for word in said - set(frequent[: arguments.common]) if not tokenizer.unknown_characters(word))
    random.Random(arguments.seed).shuffle(rare)
    known = (word for word in rare if not tokenizer.unknown_characters(word))
    distractors = list(islice(known, max(arguments.distractors)))
    logging.info("%d utterances, %d listed words of %d", len(references), len(listed), len(said))
    lists = [("listed", number, listed + distractors[:number]) for number in arguments.distractors]
    lists += [("unused", number, distractors[:number]) for number in arguments.distractors if number]
    rows = []
    for mode in arguments.modes:
        chosen = replace(options, mode=mode)
        encoded = []
        for batch in loaded:
            frames, lens = encode_batch(model, batch.features, batch.feature_lens, chosen)
            encoded.append(Encoded(batch.ids, frames.cpu().numpy(), lens.cpu().numpy()))
        for method in arguments.methods:
            rows += measure_search(
                replace(chosen, method=method), engine, encoded, references, batches.speakers, tokenizer, set(listed),
                lists, arguments.scales,
            )  # fmt: skip
            if arguments.json is not None:
                provenance = {"commit": git_commit(), "command": command_line(), "machine": machine()}
                text = json.dumps([row | provenance for row in rows], indent=1)
                arguments.json.write_text(text + "\n", encoding="utf-8")


def measure_search(
    options: DecodingOptions, engine: TorchEngine, encoded: Sequence[Encoded], references: dict[str, str],
    speakers: dict[str, str], tokenizer: Tokenizer, listed: set[str], lists: Sequence[tuple[str, int, list[str]]],
    scales: Sequence[float],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one mode and search."""

    def run(*scorers: Hotwords) -> Decoded:
        return search_all(encoded, references, build_search(engine, options, tokenizer.unk_id, scorers), tokenizer)

    base, rows = run(), []
    for name, number, phrases, scale in [("none", 0, [], 0.0), *((*each, scale) for scale in scales for each in lists)]:
        decoded = run(Hotwords(tokenizer, phrases, scale)) if phrases else base
        row = {
            "mode": options.mode, "method": options.method,
            "beam": options.beam if options.method == "modified_beam_search" else None,
            "list": name, "phrases": len(phrases), "distractors": number, "scale": scale,
            **measure(decoded, base, speakers, listed, set(phrases)),
        }  # fmt: skip
        show(row)
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_program(main)
