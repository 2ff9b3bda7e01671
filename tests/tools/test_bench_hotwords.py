import gzip

import numpy as np

from cascade.measure.wer import align
from cascade.text.tokens import Tokenizer
from tools.bench_hotwords import Decoded, errors_of, false_alarms, measure, words_by_frequency

REFERENCE, WORDS = "see the owl and the elk", {"owl", "elk"}


def decoded(**texts):
    return Decoded({name: align(REFERENCE.split(), text.split()) for name, text in texts.items()}, 1.0)


def test_an_error_belongs_to_the_word_of_the_reference_and_an_insertion_to_its_own():
    for text, listed, others in (
        (REFERENCE, 0, 0), ("see the howl and the", 2, 0), ("see an owl and owl the elk so", 1, 2), ("", 2, 4),
    ):  # fmt: skip
        alignment = align(REFERENCE.split(), text.split())
        assert errors_of(alignment, WORDS, True) == (listed, 2)
        assert errors_of(alignment, WORDS, False) == (others, 4)


def test_both_parts_add_up_and_false_alarms_are_words_of_the_list_that_nobody_said():
    base, now = decoded(a="see the howl and the elk", b=REFERENCE), decoded(a=REFERENCE, b="see a owl and the yak elk")
    row = measure(now, base, {}, WORDS, WORDS | {"yak", "gnu"})
    errors = [row[name]["wer_b"] * row[name]["num_words"] / 100 for name in ("all", "listed", "others")]
    assert np.allclose(errors, [2, 0, 2]) and row["listed"]["difference"] == -25.0
    assert (row["false_alarms"], row["base_false_alarms"]) == (1, 0)
    assert row["alarms"]["difference"] == 100 / 12 and row["alarms"]["over_utterances"]["low"] == 0
    assert false_alarms(now.alignments["b"], {"a", "elk"}) == (1, 6)


def test_words_are_counted_in_the_form_of_transcripts(tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"The OWL, the owl!\nan elk\n"))
    tokenizer = Tokenizer("word", "lower", ["<blk>", "<unk>"], strip_punctuation=True)
    assert words_by_frequency([path], tokenizer) == ["owl", "the", "an", "elk"]
