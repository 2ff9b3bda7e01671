import numpy as np
import pytest
import torch

from cascade.checkpoint import load_model
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.search.hotwords import Hotwords
from cascade.search.methods import METHODS, STREAMING_MODES, DecodingOptions, build_search
from cascade.stream.batch import StreamBatch
from cascade.stream.decoder import StreamingDecoder
from cascade.stream.endpoint import EndpointOptions
from tests.stream.test_streaming import RATE, features_of, noise, said
from tests.tiny_run import make_model_dir

LISTS = (["three two :2", "two"], [], ["five five one four :3", "one three :0.5"], ["four :4"])
TIMES = {"chunk_ms": 160, "look_ahead_ms": 320, "left_context_ms": 320}
SHORT = EndpointOptions(longest_segment=0.7, late_pause=0.2, silence_after_speech=0.3)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    model, config, tokenizer = load_model(make_model_dir(tmp_path_factory.mktemp("run") / "model", epochs=1))
    return model.double().requires_grad_(False), config, tokenizer


def whole(student, samples, options, phrases):
    """The whole utterance under the masks of streaming, with a list that the search has from the start."""
    model, config, tokenizer = student
    mode = "full" if options.mode == "two_pass" else options.mode
    options = DecodingOptions(mode=mode, method=options.method, **TIMES)
    features = features_of(samples, config)
    search = build_search(TorchEngine(model), options, tokenizer.unk_id, [Hotwords(tokenizer, phrases)])
    return decode_batch(model, search, features[None], torch.tensor([len(features)]), options)[0]


def worth(tokenizer, phrases, tokens):
    """What a list adds for a text."""
    scorer = Hotwords(tokenizer, phrases)
    state, total = scorer.initial(1), 0.0
    for token in tokens:
        total += float(scorer.score(state)[0, token])
        state = scorer.advance(state, np.zeros(1, np.int64), np.array([token]))
    return total + float(scorer.final(state)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_every_stream_of_a_batch_has_its_own_list(student, mode, method):
    model, config, tokenizer = student
    options = DecodingOptions(mode=mode, method=method, **TIMES)
    batch = StreamBatch(TorchEngine(model), tokenizer, options)
    decoders = [StreamingDecoder(None, config, tokenizer, batch=batch, hotwords=phrases) for phrases in LISTS]
    samples = [noise(1.3 + 0.2 * seed, seed % 2) for seed in range(len(LISTS))]
    for begin in range(0, 40000, 2000):
        for decoder, heard in zip(decoders, samples, strict=True):
            decoder.push(heard[begin : begin + 2000], RATE)
        batch.run()
    finals, changed = [decoder.finish() for decoder in decoders], 0
    for final, heard, phrases in zip(finals, samples, LISTS, strict=True):
        expected = whole(student, heard, options, phrases)
        assert said(final) == list(zip(expected.tokens, expected.timestamps, strict=True))
        external = final.segments[0].hypotheses[0].external_score
        assert external == pytest.approx(expected.external_score, abs=1e-4)
        changed += expected.tokens != whole(student, heard, options, []).tokens
    assert changed > 1  # the lists matter
    assert list(batch.mode.text_search.scorers[0]._sizes) == [0]  # and are forgotten with their streams


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_a_list_that_changes_within_a_segment_weighs_all_of_it(student, mode, method):
    model, config, tokenizer = student
    options = DecodingOptions(mode=mode, method=method, **TIMES)
    changing = StreamingDecoder(TorchEngine(model), config, tokenizer, options, hotwords=LISTS[0])
    samples, search = noise(1.7, 1), changing.batch.mode.text_search
    changing.accept(samples[:12000], RATE)
    changing.prefer(LISTS[2])
    if mode != "full":
        (scorer,), earned = search.scorers, []
        rows = [changing._stream.row, *([changing._stream.corrected] if mode == "two_pass" else [])]
        for hypothesis in [each for n_best in search.n_best(rows) for each in n_best]:
            expected = worth(tokenizer, LISTS[2], hypothesis.tokens)
            assert hypothesis.external_score == pytest.approx(expected, abs=1e-4)
            earned.append(expected)
        assert len(scorer._sizes) == 2
    final = changing.accept(samples[12000:], RATE) and changing.finish()
    hypothesis = final.segments[0].hypotheses[0]
    assert hypothesis.external_score == pytest.approx(worth(tokenizer, LISTS[2], hypothesis.tokens), abs=1e-4)
    if mode in ("full", "two_pass"):  # the full pass comes after the change
        assert hypothesis.tokens == whole(student, samples, options, LISTS[2]).tokens
    with pytest.raises(ValueError, match="the stream has ended"):
        changing.prefer(LISTS[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_no_bonus_passes_the_end_of_a_segment(student, mode, method):
    model, config, tokenizer = student
    options = DecodingOptions(mode=mode, method=method, **TIMES)
    decoder = StreamingDecoder(TorchEngine(model), config, tokenizer, options, SHORT, hotwords=LISTS[2])
    decoder.accept(noise(4.0, 1), RATE)
    segments = decoder.finish().segments
    assert len(segments) > 3
    for hypothesis in [each for segment in segments for each in segment.hypotheses]:
        expected = worth(tokenizer, LISTS[2], hypothesis.tokens)
        assert hypothesis.external_score == pytest.approx(expected, abs=1e-4)


def test_a_list_outlives_a_reset_and_a_wrong_one_changes_nothing(student):
    model, config, tokenizer = student
    options = DecodingOptions(mode="streaming", **TIMES)
    decoder = StreamingDecoder(TorchEngine(model), config, tokenizer, options, hotwords=LISTS[3])
    samples, expected = noise(1.0, 1), whole(student, noise(1.0, 1), options, LISTS[3])
    for _ in range(2):
        with pytest.raises(ValueError, match="hotword 'four six' has what the model's tokens cannot say: six"):
            decoder.prefer(["one", "four six"])
        decoder.accept(samples, RATE)
        assert decoder.finish().segments[0].hypotheses[0].tokens == expected.tokens
        decoder.reset()
    with pytest.raises(ValueError, match="hotword 'six'"):
        StreamingDecoder(None, config, tokenizer, batch=decoder.batch, hotwords=["six"])
    assert len(decoder.batch) == 1


def test_a_first_list_that_is_wrong_leaves_no_scorer_to_all_streams(student):
    model, config, tokenizer = student
    decoder = StreamingDecoder(TorchEngine(model), config, tokenizer, DecodingOptions(mode="streaming", **TIMES))
    with pytest.raises(ValueError, match="hotword 'six'"):
        decoder.prefer(["six"])
    assert not decoder.batch.mode.text_search.scorers
