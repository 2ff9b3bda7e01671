"""Make the corpus: sentences from grammar.txt, voices and noise are drawn, tools/synthesise.py speaks them.

No sentence and no voice is in two splits: a voice is a variant of eSpeak's whatever its accent, and variants whose
names differ in a number only ("steph2", "steph3") count as one. --max-utterances keeps
the first ones as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cascade.bin.cli import run_program
from cascade.corpus.manifests import Utterance, read_manifest, write_about, write_manifest
from cascade.corpus.synthetic.grammar import Grammar
from cascade.corpus.synthetic.noise import KINDS
from cascade.data.augment import utterance_generator
from cascade.files import replacing
from tools.synthesise import voice_variants

SENTENCES = {"test": (400, 0.10), "dev": (200, 0.05), "train": (3500, 0.85)}  # how many; share of all sentences
ROUNDS_OF_WORDS = 5  # train also has each word alone, by so many voices: from these an encoder learns to listen first
NUM_VOICES = {"test": 9, "dev": 6}  # train has the rest
# (words per minute), (pitch, of 0 to 99); train has more of both than is measured, so that no voice lies at its edge
RATES = {"test": (140, 190), "dev": (140, 190), "train": (130, 205)}
PITCHES = {"test": (35, 65), "dev": (35, 65), "train": (20, 80)}
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland")
NOT_HUMAN = re.compile("robo|robot|demonic|croak|whisper", re.IGNORECASE)
FORMANT = re.compile(r"^\s*formant\s+[123]\s+(\d+)(?:\s+(\d+))?", re.MULTILINE)  # frequency and strength in percent


def sounds_human(name: str, description: str) -> bool:
    """Neither a robot nor a whisper, no Klatt synthesis, and the formants of vowels about where people have them."""
    if NOT_HUMAN.search(name) or re.search("^klatt", description, re.MULTILINE):
        return False
    formants = FORMANT.findall(description)
    return all(75 <= int(frequency) <= 135 and int(strength or 100) >= 50 for frequency, strength in formants)


def split_voices(seed: int) -> dict[str, list[str]]:
    """The voice variants of each split."""
    families: dict[str, list[str]] = {}
    for name, description in voice_variants().items():
        if sounds_human(name, description):
            family = name if re.fullmatch(r"[fm]\d", name) else name.rstrip("0123456789").lower()
            families.setdefault(family, []).append(name)
    order = [sorted(families)[index] for index in utterance_generator(seed, 0, "voices").permutation(len(families))]
    voices, first = {}, 0
    for split in SENTENCES:
        last = first + NUM_VOICES.get(split, len(order))
        voices[split] = [name for family in order[first:last] for name in families[family]]
        first = last
    return voices


def split_of(sentence: str, seed: int) -> str:
    """The split that a sentence belongs to, by its letters alone."""
    edges = np.cumsum([share for _, share in SENTENCES.values()])
    return list(SENTENCES)[int(np.searchsorted(edges[:-1], utterance_generator(seed, 0, sentence).random(), "right"))]


def draw_texts(split: str, seed: int, grammar: Grammar) -> list[str]:
    """Texts of a split."""
    generator, said = utterance_generator(seed, 0, f"sentences of {split}"), {}
    while len(said) < SENTENCES[split][0]:
        text = grammar.draw(generator)
        if split_of(text, seed) == split:
            said[text] = None
    words = grammar.words() * ROUNDS_OF_WORDS if split == "train" else []
    texts = [*said, *words]
    return [texts[index] for index in generator.permutation(len(texts))]


def plan(split: str, texts: list[str], seed: int, voices: list[str]) -> Iterator[dict]:
    """The lines for tools/synthesise.py: who says a text, how, and in what noise."""
    for index, text in enumerate(texts):
        name = f"{split}-{index:05d}"
        draw = utterance_generator(seed, 0, name)
        variant = str(draw.choice(voices))
        line = {
            "id": name, "text": text, "voice": f"{draw.choice(ACCENTS)}+{variant}", "speaker": variant,
            "rate_wpm": int(draw.integers(*RATES[split], endpoint=True)),
            "pitch": int(draw.integers(*PITCHES[split], endpoint=True)),
            "lead": round(draw.uniform(0.05, 0.4), 3), "tail": round(draw.uniform(0.1, 0.4), 3),
            "gain_db": round(-draw.uniform(0, 15), 1), "seed": int(draw.integers(1 << 31)),
        }
        # No recording is free of noise, but some have little.
        snr_db = draw.uniform(15, 30) if draw.random() < 0.5 else draw.uniform(30, 50)
        line["noise"] = {"kind": str(draw.choice(KINDS)), "snr_db": round(snr_db, 1)}
        yield line


def synthesise(out: Path, split: str, lines: Iterable[dict]) -> None:
    """Let tools/synthesise.py, which loads eSpeak NG, write a split's manifest and audio."""
    path = out / "plans" / f"{split}.jsonl"
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    command = [sys.executable, "tools/synthesise.py", "--plan", path, "--manifest", out / f"{split}.jsonl"]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for manifests and audio")
    parser.add_argument("--corpus-dir", type=Path, metavar="DIR", help="take what --out was earlier; speak nothing")
    parser.add_argument("--max-utterances", type=int, metavar="N", help="at most so many of each split")
    parser.add_argument("--seed", type=int, default=1, help="of sentences, voices and noise (default 1)")
    arguments = parser.parse_args()
    about = "commands to a home assistant in English, spoken by a synthesiser, eSpeak NG: no human voice"
    write_about(arguments.out, about, "Apache-2.0")
    if arguments.corpus_dir:
        for split in SENTENCES:
            lines = read_manifest(arguments.corpus_dir / f"{split}.jsonl")
            kept = [line for line in lines if isinstance(line, Utterance)][: arguments.max_utterances]
            write_manifest(arguments.out / f"{split}.jsonl", kept)
        return
    grammar = Grammar(Path(__file__).with_name("grammar.txt"))
    for split, voices in split_voices(arguments.seed).items():
        texts = draw_texts(split, arguments.seed, grammar)[: arguments.max_utterances]
        synthesise(arguments.out, split, plan(split, texts, arguments.seed, voices))


if __name__ == "__main__":
    run_program(main)
