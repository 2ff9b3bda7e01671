import math

import numpy as np
import pytest

from cascade.measure.calibration import expected_calibration_error, fit_calibration, outcomes
from cascade.search.hypothesis import UNCALIBRATED, Calibration, Hypothesis
from cascade.stream.words import Word, words_of
from cascade.text.tokens import Tokenizer


def drawn(calibration, number, seed=0):
    """Words whose confidences are right through this map."""
    generator = np.random.default_rng(seed)
    confidences = generator.beta(4, 1.5, number)
    return list(zip(confidences.tolist(), (generator.random(number) < calibration(confidences)).tolist(), strict=True))


@pytest.mark.parametrize("true", [Calibration(0.5, -0.8), Calibration(1.7, 0.3), UNCALIBRATED])
def test_the_map_that_words_were_drawn_with_is_found(true):
    found = fit_calibration(drawn(true, 200_000))
    assert found == pytest.approx(true, abs=0.03)
    unseen = drawn(true, 50_000, seed=1)
    after = [(float(found(confidence)), right) for confidence, right in unseen]
    assert expected_calibration_error(after) < 0.01
    assert expected_calibration_error(unseen) > 0.05 or true == UNCALIBRATED


def test_no_other_map_makes_the_outcomes_likelier():
    scored = drawn(Calibration(0.6, -0.2), 500)
    right = sum(each for _, each in scored)
    targets = {True: (right + 1) / (right + 2), False: 1 / (500 - right + 2)}

    def likelihood(calibration):
        probs = [(float(calibration(confidence)), targets[each]) for confidence, each in scored]
        return sum(target * math.log(prob) + (1 - target) * math.log(1 - prob) for prob, target in probs)

    found = fit_calibration(scored)
    for slope, offset in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert likelihood(Calibration(found.slope + slope, found.offset + offset)) < likelihood(found)


@pytest.mark.parametrize("scored", [
    [(0.9, True)], [(0.9, False)] * 3, [(0.2, False), (0.9, True)] * 20, [(0.2, True), (0.9, False)] * 20,
    [(1.0, True)] * 50 + [(0.0, False)] * 50, [(0.7, True), (0.7, False)],
])  # fmt: skip
def test_every_set_has_a_monotone_map_with_finite_values(scored):
    found = fit_calibration(scored)
    values = found(np.linspace(0, 1, 11))
    assert np.isfinite(found).all() and (np.diff(values) >= 0).all() and (values > 0).all() and (values < 1).all()


def test_no_word_has_no_error_and_no_map():
    assert expected_calibration_error([]) is None
    with pytest.raises(ValueError, match="no word was recognised"):
        fit_calibration([])


def test_the_error_is_the_mean_gap_of_the_bins():
    scored = [(0.95, True)] * 3 + [(0.95, False)] + [(0.15, False)] * 4 + [(1.0, True)] * 2
    in_highest = abs(5 - (4 * 0.95 + 2 * 1.0))
    assert expected_calibration_error(scored) == pytest.approx((in_highest + 4 * 0.15) / 10)


def test_outcomes_are_those_of_the_word_error_rate():
    words = [Word(word, 0.0, 0.0, 0.1 * place) for place, word in enumerate(["a", "x", "c", "d"])]
    assert outcomes("a b d", words) == [(0.0, True), (0.1, False), (0.2, False), (pytest.approx(0.3), True)]
    assert outcomes("a b", []) == []


def test_words_carry_calibrated_confidences():
    tokenizer = Tokenizer("word", "keep", ["<blk>", "<unk>", "▁one", "▁two"])
    hypothesis = Hypothesis((2, 3), (0, 5), (math.log(0.8), math.log(0.3)), -1.0)
    assert [word.confidence for word in words_of(hypothesis, tokenizer)] == pytest.approx([0.8, 0.3])
    calibrated = words_of(hypothesis, tokenizer, calibration=Calibration(2.0, -1.0))
    expected = [1 / (1 + math.exp(1 - 2 * math.log(p / (1 - p)))) for p in (0.8, 0.3)]
    assert [word.confidence for word in calibrated] == pytest.approx(expected)
