import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from cascade.audio.fbank import StreamingFbank
from cascade.audio.resample import resample
from cascade.checkpoint import load_model
from cascade.config.options import ConfigError
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.search.methods import METHODS, STREAMING_MODES, DecodingOptions, build_search
from cascade.stream.batch import StreamBatch
from cascade.stream.decoder import StreamingDecoder
from cascade.stream.endpoint import EndpointOptions
from tests.tiny_run import make_model_dir

RATE = 16000
SHORT = EndpointOptions(longest_segment=0.7, late_pause=0.2, silence_after_speech=0.3)


@pytest.fixture(scope="module", params=["tied_reduced", "lstm"])
def loaded(request, tmp_path_factory):
    """A model in float64, its config and tokenizer."""
    folder = make_model_dir(tmp_path_factory.mktemp("run") / "model", request.param, epochs=1)
    model, config, tokenizer = load_model(folder)
    return model.double().requires_grad_(False), config, tokenizer


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = make_model_dir(tmp_path_factory.mktemp("run") / "model", epochs=1)
    model, config, tokenizer = load_model(folder)
    return model.double().requires_grad_(False), config, tokenizer


def decoder_of(loaded, *arguments, **options):
    model, config, tokenizer = loaded
    return StreamingDecoder(TorchEngine(model), config, tokenizer, *arguments, **options)


def noise(seconds, seed=0, rate=RATE):
    time = np.arange(round(seconds * rate))
    samples = 0.2 * np.random.default_rng(seed).standard_normal(len(time)) * np.sin(time / 3000)
    return samples.astype(np.float32)


def packets(samples, rng, largest=9000):
    start = 0
    while start < len(samples):
        size = rng.choice([1, 7, rng.randint(0, 600), rng.randint(0, largest)])
        yield samples[start : start + size]
        start += size


def features_of(samples, config):
    fbank = StreamingFbank(config.features)
    return torch.from_numpy(np.concatenate((fbank.accept(samples), fbank.finish()))).double()


def simulate(loaded, samples, options):
    """The whole utterance under the masks of streaming."""
    model, config, tokenizer = loaded
    options = replace(options, mode="full" if options.mode == "two_pass" else options.mode)
    features = features_of(samples, config)
    search = build_search(TorchEngine(model), options, tokenizer.unk_id)
    return decode_batch(model, search, features[None], torch.tensor([len(features)]), options)[0]


def said(final):
    """(token, frame from the start of the stream) of a stream, over its segments."""
    return [
        (token, segment.first_frame + frame)
        for segment in final.segments
        for token, frame in zip(segment.hypotheses[0].tokens, segment.hypotheses[0].timestamps, strict=True)
    ]


def decode(loaded, samples, options, endpoint=None, cuts=None):
    decoder = decoder_of(loaded, options, endpoint)
    for packet in [samples] if cuts is None else cuts:
        decoder.accept(packet, RATE)
    return decoder.finish()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_streamed_tokens_and_times_equal_the_simulated_ones(loaded, mode, method, seed):
    rng = random.Random(f"{mode} {method} {seed}")
    chunk = rng.choice([80, 160, 320])
    options = DecodingOptions(
        mode=mode, method=method, chunk_ms=chunk, look_ahead_ms=chunk * rng.randint(1, 3),
        left_context_ms=rng.choice([320, 640, 1280]),
    )  # fmt: skip
    samples = noise(rng.uniform(0.9, 2.2), seed)
    expected = simulate(loaded, samples, options)
    final = decode(loaded, samples, options, cuts=packets(samples, rng))
    assert len(expected.tokens) > 5
    assert said(final) == list(zip(expected.tokens, expected.timestamps, strict=True))
    hypothesis = final.segments[0].hypotheses[0]
    assert hypothesis.log_prob == pytest.approx(expected.log_prob, abs=1e-9)
    assert hypothesis.token_log_probs == pytest.approx(expected.token_log_probs, abs=1e-9)
    assert final.text == loaded[2].decode(expected.tokens)
    assert final.num_frames == len(features_of(samples, loaded[1])) // 4


@pytest.mark.parametrize("rest", [0, 1, 79, 80, 400, 560, 640, 700, 5119])
@pytest.mark.parametrize("mode", ["streaming", "look_ahead"])
def test_no_length_loses_its_last_frames(student, mode, rest):
    options = DecodingOptions(mode=mode, left_context_ms=640)
    samples = noise((10240 + rest) / RATE, 3)
    expected = simulate(student, samples, options)
    assert said(decode(student, samples, options)) == list(zip(expected.tokens, expected.timestamps, strict=True))


@pytest.mark.parametrize("endpoint", [None, SHORT])
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_packets_of_one_sample_and_of_minutes_give_the_same(student, mode, endpoint):
    options = DecodingOptions(mode=mode, chunk_ms=80, look_ahead_ms=160, left_context_ms=320)
    samples = noise(0.83, 4)
    at_once = decode(student, samples, options, endpoint)
    assert decode(student, samples, options, endpoint, np.split(samples, len(samples))) == at_once
    assert decode(student, samples, options, endpoint, packets(samples, random.Random(5))) == at_once
    assert (len(at_once.segments) > 1) == (endpoint is not None)


@pytest.mark.parametrize("method", METHODS)
def test_a_complete_block_shows_what_the_look_ahead_pass_says(student, method):
    options = DecodingOptions(mode="two_pass", method=method, chunk_ms=160, look_ahead_ms=320, left_context_ms=320)
    features = features_of(noise(1.6, 6), student[1])
    engine, modes = TorchEngine(student[0]), ("two_pass", "look_ahead")
    batches = [StreamBatch(engine, student[2], replace(options, mode=mode)) for mode in modes]
    streams = [batch.join() for batch in batches]
    for start in range(0, len(features) - 16, 16):
        for batch, stream in zip(batches, streams, strict=True):
            batch.accept(stream, features[start : start + 16].numpy())
            batch.run()
        if start % 32 == 0:  # between two blocks the streaming pass goes on from the look-ahead pass
            stable = batches[0].stable_tokens(streams[0])
            assert streams[0].shown.tokens[: len(stable)] == stable == batches[1].stable_tokens(streams[1])
        else:
            assert streams[0].shown == streams[1].shown
    assert streams[0].num_changed_words > 0


def test_the_causal_output_is_computed_once(student, monkeypatch):
    model, config, tokenizer = student
    counts, forward = [], model.encoder.forward_chunk
    monkeypatch.setattr(model.encoder, "forward_chunk", lambda x, *rest: counts.append(x.shape[1]) or forward(x, *rest))
    monkeypatch.setattr(model.encoder, "forward_causal", None)
    samples = noise(1.3, 7)
    decode(student, samples, DecodingOptions(mode="two_pass"), SHORT, packets(samples, random.Random(7)))
    num_frames = len(features_of(samples, config))
    assert num_frames - 4 < sum(counts) <= num_frames


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_streams_that_share_a_batch_do_not_disturb_each_other(loaded, mode, method):
    rng = random.Random(8)
    options = DecodingOptions(mode=mode, method=method, chunk_ms=160, look_ahead_ms=320, left_context_ms=320)
    recordings = [noise(seconds, seed) for seed, seconds in enumerate((1.1, 0.3, 0.9, 0.012, 1.3, 0.7))]
    batch = StreamBatch(TorchEngine(loaded[0]), loaded[2], options, SHORT)
    waiting = list(enumerate(recordings))
    active, finals = [], {}
    broken_off = decoder_of(loaded, batch=batch)
    while waiting or active:
        if waiting and rng.random() < 0.4:
            place, samples = waiting.pop(0)
            active.append((place, decoder_of(loaded, batch=batch), packets(samples, rng)))
        if broken_off is not None:
            broken_off.push(noise(0.1, 9), RATE)
            if len(finals) >= 2:
                broken_off.leave()
                broken_off = None
        for entry in list(active):
            place, decoder, parts = entry
            if rng.random() < 0.3:
                continue
            packet = next(parts, None)
            if packet is not None:
                decoder.push(packet, RATE)
                continue
            decoder.end()
            batch.run()
            finals[place] = decoder.final()
            active.remove(entry)
        batch.run()
    assert len(batch) == 0
    for place, samples in enumerate(recordings):
        alone = decode(loaded, samples, options, SHORT)
        assert said(finals[place]) == said(alone)
        assert finals[place].text == alone.text and finals[place].num_changed_words == alone.num_changed_words
        assert [segment.start for segment in finals[place].segments] == [segment.start for segment in alone.segments]


def test_reset_forgets_everything(student):
    options = DecodingOptions(mode="two_pass", left_context_ms=640)
    decoder = decoder_of(student, options, SHORT)
    samples = noise(1.2, 10)
    expected = decode(student, samples, options, SHORT)
    decoder.accept(noise(0.9, 11), RATE)
    decoder.reset()
    assert decoder.partial().text == ""
    decoder.accept(samples, RATE)
    assert decoder.finish() == expected == decoder.finish()
    decoder.reset()
    decoder.accept(resample(samples, RATE, 8000), 8000)  # another rate, in another stream
    assert decoder.finish().num_frames == expected.num_frames


def test_another_sampling_rate_decodes_as_the_resampled_recording(student):
    options = DecodingOptions(mode="look_ahead", left_context_ms=640)
    samples = noise(1.1, 13, 8000)
    decoder = decoder_of(student, options)
    for packet in packets(samples, random.Random(14)):
        decoder.accept(packet, 8000)
    final = decoder.finish()
    assert said(final) == said(decode(student, resample(samples, 8000, RATE), options))
    assert final.duration == pytest.approx(1.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_the_stable_beginning_of_a_partial_stays(student, mode, method):
    options = DecodingOptions(mode=mode, method=method, chunk_ms=80, look_ahead_ms=320, left_context_ms=320)
    decoder = decoder_of(student, options)
    stable, texts = "", []
    for packet in np.array_split(noise(1.5, 15), 40):
        partial = decoder.accept(packet, RATE)
        assert partial.text.startswith(stable) and partial.text.startswith(partial.stable_text)
        assert partial.text == " ".join(word.word for word in partial.words)
        stable = partial.stable_text
        texts.append(partial.text)
    final = decoder.finish()
    assert (texts[-1] == "") == (mode == "full")
    if method == "greedy_search" and mode != "two_pass":
        assert stable == texts[-1] and final.num_changed_words == 0
    if mode == "two_pass":
        assert final.num_changed_words > 0


def test_words_have_ordered_times_inside_their_segments(student):
    final = decode(student, noise(2.0, 16), DecodingOptions(mode="two_pass", left_context_ms=640), SHORT)
    assert len(final.segments) > 2 and final.segments[0].start == 0.0
    assert final.text == " ".join(segment.text for segment in final.segments)
    for segment, following in zip(final.segments, (*final.segments[1:], None), strict=True):
        assert segment.start < segment.end <= (final.duration if following is None else following.start)
        assert segment.end - segment.start <= 0.7
        assert segment.text == " ".join(word.word for word in segment.words)
        times = [time for word in segment.words for time in (word.start, word.end)]
        assert times == sorted(times) and segment.start <= times[0] and times[-1] <= segment.end
        assert all(0 < word.confidence <= 1 for word in segment.words)


def test_the_full_pass_sees_its_segment_and_nothing_else(student):
    model, config, tokenizer = student
    options = DecodingOptions(mode="two_pass", left_context_ms=640, chunk_ms=160, look_ahead_ms=320)
    samples = noise(1.9, 17)
    features = features_of(samples, config)
    causal, _ = model.encoder.forward_causal(features[None], torch.tensor([len(features)]), 4, 16)
    final = decode(student, samples, options, SHORT)
    ends = [segment.first_frame for segment in final.segments[1:]] + [final.num_frames]
    search = build_search(TorchEngine(model), options, tokenizer.unk_id)
    assert len(ends) > 2
    for segment, end in zip(final.segments, ends, strict=True):
        part = causal[:, segment.first_frame : end]
        lens = torch.tensor([part.shape[1]])
        out = model.joiner.project_encoder(model.encoder.forward_noncausal(part, lens, None, None))
        ((expected, *_),) = search.decode(out.detach().numpy(), lens.numpy())
        assert segment.hypotheses[0].tokens == expected.tokens
        assert segment.hypotheses[0].timestamps == expected.timestamps


@pytest.mark.parametrize("method", METHODS)
def test_an_endpoint_keeps_the_encoder_and_inside_speech_the_labels(loaded, method):
    model, config, tokenizer = loaded
    options = DecodingOptions(mode="streaming", method=method, left_context_ms=640, chunk_ms=160)
    samples = noise(1.9, 18)
    features = features_of(samples, config)
    out, _ = model.encode(features[None], torch.tensor([len(features)]), "streaming", 4, 16)
    final = decode(loaded, samples, options, SHORT)
    labels: list[int] = []
    ends = [segment.first_frame for segment in final.segments[1:]] + [final.num_frames]
    assert len(ends) > 2
    for segment, end in zip(final.segments, ends, strict=True):
        search = build_search(TorchEngine(model), options, tokenizer.unk_id)
        row, slot = search.join(), np.zeros(1, np.int64)
        search.slots.reserve(len(labels), np.zeros(0, np.int64))
        for label in labels:
            slot = search.slots.after(slot, np.array([label]))
        search.places.slots[row] = slot
        part = out[:, segment.first_frame : end]
        search.advance([row], part.detach().numpy(), np.array([part.shape[1]]))
        (expected,) = search.results([row])
        assert segment.hypotheses[0].tokens == expected.tokens
        labels = labels + list(expected.tokens) if segment.rule == "longest_segment" else []


@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_memory_does_not_grow_with_the_stream(student, mode):
    options = DecodingOptions(mode=mode, chunk_ms=160, look_ahead_ms=320, left_context_ms=320)
    decoder = decoder_of(student, options, SHORT, keep_segments=False)
    sizes = []
    for _ in range(12):
        decoder.accept(noise(0.8, 20), RATE)
        stream = decoder._stream
        kept = [*stream.block, *stream.causal_out, stream.features[stream.num_taken :]]
        sizes.append(sum(frames.size for frames in kept) + len(decoder.batch.mode.search.entries.chains.before))
        assert stream.segments == [] and decoder._segments == []
    assert max(sizes[6:]) <= 1.3 * max(sizes[:6])


def test_wrong_audio_is_named(student):
    decoder = decoder_of(student, DecodingOptions(mode="streaming"))
    for samples, message in (
        (np.zeros((2, 100), np.float32), r"mix channels down.*got float32 of shape \(2, 100\)"),
        (np.zeros(100, np.int32), "int16 or floating-point numbers.*got int32"),
        (np.array([0.0, np.inf], np.float16), "samples must be numbers of a size up to 1e"),
        (np.array([0.0, np.nan]), "samples must be numbers of a size up to 1e"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.accept(samples, RATE)
    with pytest.raises(ValueError, match="sampling_rate must be a whole number from 1000 to 768000 Hz, got 0"):
        decoder.accept(noise(0.1), 0)
    decoder.accept(noise(0.1), RATE)
    with pytest.raises(ValueError, match="sampling_rate must stay 16000 Hz within a stream, got 8000"):
        decoder.accept(noise(0.1), 8000)
    with pytest.raises(ValueError, match="not decoded to its end"):
        decoder.final()
    decoder.finish()
    with pytest.raises(ValueError, match=r"the stream has ended: reset\(\)"):
        decoder.accept(noise(0.1), RATE)


def test_audio_too_short_to_say_anything_is_no_error(student):
    for mode in STREAMING_MODES:
        for seconds in (0.0, 0.001, 0.03):
            final = decode(student, noise(seconds), DecodingOptions(mode=mode), SHORT)
            assert (final.segments, final.text, final.num_frames) == ((), "", 0)


def test_what_load_model_returns_makes_an_engine_and_a_decoder(tmp_path):
    decoder = decoder_of(load_model(make_model_dir(tmp_path / "model", epochs=1)))
    assert decoder.accept(noise(1.0), RATE).text or decoder.finish().text


def test_a_step_longer_than_a_segment_is_refused(student):
    options = DecodingOptions(mode="look_ahead", look_ahead_ms=1280)
    with pytest.raises(ConfigError, match="longest_segment must be at least one decoding step of 1280 ms, got 0.7 s"):
        decoder_of(student, options, SHORT)
    with pytest.raises(ValueError, match="options and endpoint belong to the batch"):
        decoder_of(student, options, batch=StreamBatch(TorchEngine(student[0]), student[2], options))
