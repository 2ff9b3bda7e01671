import dataclasses

import pytest
import torch

from cascade.audio.fbank import StreamingFbank
from cascade.checkpoint import load_model
from cascade.config.options import FeatureConfig
from cascade.data.alignments import TimedWord
from cascade.measure.compute import time_mode
from cascade.measure.delay import (
    Screen,
    Watched,
    algorithmic_delay,
    audio_needed,
    correct_words,
    endpoint_time,
    flicker,
    measure_delays,
    settle_times,
    usable_words,
    watch_streams,
)
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.search.methods import STREAMING_MODES, DecodingOptions, build_search
from cascade.stream.words import Word, words_of
from tests.tiny_run import make_model_dir

STREAMING = DecodingOptions(mode="streaming", left_context_ms=640)


def watched(*screens, starts=(), duration=2.0, num_changed=0, at_end=0, last_frame=None):
    """screens: (time, text); the last one is final, its words begin at `starts` and last 40 ms."""
    shown = tuple(Screen(time, tuple(text.split())) for time, text in screens)
    starts = starts or [0.0] * len(shown[-1].words)
    words = tuple(Word(word, start, start + 0.04, 1.0) for word, start in zip(shown[-1].words, starts, strict=True))
    return Watched(duration, shown, words, last_frame, num_changed, at_end)


@pytest.mark.parametrize(
    ("screens", "times"),
    [
        (((0.3, ""), (0.6, "play"), (0.9, "play a"), (1.2, "play a song")), [0.6, 0.9, 1.2]),
        (((0.3, "play"), (0.6, "play the"), (0.9, "play a"), (1.2, "play a")), [0.3, 0.9]),  # "the" became "a"
        (((0.3, "play"), (0.6, "pray"), (0.9, "play"), (1.2, "play")), [0.9]),  # gone in between
        (((0.3, "one"), (0.6, "one one"), (0.9, "one one two")), [0.3, 0.6, 0.9]),  # the same word twice
        (((0.3, "uh play"), (0.6, "play it")), [0.3, 0.6]),  # moved, but there
        (((0.3, "so"), (0.6, "")), []),
        (((1.0, "all of it"),), [1.0, 1.0, 1.0]),
    ],
)
def test_a_word_has_come_when_it_stands_there_to_stay(screens, times):
    assert settle_times(watched(*screens)) == times


def test_delays_of_a_case_by_hand():
    item = watched(
        (0.3275, ""), (0.6475, "turn"), (0.9675, "turn up"), (1.0, "turn up right"), starts=(0.40, 0.72, 0.96),
        duration=1.0, last_frame=24,
    )  # fmt: skip
    text, ends = "turn on light".split(), [0.5, 0.7, 0.9]
    delays = measure_delays([item], [text], [ends], STREAMING, [item.last_frame])
    assert delays.emission == pytest.approx([0.44 - 0.5])  # one correct word; said before it was over
    assert delays.word == pytest.approx([0.6475 - 0.5])
    assert delays.final == pytest.approx([1.0 - 0.9])  # the whole text, right or wrong, after the last true word
    assert delays.endpoint == pytest.approx([endpoint_time(24, STREAMING) - 0.9])
    row = delays.row()
    assert (row["word_delay_ms_mean"], row["emission_delay_ms_p90"], row["num_correct_words"]) == (147.5, -60.0, 1)
    assert len(row["word_delay_ms_quantiles"]) == 21
    full = measure_delays([item], [text], [ends], dataclasses.replace(STREAMING, mode="full"), [None])
    assert full.final == pytest.approx([0.1]) and full.endpoint == []


def test_silent_utterances_and_wrong_words_have_no_delay():
    silent = watched((0.3275, ""), (1.0, ""), duration=1.0)
    row = measure_delays([silent], [["on"]], [[0.5]], STREAMING, [None]).row()
    assert row["num_correct_words"] == 0 and row["word_delay_ms_mean"] is None and row["final_delay_ms_p50"] is None
    assert row["word_delay_ms_quantiles"] == []


def test_a_text_is_final_when_its_last_word_comes_or_when_the_stream_is_closed():
    item = watched((0.3, "on"), (0.6, "on"), (1.0, "on"))
    for mode, expected in (("streaming", 0.3), ("look_ahead", 0.3), ("two_pass", 2.0), ("full", 2.0)):
        options = dataclasses.replace(STREAMING, mode=mode)
        assert measure_delays([item], [["on"]], [[0.0]], options, [3]).final == [expected]


def test_correct_words_are_those_of_the_word_error_rate():
    assert correct_words("a b c d".split(), "a x c e d".split()) == [(0, 0), (2, 2), (3, 4)]
    assert correct_words([], ["a"]) == [] and correct_words(["a"], []) == []


def test_endpoints_follow_the_silence_rule():
    # 1.2 s are 30 frames of silence after frame 5: 36 frames, the next whole chunk of 8 ends with frame 40
    assert endpoint_time(5, STREAMING) == pytest.approx(1.6075)
    assert endpoint_time(9, STREAMING) == pytest.approx(1.6075)
    assert endpoint_time(10, STREAMING) == pytest.approx(1.9275)
    assert endpoint_time(5, dataclasses.replace(STREAMING, mode="look_ahead")) == pytest.approx(1.9275)


@pytest.mark.parametrize("num_frames", [1, 32, 64])
def test_audio_needed_is_what_the_feature_window_waits_for(num_frames):
    samples = torch.randn(16000, generator=torch.Generator().manual_seed(0)).mul_(0.1).numpy()
    needed = round(16000 * audio_needed(num_frames, 10.0))
    assert StreamingFbank(FeatureConfig()).accept(samples[:needed]).shape[0] == num_frames
    assert StreamingFbank(FeatureConfig()).accept(samples[: needed - 1]).shape[0] == num_frames - 1
    assert audio_needed(num_frames, 0.01) == 0.01  # the end of the recording completes the rest


def test_algorithmic_delay_is_the_wait_for_the_chunk_and_the_window():
    found = {mode: algorithmic_delay(dataclasses.replace(STREAMING, mode=mode)) for mode in STREAMING_MODES}
    assert tuple(found["streaming"].values()) == tuple(found["two_pass"].values()) == (167.5, 327.5)
    assert tuple(found["look_ahead"].values()) == (327.5, 647.5)
    assert tuple(found["full"].values()) == (None, None)


def test_flicker_counts_changed_words_per_minute():
    items = [
        watched((1.0, "a b c"), duration=2.0, num_changed=2, at_end=1),
        watched((1.0, "d"), duration=4.0, num_changed=1, at_end=0),
    ]
    assert flicker(items) == {
        "num_words": 4, "num_changed_words": 3, "changed_words_percent": 75.0, "changed_by_look_ahead": 2,
        "changed_by_full": 1, "flicker_per_minute": 30.0,
    }
    assert flicker([])["changed_words_percent"] is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model, config, tokenizer = load_model(make_model_dir(tmp_path_factory.mktemp("run") / "student"))
    generator = torch.Generator().manual_seed(3)
    lengths = (131, 64, 32, 3, 30, 97)
    features = [4 * torch.randn(length, 80, generator=generator) - 8 for length in lengths]
    return model, tokenizer, features


@pytest.mark.parametrize("mode", ["streaming", "look_ahead", "full"])
def test_words_come_with_the_chunk_block_or_utterance_of_their_token(tiny, mode):
    model, tokenizer, features = tiny
    options = dataclasses.replace(STREAMING, mode=mode)
    search, num_words = build_search(TorchEngine(model), options, tokenizer.unk_id), 0
    for item, frames in zip(watch_streams(model, tokenizer, options, features), features, strict=True):
        duration = frames.shape[0] / 100
        (whole,) = decode_batch(model, search, frames[None], torch.tensor([len(frames)]), options)
        words = words_of(whole, tokenizer, duration=duration)
        assert [(word.word, word.start) for word in words] == [(word.word, word.start) for word in item.words]
        step = {"streaming": 8, "look_ahead": 16, "full": 10**6}[mode]
        expected = [audio_needed((frame // step + 1) * step * 4, duration) for frame in whole.timestamps]
        assert settle_times(item) == pytest.approx(expected)
        if mode != "full" and whole.timestamps:
            assert item.last_frame is not None
        num_words += len(words)
    assert num_words > 10


def test_two_pass_ends_with_the_text_of_the_full_pass(tiny):
    model, tokenizer, features = tiny
    two_pass, full = (
        watch_streams(model, tokenizer, dataclasses.replace(STREAMING, mode=mode), features)
        for mode in ("two_pass", "full")
    )
    for one, other in zip(two_pass, full, strict=True):
        assert [(word.word, word.start, word.end) for word in one.words] == [
            (word.word, word.start, word.end) for word in other.words
        ]
        confidences = [word.confidence for word in other.words]
        assert [word.confidence for word in one.words] == pytest.approx(confidences, rel=1e-5)
    assert all(0 <= item.num_changed_at_end <= item.num_changed for item in two_pass)
    assert sum(item.num_changed for item in two_pass) > 0


def test_an_alignment_is_used_where_its_words_are_those_of_the_text(tiny):
    tokenizer = tiny[1]
    words = [TimedWord("one", 0.0, 0.5), TimedWord("two", 0.5, 0.8)]
    assert usable_words(words, ["one", "two"], tokenizer) == [0.5, 0.8]
    assert usable_words(words, ["one", "three"], tokenizer) is None
    assert usable_words(words[:1], ["one", "two"], tokenizer) is None


def test_steps_are_timed_for_every_model_and_utterance(tiny):
    model, tokenizer, features = tiny
    for mode, steps in (("streaming", 4 + 2 + 1), ("look_ahead", 2 + 1), ("full", 0), ("two_pass", 4 + 2 + 1)):
        found = time_mode([(model, tokenizer, dataclasses.replace(STREAMING, mode=mode), features[:3])] * 2)
        for times in found:
            assert len(times.last) == 3 and len(times.steps) == steps, mode
            assert all(value > 0 for value in times.last)
            assert (times.row()["step_compute_ms_p50"] is None) == (mode == "full")
