import gzip

import numpy as np
import pytest

from cascade.text import overlap
from cascade.text.overlap import shared_sequences


@pytest.mark.parametrize("words_per_block", [1, 10, 10**6])
def test_sequences_are_found_once_inside_of_lines_only_and_in_the_form_of_transcripts(
    tmp_path, monkeypatch, words_per_block
):
    monkeypatch.setattr(overlap, "WORDS_PER_BLOCK", words_per_block)
    (tmp_path / "a.txt").write_text("X a b c d\na b c\nd e\nC D E f\n\n")
    with gzip.open(tmp_path / "b.gz", "wt") as file:
        file.write("a b c d a b c d\n")
    sentences = ["A b c d", "c d e f a b", "a b c d", "too short"]
    texts = [tmp_path / "a.txt", tmp_path / "b.gz"]
    assert shared_sequences(sentences, texts, str.lower, 3) == (4, 6)  # abc bcd cde def, not efa fab
    assert shared_sequences(sentences, texts, str.lower, 4) == (2, 4)
    assert shared_sequences(sentences, texts, str, 3) == (2, 7)  # abc and bcd, as they are written
    assert shared_sequences(["too short"], texts, str, 3) == (0, 0)


def test_random_text_agrees_with_sets(tmp_path):
    generator = np.random.default_rng(0)
    lines = [" ".join(map(str, generator.integers(0, 4, size))) for size in generator.integers(1, 60, 300)]
    (tmp_path / "text").write_text("\n".join(lines[100:]))

    def sequences(lines):
        return {tuple(line.split()[at : at + 6]) for line in lines for at in range(len(line.split()) - 5)}

    expected = sequences(lines[:100]) & sequences(lines[100:])
    assert shared_sequences(lines[:100], [tmp_path / "text"], str) == (len(expected), len(sequences(lines[:100])))
    assert 0 < len(expected) < len(sequences(lines[:100]))
