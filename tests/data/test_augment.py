import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.audio.fbank import compute_fbank
from cascade.config.options import AugmentConfig, FeatureConfig
from cascade.data.augment import SpecAugment, VocalTract, utterance_generator

FILL = np.full(20, 99.0, dtype=np.float32)


def matrix(num_frames, seed=0):
    return np.random.default_rng(seed).standard_normal((num_frames, 20)).astype(np.float32)


def augment(num_frames, config, name="a", epoch=0, seed=1):
    return SpecAugment(config, FILL)(matrix(num_frames), utterance_generator(seed, epoch, name))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    num_frames=st.integers(1, 400), num_time=st.integers(0, 12), longest=st.integers(0, 100),
    share=st.floats(0, 1), num_freq=st.integers(0, 3), bins=st.integers(0, 30), epoch=st.integers(0, 3),
)
def test_masks_stay_within_their_limits(num_frames, num_time, longest, share, num_freq, bins, epoch):
    config = AugmentConfig(
        num_time_masks=num_time, time_mask_frames=longest, max_time_mask_share=share, num_freq_masks=num_freq,
        freq_mask_bins=bins, share=1.0,
    )
    masked = augment(num_frames, config, epoch=epoch) == 99
    hidden_bins = masked.all(0)
    hidden_frames = masked.all(1)
    if not hidden_frames.all():
        assert hidden_bins.sum() <= min(20, num_freq * bins) or hidden_frames.sum() == num_frames
    if not hidden_bins.all():
        assert hidden_frames.sum() <= share * num_frames
        assert hidden_frames.sum() <= num_time * longest
        assert (masked == (hidden_frames[:, None] | hidden_bins[None, :])).all()


def test_unmasked_values_stay_and_the_input_is_not_changed():
    features = matrix(200)
    before = features.copy()
    config = AugmentConfig(share=1.0)
    out = SpecAugment(config, FILL)(features, utterance_generator(0, 0, "a"))
    np.testing.assert_array_equal(features, before)
    assert (out != 99).any() and (out == 99).any()
    np.testing.assert_array_equal(out[out != 99], features[out != 99])


def test_augmentation_depends_on_seed_epoch_and_id_only():
    config = AugmentConfig(share=1.0, time_warp_frames=5)
    reference = augment(200, config)
    np.testing.assert_array_equal(augment(200, config), reference)
    for change in ({"name": "b"}, {"epoch": 1}, {"seed": 2}):
        assert not np.array_equal(augment(200, config, **change), reference)


def test_share_of_touched_utterances_is_the_configured_one():
    config = AugmentConfig(share=0.7)
    untouched = sum(augment(50, config, name=str(index)) is not None and np.array_equal(
        augment(50, config, name=str(index)), matrix(50)) for index in range(400))
    assert 0.2 < untouched / 400 < 0.42
    off = dataclasses.replace(config, share=0.0)
    assert all(np.array_equal(augment(50, off, name=str(index)), matrix(50)) for index in range(20))


@pytest.mark.parametrize("num_frames", [1, 12, 13, 14, 100])
def test_time_warp_keeps_the_ends_and_the_order(num_frames):
    config = AugmentConfig(share=1.0, num_time_masks=0, num_freq_masks=0, time_warp_frames=5)
    ramp = np.repeat(np.arange(num_frames, dtype=np.float32)[:, None], 20, 1)
    moved = 0
    for index in range(30):
        warped = SpecAugment(config, FILL)(ramp, utterance_generator(0, 0, str(index)))
        assert warped.shape == ramp.shape and warped.dtype == np.float32
        np.testing.assert_allclose(warped[[0, -1]], ramp[[0, -1]], atol=1e-4)
        assert (np.diff(warped[:, 0]) >= 0).all() and np.abs(warped - ramp).max() <= 5.001
        moved += np.abs(warped - ramp).max() > 0.5
    assert (moved > 10) == (num_frames > 12)


@pytest.mark.parametrize("sampling_rate", [8000, 16000])
@pytest.mark.parametrize("factor", [0.85, 0.95, 1.1, 1.2])
def test_another_vocal_tract_moves_a_tone_to_factor_times_its_frequency(factor, sampling_rate):
    def tone(hertz):
        samples = np.sin(2 * np.pi * hertz * np.arange(sampling_rate // 2) / sampling_rate).astype(np.float32)
        return np.asarray(compute_fbank(samples, FeatureConfig(sampling_rate=sampling_rate, num_mel_bins=80)))

    for hertz in (300, 800, 1500, 2000):
        warped = VocalTract((factor, factor), sampling_rate)(tone(hertz), utterance_generator(1, 0, "a"))
        wanted = tone(factor * hertz)
        assert warped.shape == wanted.shape and warped.dtype == np.float32
        assert abs(int(warped[20].argmax()) - int(wanted[20].argmax())) <= 1


def test_a_vocal_tract_of_the_same_length_changes_nothing_and_each_epoch_draws_another():
    features = matrix(50)
    assert VocalTract((1.0, 1.0), 16000)(features, utterance_generator(1, 0, "a")) is features
    first, second = (VocalTract((0.9, 1.1), 16000)(features, utterance_generator(1, n, "a")) for n in (0, 1))
    assert not np.array_equal(first, second)
