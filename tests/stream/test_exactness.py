"""Chunk by chunk equals whole: the model of full size in both number formats, and streams under random schedules."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.audio.fbank import StreamingFbank
from cascade.checkpoint import load_model
from cascade.config.load import load_config
from cascade.models.build import build_model
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.search.methods import METHODS, STREAMING_MODES, DecodingOptions, build_scorers, build_search
from cascade.stream.batch import StreamBatch
from cascade.stream.decoder import StreamingDecoder
from cascade.text.ngram_training import train_ngram, write_arpa
from cascade.text.tokens import Tokenizer
from tests.models.test_encoder import largest_difference, run_blocks, run_chunks
from tests.tiny_run import make_model_dir

RATE = 16000
CHUNKS = (2, 4, 8, 16, 32)
"""80 to 1280 ms."""
LEFT = (16, 32, 64)
"""640 ms and more."""


def blocks(chunk):
    """Look-ahead blocks of 320 ms and more, up to 1920 ms; `full` is all."""
    return [chunk * count for count in range(1, 25) if 8 <= chunk * count <= 48]


def speech(seconds, seed):
    """Noise whose loudness changes as syllables do."""
    time = np.arange(round(seconds * RATE))
    samples = 0.3 * np.random.default_rng(seed).standard_normal(len(time)) * np.sin(time / 2500) ** 2
    return samples.astype(np.float32)


def features_of(samples, config):
    fbank = StreamingFbank(config.features)
    return torch.from_numpy(np.concatenate((fbank.accept(samples), fbank.finish())))


def said(hypothesis):
    return hypothesis.tokens, hypothesis.timestamps


def said_by(decoder):
    segments = decoder.final().segments
    assert len(segments) <= 1
    return said(segments[0].hypotheses[0]) if segments else ((), ())


@pytest.fixture(scope="module")
def full_size():
    """The teacher of 41 M parameters with random weights in float32 and in float64; the config; a tokenizer."""
    config = load_config(overrides=["model.causal.num_layers=22", "model.predictor.kind=lstm"])
    torch.manual_seed(1)
    model = build_model(config, 500).eval().requires_grad_(False)
    assert 40.5e6 < sum(value.numel() for value in model.parameters()) < 43e6
    features = features_of(speech(2.0, 9), config)
    model.encoder.set_feature_stats(features.mean(dim=0), features.std(dim=0))
    model.joiner.encoder_proj.weight.mul_(4.0)  # so that the best symbol changes from frame to frame
    model.joiner.output.weight.mul_(4.0)
    frames = model.encode(features[None], torch.tensor([len(features)]), "streaming", 8, 16)[0]
    logits = model.joiner(frames, model.predictor(torch.zeros(1, 0, dtype=torch.int64)))[0]
    model.joiner.output.bias[0] += (logits[:, 1:].amax(dim=1) - logits[:, 0]).median()  # half of them are blanks
    symbols = ["<blk>", "<unk>", *(f"\u2581w{number}" for number in range(498))]
    models = {torch.float32: model, torch.float64: copy.deepcopy(model).double()}
    return models, config, Tokenizer("word", "keep", symbols)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize(("chunk", "block", "left"), [(2, 8, 16), (8, 16, 64), (32, 32, 16)])
def test_the_full_size_encoders_chunked_equal_whole(full_size, kind, tolerance, chunk, block, left):
    models, config, _ = full_size
    encoder = models[kind].encoder
    parts = [features_of(speech(seconds, chunk), config) for seconds in (0.47, 1.43)]
    lens = torch.tensor([len(part) for part in parts])
    features = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(kind)
    causal, out_lens = encoder.forward_causal(features, lens, chunk, left)
    streamed = run_chunks(models[kind], features, lens, chunk, left)
    allowed = tolerance * (float(causal.abs().max()) if kind == torch.float32 else 1.0)
    assert largest_difference(streamed, causal, out_lens) <= allowed
    whole = encoder.forward_noncausal(causal, out_lens, block, left)
    assert largest_difference(run_blocks(models[kind], streamed, out_lens, block, left), whole, out_lens) <= allowed


@pytest.mark.parametrize(("mode", "method"), [
    ("streaming", "modified_beam_search"), ("look_ahead", "greedy_search"), ("two_pass", "greedy_search"),
])  # fmt: skip
def test_the_full_size_model_streamed_says_what_it_says_at_once(full_size, mode, method):
    rng = random.Random(mode)
    models, config, tokenizer = full_size
    model, chunk = models[torch.float32], rng.choice(CHUNKS[1:])
    options = DecodingOptions(mode, method, chunk_ms=40 * chunk, look_ahead_ms=40 * rng.choice(blocks(chunk)))
    recordings = [speech(1.3, 3), speech(0.7, 4)]
    batch = StreamBatch(TorchEngine(model), tokenizer, options)
    decoders = [StreamingDecoder(TorchEngine(model), config, tokenizer, batch=batch) for _ in recordings]
    for decoder, samples in zip(decoders, recordings, strict=True):
        for packet in np.split(samples, sorted(rng.choices(range(len(samples)), k=4))):
            decoder.push(packet, RATE)
            batch.run()
        decoder.end()
    batch.run()
    whole = replace(options, mode="full" if mode == "two_pass" else mode)
    parts = [features_of(samples, config) for samples in recordings]
    expected = decode_batch(
        model, build_search(TorchEngine(model), whole, tokenizer.unk_id),
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
        torch.tensor([len(part) for part in parts]), whole,
    )
    assert all(len(hypothesis.tokens) > 3 for hypothesis in expected)
    assert [said_by(decoder) for decoder in decoders] == [said(hypothesis) for hypothesis in expected]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model, config, tokenizer = load_model(make_model_dir(tmp_path_factory.mktemp("run") / "model", epochs=1))
    return model.double().requires_grad_(False), config, tokenizer


@pytest.fixture(scope="module")
def scores(small, tmp_path_factory):
    """No scores from outside, a language model with LODR in the search, both for rescoring: options and scorers."""
    folder, tokenizer = tmp_path_factory.mktemp("lm"), small[2]
    (folder / "text").write_text("two two five one\nthree five\nfive five five one two\n")
    for order in (2, 3):
        write_arpa(train_ngram([folder / "text"], tokenizer, order), tokenizer, folder / f"{order}.arpa")
    options = DecodingOptions(
        method="modified_beam_search", ngram=folder / "3.arpa", lm_scale=1.5, lodr=folder / "2.arpa", lodr_scale=0.5
    )
    return {
        "none": [], "fusion": build_scorers(options, tokenizer),
        "rescoring": build_scorers(replace(options, rescore=True), tokenizer),
    }


class Player:
    """One stream of a batch and what it has heard since it began."""

    def __init__(self, loaded, batch):
        model, *rest = loaded
        self.decoder, self.batch, self.heard = StreamingDecoder(TorchEngine(model), *rest, batch=batch), batch, []

    def hear(self, samples):
        self.decoder.push(samples, RATE)
        self.heard.append(samples)

    def reset(self):
        self.decoder.reset()
        self.heard = []


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_streams_under_any_schedule_say_what_whole_utterances_say(small, scores, data):
    model, config, tokenizer = small
    chunk = data.draw(st.sampled_from(CHUNKS), "chunk")
    options = DecodingOptions(
        data.draw(st.sampled_from(STREAMING_MODES), "mode"), data.draw(st.sampled_from(METHODS), "method"),
        chunk_ms=40 * chunk, look_ahead_ms=40 * data.draw(st.sampled_from(blocks(chunk)), "block"),
        left_context_ms=40 * data.draw(st.sampled_from(LEFT), "left"),
    )  # fmt: skip
    scorers = scores[data.draw(st.sampled_from([*scores]), "scores")]
    batch = StreamBatch(TorchEngine(model), tokenizer, options, scorers=scorers)
    source = speech(9.0, data.draw(st.integers(0, 9), "audio"))
    active, ended, position = [], [], 0
    actions = st.lists(st.tuples(st.sampled_from("jhhhhrresl"), st.integers(0, 9), st.integers(1, 16000)), max_size=50)
    for action, which, size in data.draw(actions, "schedule"):
        player = active[which % len(active)] if active else None
        if action == "j" or player is None:
            active.append(Player(small, batch))
        elif action == "h" and position + size <= len(source):
            player.hear(source[position : position + size])
            position += size
        elif action == "r":
            batch.run()
        elif action == "s":
            player.reset()
        elif action in "el":
            active.remove(player)
            if action == "l":
                player.decoder.leave()
            else:
                player.decoder.end()
                ended.append(player)
    for player in active:
        player.decoder.end()
    batch.run()
    assert len(batch) == 0
    whole = replace(options, mode="full" if options.mode == "two_pass" else options.mode)
    search = build_search(TorchEngine(model), whole, tokenizer.unk_id, scorers)
    for player in ended + active:
        features = features_of(np.concatenate([np.zeros(0, np.float32), *player.heard]), config).double()
        if len(features) < 4:
            assert said_by(player.decoder) == ((), ())
            continue
        expected = decode_batch(model, search, features[None], torch.tensor([len(features)]), whole)[0]
        assert said_by(player.decoder) == said(expected)
