"""The parts streams are made of: resampling, endpoint rules, words, flicker."""

import math
import random
import tracemalloc

import numpy as np
import pytest
from scipy.signal import resample_poly

from cascade.audio.resample import StreamingResampler, resample
from cascade.checkpoint import load_model
from cascade.config.options import ConfigError, TokenConfig
from cascade.models.torch_engine import TorchEngine
from cascade.search.hypothesis import Hypothesis
from cascade.search.methods import DecodingOptions
from cascade.stream.decoder import StreamingDecoder
from cascade.stream.endpoint import EndpointOptions, find_endpoint
from cascade.stream.words import NOTHING, count_changed, join_words, words_of
from cascade.text.tokens import Tokenizer, train_tokenizer
from tests.tiny_run import make_model_dir

RATE = 16000


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_streamed_resampling_equals_whole_resampling_and_scipys(rate):
    rng = random.Random(rate)
    for seconds in (0.001, 0.02, 0.31):
        samples = np.random.default_rng(12).standard_normal(round(seconds * rate)).astype(np.float32)
        resampler = StreamingResampler(rate, RATE)
        cuts = sorted(rng.choices(range(len(samples)), k=40))
        parts = [resampler.accept(packet) for packet in np.split(samples, cuts)]
        streamed = np.concatenate([*parts, resampler.finish()])
        whole = resample(samples, rate, RATE)
        assert streamed.shape == whole.shape and streamed.dtype == np.float32
        np.testing.assert_array_equal(streamed, whole)
        divisor = math.gcd(rate, RATE)
        np.testing.assert_allclose(whole, resample_poly(samples, RATE // divisor, rate // divisor), atol=1e-6)
        assert len(np.concatenate(parts)) >= len(whole) - RATE * (10 * max(1, rate / RATE) / rate + 0.011) - 1


@pytest.mark.parametrize("rate", [1009, 15999, 44099, 192001, 767999])
def test_rates_without_a_small_ratio_cost_little_and_keep_a_tone(rate):
    wave = 0.5 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate).astype(np.float32)
    tracemalloc.start()
    try:
        resampled = resample(wave, rate, RATE)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert abs(len(resampled) - RATE) <= 2
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(len(resampled)) / RATE)
    assert np.abs(resampled - expected)[200:-200].max() < 0.07  # the nearest ratio: a sample of delay


@pytest.mark.parametrize(("num_frames", "last_token", "rule"), [
    (59, None, None), (60, None, "silence_from_start"), (60, 40, None), (70, 40, None),
    (71, 40, "silence_after_speech"), (260, 249, "late_pause"), (260, 250, None), (249, 238, None),
    (492, 491, None), (493, 492, "longest_segment"), (493, 481, "late_pause"),
])  # fmt: skip
def test_endpoint_rules(num_frames, last_token, rule):
    options = EndpointOptions()
    assert find_endpoint(options, num_frames, last_token, step_frames=8) == rule


def test_words_are_made_of_pieces():
    tokenizer = Tokenizer("bpe", "keep", ["<blk>", "<unk>", "\u2581he", "llo", "\u2581", "\u2581w", "orld"])
    hypothesis = Hypothesis((2, 3, 4, 5, 6), (1, 2, 4, 5, 9), (-0.1, -0.3, -1.0, -0.2, -0.4), -3.0)
    hello, world = words_of(hypothesis, tokenizer, first_frame=10, duration=0.79)
    assert (hello.word, hello.start, hello.end) == ("hello", 0.44, 0.52)
    assert (world.word, world.start, world.end) == ("world", 0.6, 0.79)
    assert hello.confidence == pytest.approx(np.exp(-0.2)) and world.confidence == pytest.approx(np.exp(-0.3))
    assert words_of(NOTHING, tokenizer) == ()


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    config = TokenConfig(kind="char", vocab_size=400, byte_fallback=True)
    return train_tokenizer(["ab 你好 世"], config, tmp_path_factory.mktemp("tokens"))


def said(tokens):
    count = len(tokens)
    return Hypothesis(tuple(tokens), tuple(range(count)), (-0.1,) * count, -0.1 * count)


@pytest.mark.parametrize("text", ["a 你好世界 b", "naïve café", "我ab你世", "กินข้าว b"])
def test_words_joined_are_the_text_and_partial_words_are_never_broken(byte_tokenizer, text):
    tokens = byte_tokenizer.encode(text)
    words = words_of(said(tokens), byte_tokenizer)
    assert join_words(words) == byte_tokenizer.decode(tokens) == text
    for count in range(len(tokens) + 1):
        partial = join_words(words_of(said(tokens[:count]), byte_tokenizer, complete=False))
        assert text.startswith(partial) and "\ufffd" not in partial
        assert partial == byte_tokenizer.decode(tokens[:count], complete=False)


def test_partial_results_never_show_half_a_character(byte_tokenizer, tmp_path):
    model, config, _ = load_model(make_model_dir(tmp_path / "model", epochs=1))
    decoder = StreamingDecoder(TorchEngine(model), config, byte_tokenizer, DecodingOptions(mode="streaming"))
    text = "a 你界 é"
    tokens = tuple(byte_tokenizer.encode(text))
    for count in range(len(tokens) + 1):
        decoder._stream.shown = said(tokens[:count])
        decoder._stream.num_steps += 1
        decoder.batch.stable_tokens = lambda stream, count=count: tokens[: max(0, count - 1)]
        partial = decoder.partial()
        assert text.startswith(partial.text) and partial.text.startswith(partial.stable_text)
    assert partial.text == text and partial.stable_text == "a 你界"


def test_in_scripts_without_spaces_each_character_is_a_word_with_its_own_times(byte_tokenizer):
    words = words_of(said(byte_tokenizer.encode("你界好")), byte_tokenizer)  # 界 is three bytes
    assert [(word.word, word.start, word.end, word.spaced) for word in words] == [
        ("你", 0.0, 0.08, True), ("界", 0.08, 0.2, False), ("好", 0.2, 0.24, False),
    ]


@pytest.mark.parametrize(("now", "changed"), [
    ((2, 3, 4), 0), ((2, 3, 4, 5), 0), ((2, 6, 4), 1), ((6, 2, 3, 4), 0), ((2, 4), 1), ((), 3), ((2, 3), 1),
    ((5, 6), 3), ((2, 5, 6), 2),
])  # fmt: skip
def test_flicker_counts_the_words_that_were_taken_back(now, changed):
    tokenizer = Tokenizer("word", "keep", ["<blk>", "<unk>", *(f"\u2581{letter}" for letter in "abcde")])

    def hypothesis(tokens):
        return Hypothesis(tuple(tokens), tuple(range(len(tokens))), (0.0,) * len(tokens), 0.0)

    assert count_changed(hypothesis((2, 3, 4)), hypothesis(now), tokenizer) == changed


@pytest.mark.parametrize(("values", "message"), [
    ({"silence_after_speech": 0}, "silence_after_speech must be positive"),
    ({"longest_segment": 31}, "longest_segment must lie between late_pause .0.4 s. and 30 s, got 31"),
    ({"longest_segment": 0.3}, "longest_segment must lie between"),
])  # fmt: skip
def test_wrong_endpoint_options_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        EndpointOptions(**values)
