import functools
import io
import itertools
import random

import pytest

from cascade.measure.wer import ErrorCounts, align, characters, count_errors, oracle, score, write_score


def plain_cost(reference, hypothesis):
    """(errors, substitutions) of the best alignment, by plain recursion."""

    @functools.cache
    def best(i, j):
        if i == 0 or j == 0:
            return (i + j, 0)
        wrong = int(reference[i - 1] != hypothesis[j - 1])
        before = best(i - 1, j - 1)
        steps = [(before[0] + wrong, before[1] + wrong)]
        steps += [(errors + 1, subs) for errors, subs in (best(i - 1, j), best(i, j - 1))]
        return min(steps)

    return best(len(reference), len(hypothesis))


def test_alignment_has_fewest_errors_then_fewest_substitutions():
    generator = random.Random(1)
    for _ in range(300):
        reference, hypothesis = (
            tuple(generator.choices("abc", k=generator.randrange(9))) for _ in range(2)
        )
        alignment = align(reference, hypothesis)
        counts = count_errors(alignment)
        assert (counts.errors, counts.substitutions) == plain_cost(reference, hypothesis)
        assert tuple(item for item, _ in alignment if item is not None) == reference
        assert tuple(item for _, item in alignment if item is not None) == hypothesis
        assert counts.reference == len(reference)
        assert len(hypothesis) == len(reference) - counts.deletions + counts.insertions


def test_ties_prefer_correct_words_to_substitutions():
    assert align(["a", "b"], ["b", "c"]) == [("a", None), ("b", "b"), (None, "c")]


def test_counts_of_known_alignments():
    assert count_errors(align("the cat sat".split(), "the bat sat on".split())) == ErrorCounts(3, 1, 0, 1)
    assert count_errors(align([], ["a", "b"])) == ErrorCounts(0, 0, 0, 2)
    assert count_errors(align(["a", "b"], [])) == ErrorCounts(2, 0, 2, 0)
    assert count_errors(align([], [])) == ErrorCounts()


def test_swapping_sides_swaps_deletions_and_insertions():
    for reference, hypothesis in itertools.product(("", "a", "ab", "bba"), repeat=2):
        there, back = count_errors(align(reference, hypothesis)), count_errors(align(hypothesis, reference))
        assert (there.deletions, there.insertions) == (back.insertions, back.deletions)
        assert there.substitutions == back.substitutions


def test_error_rate_without_reference_words_is_undefined():
    result = score([("one", "", ""), ("two", "  ", "noise")])
    assert result.words == ErrorCounts(0, 0, 0, 1)
    assert result.words.percent is None
    file = io.StringIO()
    write_score(result, file)
    assert "undefined (no reference) [1 / 0: 1 ins, 0 del, 0 sub]" in file.getvalue()
    assert score([]).words.percent is None


def test_totals_are_sums_over_utterances_not_means():
    result = score([("long", "a b c d e f g h i j", "a b c d e f g h i x"), ("short", "a", "")])
    assert result.words.percent == pytest.approx(100 * 2 / 11)
    assert [(label, count, errors.errors) for label, count, errors in result.by_length()] == [
        ("1-2", 1, 1), ("6-10", 1, 1)
    ]


def test_characters_count_one_space_between_words():
    assert characters("  to  me ") == list("to me")
    assert score([("one", "to me", "tome")]).characters == ErrorCounts(5, 0, 1, 0)


def test_written_file_shows_every_error_in_its_column():
    result = score([("right", "yes", "yes"), ("wrong", "the cat sat", "the bat sat on")])
    file = io.StringIO()
    write_score(result, file, notes=["Set aside: 1"])
    text = file.getvalue()
    assert text.startswith("WER 50.00 % [2 / 4: 1 ins, 0 del, 1 sub]\nCER ")
    assert "Set aside: 1\n" in text
    block = text[text.index("wrong: 2 errors in 3 words") :].splitlines()
    assert block[1:4] == ["  ref  the  cat  sat  **", "  hyp  the  bat  sat  on", "            S         I"]
    assert text.index("wrong: 2") < text.index("right: correct")


def test_long_texts_take_little_time():
    words = [str(number % 7) for number in range(1500)]
    assert count_errors(align(words, words[::-1])).reference == 1500


def test_chinese_words_are_characters_and_spaces_there_change_no_word_error():
    scored = score([("a", "你好世界", "你好 世 x")])
    assert (scored.words.reference, scored.words.errors) == (4, 1)
    assert scored.characters.reference == 4


def test_oracle_counts_the_hypothesis_with_the_fewest_errors():
    lists = [("a", "one two", ["two", "one two", "one"]), ("b", "three", ["four five", ""]), ("c", "", ["six", ""])]
    assert oracle(lists) == ErrorCounts(3, 0, 1, 0)
    assert oracle((name, ref, hyps[:1]) for name, ref, hyps in lists) == score(
        (name, ref, hyps[0]) for name, ref, hyps in lists
    ).words
