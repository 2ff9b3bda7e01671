import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.config.options import AugmentConfig, FeatureConfig
from cascade.corpus.cuts import read_cuts
from cascade.data.augment import build_augmentations
from cascade.data.batches import TrainBatches, dev_batches, plan_batches
from cascade.data.storage import read_features, read_stats, stored
from cascade.text.tokens import Tokenizer
from tests.synthetic import small_config

TENSORS = ("features", "feature_lens", "tokens", "token_lens")


def make(exp, config=None, **options):
    tokenizer = Tokenizer.load(exp / "tokens")
    return TrainBatches(exp / "fbank" / "train_cuts.jsonl.gz", tokenizer, config or small_config(), **options)


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.ids == other.ids and one.texts == other.texts
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(4, 400), min_size=4, max_size=80), budget=st.integers(100, 2000),
    buckets=st.integers(1, 12), epoch=st.integers(0, 5), world_size=st.integers(1, 4),
)
def test_plan_holds_every_utterance_once_within_the_budget(lengths, budget, buckets, epoch, world_size):
    lengths = np.array(lengths)
    plan = plan_batches(lengths, budget, buckets, seed=1, epoch=epoch, world_size=world_size)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert len(plan) % world_size == 0
    assert all(len(batch) >= 1 for batch in plan)
    too_large = [batch for batch in plan if len(batch) > 1 and len(batch) * lengths[batch].max() > budget]
    assert not too_large or (len(too_large) < world_size and len(np.concatenate(plan)) - len(plan) < world_size)
    again = plan_batches(lengths, budget, buckets, seed=1, epoch=epoch, world_size=world_size)
    assert all(np.array_equal(one, other) for one, other in zip(plan, again, strict=True))


@pytest.mark.parametrize("num_utterances", range(3, 12))
def test_batches_of_one_utterance_are_shared_out_too(num_utterances):
    plan = plan_batches(np.full(num_utterances, 100), 100, 1, seed=1, epoch=0, world_size=3)
    assert len(plan) == num_utterances // 3 * 3
    assert sorted(np.concatenate(plan).tolist()) == list(range(num_utterances))


def test_plan_batches_similar_lengths_and_differs_between_epochs_and_seeds():
    lengths = np.random.default_rng(0).integers(50, 1500, 2000)
    plan = plan_batches(lengths, 20000, 10, seed=1, epoch=0)
    padded = sum(len(batch) * lengths[batch].max() for batch in plan)
    assert padded < 1.15 * lengths.sum()
    for seed, epoch in ((1, 1), (2, 0)):
        other = plan_batches(lengths, 20000, 10, seed, epoch)
        assert {tuple(sorted(batch)) for batch in plan} != {tuple(sorted(batch)) for batch in other}


def test_fewer_utterances_than_processes_is_an_error():
    with pytest.raises(ValueError, match="3 training utterances are too few for 4 processes"):
        plan_batches(np.array([10, 20, 30]), 100, 2, 0, 0, world_size=4)


def test_batches_hold_the_stored_features_padded_with_zeros(exp):
    config = small_config(augment=AugmentConfig(share=0.0))
    tokenizer = Tokenizer.load(exp / "tokens")
    cuts = {cut.id: cut for cut in read_cuts(exp / "fbank" / "train_cuts.jsonl.gz")}
    seen = []
    for batch in make(exp, config):
        assert batch.features.dtype == torch.float32 and batch.tokens.dtype == torch.int64
        assert batch.feature_lens.dtype == batch.token_lens.dtype == torch.int64
        assert batch.features.shape == (len(batch.ids), int(batch.feature_lens.max()), 20)
        assert batch.features.shape[0] * batch.features.shape[1] <= 600 or len(batch.ids) == 1
        for row, name in enumerate(batch.ids):
            length, num_tokens = int(batch.feature_lens[row]), int(batch.token_lens[row])
            expected = read_features(stored(cuts[name].features))
            np.testing.assert_array_equal(batch.features[row, :length], expected)
            assert (batch.features[row, length:] == 0).all() and (batch.tokens[row, num_tokens:] == 0).all()
            assert tokenizer.decode(batch.tokens[row, :num_tokens].tolist()) == batch.texts[row]
        seen += batch.ids
    assert sorted(seen) == sorted(cuts)


def test_order_and_augmentation_depend_on_seed_and_epoch_only(exp):
    first = make(exp)
    first.set_epoch(3)
    reference = list(first)
    torch.manual_seed(99)
    np.random.seed(99)
    second = make(exp)
    list(second)  # epoch 0 before it must not matter
    second.set_epoch(3)
    assert_equal(list(second), reference)
    assert_equal(list(second), reference)  # nor may an earlier pass over the same epoch
    second.set_epoch(4)
    assert [batch.ids for batch in second] != [batch.ids for batch in reference]
    other = make(exp, small_config(seed=4))
    other.set_epoch(3)
    assert [batch.ids for batch in other] != [batch.ids for batch in reference]


def test_loader_processes_do_not_change_the_batches(exp):
    config = small_config()
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    batches, parallel = make(exp, config), make(exp, workers)
    for loader in (batches, parallel):
        loader.set_epoch(2)
    assert_equal(list(parallel), list(batches))
    assert_equal(list(parallel.iterate(skip=3)), list(batches.iterate(skip=3)))


@pytest.fixture
def parallel(exp):
    """Batches from two loader processes."""
    config = small_config()
    return make(exp, dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2)))


def test_a_damaged_archive_is_said_as_without_loader_processes_which_end(exp, parallel):
    archive = next((exp / "fbank" / "train").glob("*.lca"))
    whole = archive.read_bytes()
    archive.write_bytes(whole[:100])
    try:
        with pytest.raises(ValueError, match=f"^features in {archive} .*run stage 1 again$"):
            list(parallel)
        assert not multiprocessing.active_children()
    finally:
        archive.write_bytes(whole)


def test_loader_processes_end_with_an_error_of_the_one_who_asks(parallel):
    with pytest.raises(KeyError), parallel.loading() as batches:
        next(batches)
        raise KeyError
    assert not multiprocessing.active_children()


def test_a_lost_loader_process_is_one_sentence_with_the_remedy(parallel):
    message = "lost .DataLoader worker .*lower data.num_workers"
    with pytest.raises(OSError, match=message), parallel.loading() as batches:
        next(batches)
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
        list(batches)
        signal.pause()  # its signal comes here if every batch had come before
    assert not multiprocessing.active_children()


def test_skipping_gives_the_rest_of_the_same_batches_without_reading_the_first(exp, monkeypatch):
    batches = make(exp)
    batches.set_epoch(1)
    whole = list(batches)
    assert len(batches) == len(whole) > 4
    read = []
    monkeypatch.setattr("cascade.data.batches.read_features", lambda where: read.append(where) or read_features(where))
    resumed = make(exp)
    resumed.set_epoch(1)
    for skip in (1, 4, len(whole) - 1):
        assert_equal(list(resumed.iterate(skip=skip)), whole[skip:])
        read.clear()
    fresh = make(exp)
    fresh.set_epoch(1)
    list(fresh.iterate(skip=4))
    assert len(read) == sum(len(batch.ids) for batch in whole[4:])
    assert list(batches.iterate(skip=len(whole))) == []


def test_an_utterance_is_augmented_alike_whatever_the_batch_and_the_rank(exp):
    alone = {name: (batch.features[row, : batch.feature_lens[row]])
             for batch in make(exp) for row, name in enumerate(batch.ids)}
    ranks = [make(exp, rank=rank, world_size=3) for rank in range(3)]
    counts = {len(loader) for loader in ranks}
    assert len(counts) == 1
    seen = []
    for loader in ranks:
        batches = list(loader)
        assert len(batches) in counts
        for batch in batches:
            seen += batch.ids
            for row, name in enumerate(batch.ids):
                assert torch.equal(batch.features[row, : batch.feature_lens[row]], alone[name])
    assert sorted(seen) == sorted(alone)


def carried_of(loader):
    return {name: tuple(row) for batch in loader for name, row in zip(batch.ids, batch.carried.tolist(), strict=True)}


def test_the_predictor_begins_with_the_last_labels_of_other_utterances(exp):
    config = small_config()
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, carry_over_share=0.5))
    size = config.model.predictor.context_size
    loader = make(exp, config)
    ends = {(0,) * (size - len(utterance.tokens)) + utterance.tokens[-size:] for utterance in loader.utterances}
    carried = carried_of(loader)
    some = [row for row in carried.values() if any(row)]
    assert set(some) <= ends and len(set(some)) > 1 and 0.2 < len(some) / len(carried) < 0.8
    for rank in range(3):  # whatever the batch and the rank
        for batch in make(exp, config, rank=rank, world_size=3):
            assert torch.equal(batch.carried, torch.tensor([carried[name] for name in batch.ids]))
            assert torch.equal(torch.cat([part.carried for part in batch.split(2)]), batch.carried)
    loader.set_epoch(1)
    assert carried != carried_of(loader)
    assert all(batch.carried is None for batch in make(exp))


def test_with_a_random_speed_an_epoch_has_one_copy_of_each_utterance(exp):
    config = small_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, random_speed=True))
    utterances = {utterance.id.removesuffix("_sp0.9") for utterance in make(exp).utterances}
    copies = {}
    for epoch in range(1, 5):
        ranks = [make(exp, config, rank=rank, world_size=2) for rank in range(2)]
        for made in ranks:
            made.set_epoch(epoch)
        names = [name for made in ranks for batch in made for name in batch.ids]
        assert sorted(name.removesuffix("_sp0.9") for name in names) == sorted(utterances)
        copies[epoch] = sorted(names)
        made = make(exp, config)
        made.set_epoch(epoch, done=[(2, 1)])
        assert 0 < made.share_done < 1
        rest = [name for batch in made for name in batch.ids]
        assert set(rest) < set(names) and len(rest) == len(set(rest))
    assert copies[1] != copies[2] and len({name for names in copies.values() for name in names}) > len(utterances)


class Level:
    """An augmentation of this test's own: another gain for every utterance."""

    purpose = "level"

    def __call__(self, features, generator):
        return features + np.float32(generator.normal())


def test_a_new_augmentation_joins_the_chain_and_moves_no_other_ones_draws(exp, monkeypatch):
    def utterances(epoch):
        made = make(exp)
        made.set_epoch(epoch)
        return {name: batch.features[row, : batch.feature_lens[row]]
                for batch in made for row, name in enumerate(batch.ids)}

    plain = utterances(1)
    monkeypatch.setattr(
        "cascade.data.batches.build_augmentations", lambda *inputs: [*build_augmentations(*inputs), Level()]
    )
    first, again, second = utterances(1), utterances(1), utterances(2)
    gains = {name: (features - plain[name]) for name, features in first.items()}
    assert all(torch.allclose(gain, gain[0, 0].expand_as(gain), atol=1e-4) for gain in gains.values())
    assert len({round(float(gain[0, 0]), 3) for gain in gains.values()}) == len(gains)
    assert all(torch.equal(again[name], features) for name, features in first.items())
    assert not any(torch.equal(second[name], features) for name, features in first.items())


def test_masked_features_are_filled_with_the_mean_of_train(exp):
    mean = read_stats(exp / "fbank" / "stats.pt")["mean"]
    plain = make(exp, small_config(augment=AugmentConfig(share=0.0)))
    for stats, fill in ((None, mean), ({"mean": torch.full((20,), 7.0)}, torch.full((20,), 7.0))):
        changed = 0
        for batch, original in zip(make(exp, stats=stats), plain, strict=True):
            different = batch.features != original.features
            changed += int(different.sum())
            assert torch.equal(batch.features[different], fill.expand_as(batch.features)[different])
        assert changed > 0


def test_iterating_leaves_the_random_generators_alone(exp):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = make(exp)
    list(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_dev_batches_are_the_same_every_time_and_hold_what_the_tokenizer_lacks(exp):
    config = small_config()
    tokenizer = Tokenizer.load(exp / "tokens")
    path = exp / "fbank" / "dev_cuts.jsonl.gz"
    batches = list(dev_batches(path, tokenizer, config))
    assert_equal(list(dev_batches(path, tokenizer, config)), batches)
    assert sorted(name for batch in batches for name in batch.ids) == [f"dev{index}" for index in range(5)]
    assert all(batch.features.shape[0] * batch.features.shape[1] <= 600 for batch in batches)


def test_wrong_cuts_are_errors_that_name_the_remedy(exp, tmp_path):
    tokenizer = Tokenizer.load(exp / "tokens")
    with pytest.raises(FileNotFoundError, match="cuts not found"):
        TrainBatches(tmp_path / "none.jsonl.gz", tokenizer, small_config())
    with pytest.raises(ValueError, match="no stored features; run stage 1"):
        TrainBatches(exp / "data" / "train_cuts.jsonl.gz", tokenizer, small_config())
    with pytest.raises(ValueError, match="20 mel bins, but features.num_mel_bins=80"):
        make(exp, small_config(features=FeatureConfig()))
