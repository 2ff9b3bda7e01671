"""Word errors against scorers that others wrote: kaldialign (PyPI) and NIST's sclite (Debian's package sctk)."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cascade.measure.wer import ErrorCounts, align, count_errors, score

ROOT = Path(__file__).resolve().parents[2]
SCLITE = next(filter(None, map(shutil.which, ("sclite", "sctk"))), None)


def corrupted(words, rng, vocabulary, rate):
    """Words left out, replaced and put in, each in a third of `rate` of all places."""
    found = []
    for word in words:
        draw = rng.random()
        found += [] if draw < rate / 3 else [rng.choice(vocabulary)] if draw < 2 * rate / 3 else [word]
        found += [rng.choice(vocabulary)] if draw > 1 - rate / 3 else []
    return found


def real_texts():
    """(reference, hypothesis) of pieces of the licence, none to half of their words wrong."""
    rng = random.Random(1)
    words = re.findall(r"[a-z]+", (ROOT / "LICENSE").read_text().lower())
    assert len(words) > 1500
    vocabulary, pairs = sorted(set(words)), []
    while len(words) > 25:
        count = rng.randrange(1, 25)
        reference, words = words[:count], words[count:]
        pairs.append((reference, corrupted(reference, rng, vocabulary, rng.choice([0.0, 0.1, 0.3, 0.5]))))
    return [*pairs, (["nothing", "heard"], []), (["one"], ["one"])]


def random_texts():
    """(reference, hypothesis) of up to a dozen words out of four, so that there are many alignments of equal cost."""
    rng = random.Random(2)
    return [tuple(rng.choices("abcd", k=rng.randrange(1, 13)) for _ in range(2)) for _ in range(400)]


def our_score(pairs):
    texts = ((str(index), " ".join(ref), " ".join(hyp)) for index, (ref, hyp) in enumerate(pairs))
    return score(texts).words


def test_kaldialign_counts_as_many_errors_in_every_utterance():
    kaldialign = pytest.importorskip("kaldialign", reason="not installed: pip install kaldialign")
    for pairs in (real_texts(), random_texts()):
        errors = 0
        for reference, hypothesis in pairs:
            theirs = kaldialign.edit_distance(reference, hypothesis)
            ours = count_errors(align(reference, hypothesis))
            assert (ours.errors, ours.reference) == (theirs["total"], theirs["ref_len"])
            assert ours.insertions - ours.deletions == theirs["ins"] - theirs["del"]
            assert ours.substitutions <= theirs["sub"]  # of alignments with as many errors ours has the fewest
            errors += theirs["total"]
        assert our_score(pairs).errors == errors > 0


def sclite(pairs, folder):
    """The totals that sclite prints."""
    for name, column in (("ref", 0), ("hyp", 1)):
        lines = [f"{' '.join(pair[column])} (one-{index:05d})\n" for index, pair in enumerate(pairs)]
        (folder / f"{name}.trn").write_text("".join(lines))
    command = [SCLITE, *(["sclite"] if Path(SCLITE).name == "sctk" else [])]
    command += ["-r", "ref.trn", "trn", "-h", "hyp.trn", "trn", "-i", "spu_id", "-s", "-o", "rsum", "stdout"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    row = re.search(r"\| Sum +\|([ \d|]+)", done.stdout)
    assert row, done.stdout + done.stderr
    numbers = map(int, row[1].replace("|", " ").split())
    sentences, reference, correct, substitutions, deletions, insertions, errors, _ = numbers
    counts = ErrorCounts(reference, substitutions, deletions, insertions)
    assert sentences == len(pairs) and errors == counts.errors and correct == reference - substitutions - deletions
    return counts


@pytest.mark.skipif(SCLITE is None, reason="sclite is not installed (Debian and Ubuntu: apt install sctk)")
def test_sclite_counts_the_same_errors(tmp_path):
    assert sclite(real_texts(), tmp_path) == our_score(real_texts())


@pytest.mark.skipif(SCLITE is None, reason="sclite is not installed (Debian and Ubuntu: apt install sctk)")
def test_sclite_never_finds_fewer_errors(tmp_path):
    """Its costs 4, 3, 3 trade three substitutions for two deletions and two insertions, where ours count errors."""
    theirs, ours = sclite(random_texts(), tmp_path), our_score(random_texts())
    assert theirs.reference == ours.reference and theirs.errors >= ours.errors
    assert theirs.insertions - theirs.deletions == ours.insertions - ours.deletions
    assert 3 * theirs.errors + theirs.substitutions <= 3 * ours.errors + ours.substitutions
