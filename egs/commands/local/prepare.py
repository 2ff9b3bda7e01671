"""Make the corpus: sentences from grammar.txt, voices and noise are drawn, tools/synthesise.py speaks them.

No sentence and no voice is in two splits: a voice is a variant of eSpeak's whatever its accent, and variants whose
names differ in a number only ("steph2", "steph3") count as one. A split's first N utterances do not depend on how many
it has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from cascade.bin.cli import run_program
from cascade.data.augment import utterance_generator
from cascade.data.files import replacing
from cascade.data.grammar import Grammar
from cascade.data.synthetic_noise import KINDS
from tools.synthesise import voice_variants

SENTENCES = {"test": (400, 0.10), "dev": (200, 0.05), "train": (4000, 0.85)}  # how many; share of all sentences
NUM_VOICES = {"test": 12, "dev": 8}  # train has the rest
ACCENTS = ("en-us", "en-us-nyc", "en", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
NOT_HUMAN = re.compile("robo|robot|demonic|croak|whisper", re.IGNORECASE)


def split_voices(seed: int) -> dict[str, list[str]]:
    """The voice variants of each split."""
    families: dict[str, list[str]] = {}
    for name in voice_variants():
        if not NOT_HUMAN.search(name):
            family = name if re.fullmatch(r"[fm]\d", name) else name.rstrip("0123456789").lower()
            families.setdefault(family, []).append(name)
    order = [sorted(families)[index] for index in utterance_generator(seed, 0, "voices").permutation(len(families))]
    found, first = {}, 0
    for split in SENTENCES:
        last = first + NUM_VOICES.get(split, len(order))
        found[split] = [name for family in order[first:last] for name in families[family]]
        first = last
    return found


def split_of(sentence: str, seed: int) -> str:
    """The split that a sentence belongs to, by its letters alone."""
    edges = np.cumsum([share for _, share in SENTENCES.values()])
    return list(SENTENCES)[int(np.searchsorted(edges[:-1], utterance_generator(seed, 0, sentence).random(), "right"))]


def plan(split: str, count: int, seed: int, grammar: Grammar, voices: list[str]) -> list[dict]:
    """What is said in a split: `count` lines for tools/synthesise.py."""
    generator, said, lines = utterance_generator(seed, 0, f"sentences of {split}"), set(), []
    while len(lines) < count:
        text = grammar.draw(generator)
        if text in said or split_of(text, seed) != split:
            continue
        said.add(text)
        name = f"{split}-{len(lines):05d}"
        draw = utterance_generator(seed, 0, name)
        variant = str(draw.choice(voices))
        line = {
            "id": name, "text": text, "voice": f"{draw.choice(ACCENTS)}+{variant}", "speaker": variant,
            "rate_wpm": int(draw.integers(130, 216)), "pitch": int(draw.integers(30, 71)),
            "lead": round(draw.uniform(0.05, 0.5), 3), "tail": round(draw.uniform(0.1, 0.6), 3),
            "gain_db": round(-draw.uniform(0, 24), 1), "seed": int(draw.integers(1 << 31)),
        }
        if draw.random() < 0.8:
            line["noise"] = {"kind": str(draw.choice(KINDS)), "snr_db": round(draw.uniform(5, 30), 1)}
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for manifests and audio")
    parser.add_argument("--max-utterances", type=int, metavar="N", help="at most so many of each split")
    parser.add_argument("--seed", type=int, default=1, help="of sentences, voices and noise (default 1)")
    arguments = parser.parse_args()
    grammar = Grammar(Path(__file__).with_name("grammar.txt"))
    for split, voices in split_voices(arguments.seed).items():
        count = min(SENTENCES[split][0], arguments.max_utterances or SENTENCES[split][0])
        path = arguments.out / "plans" / f"{split}.jsonl"
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in plan(split, count, arguments.seed, grammar, voices))
        manifest = arguments.out / f"{split}.jsonl"
        done = subprocess.run([sys.executable, "tools/synthesise.py", "--plan", path, "--manifest", manifest])
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    run_program(main)
