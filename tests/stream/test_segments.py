"""Where segments end, and what the next one begins with: batches whose search says what the test wants."""

import pytest

from cascade.config.options import ConfigError
from cascade.models.torch_engine import TorchEngine
from cascade.search.methods import DecodingOptions
from cascade.stream.batch import StreamBatch
from cascade.stream.endpoint import EndpointOptions
from tests.stream.test_streaming import decoder_of, features_of, noise, student  # noqa: F401


def scripted(student, says, endpoint, mode="streaming"):  # noqa: F811
    """A batch whose search says symbol 3 at the frames (of a segment) for which `says` holds."""
    batch = StreamBatch(TorchEngine(student[0]), student[2], DecodingOptions(mode=mode), endpoint)
    batch.mode.search.choose = lambda logits, frames: 3 * says(frames)
    return batch


def test_silence_after_speech_ends_a_segment_and_silence_alone_is_dropped(student):  # noqa: F811
    features = features_of(noise(8.0, 19), student[1])
    batch = scripted(student, lambda frames: frames < 10, EndpointOptions(silence_after_speech=1.2))
    stream = batch.join()
    batch.accept(stream, features.numpy())
    batch.finish(stream)
    batch.run()
    # The last word ends at frame 9; 30 frames of silence are complete with frame 39, the end of chunk 5.
    assert [(segment.first_frame, segment.num_frames) for segment in stream.segments] == [
        (start, 40) for start in range(0, 200, 40)
    ]
    assert {segment.rule for segment in stream.segments} == {"silence_after_speech"}
    batch = scripted(student, lambda frames: frames < 0, EndpointOptions(silence_from_start=2.0), "two_pass")
    stream = batch.join()
    for start in range(0, 800, 32):
        batch.accept(stream, features[start : start + 32].numpy())
        batch.run()
        assert stream.num_frames == sum(map(len, stream.causal_out)) < 56 and stream.num_waiting == 0
    assert stream.first_frame == 168


@pytest.mark.parametrize("mode", ["streaming", "two_pass"])
def test_every_segment_begins_without_labels(student, mode):  # noqa: F811
    batch = scripted(student, lambda frames: frames < 10, EndpointOptions(silence_after_speech=0.5), mode)
    stream = batch.join()
    batch.accept(stream, features_of(noise(0.96, 19), student[1]).numpy())
    batch.run()
    assert [len(segment.hypotheses[0].tokens) for segment in stream.segments] == [10] and stream.num_frames == 0
    rows = [stream.row, stream.corrected] if mode == "two_pass" else stream.row
    assert not batch.mode.search.places.slots[rows].any()


def test_a_segment_that_begins_inside_speech_keeps_the_labels(student):  # noqa: F811
    batch = scripted(student, lambda frames: frames >= 0, EndpointOptions(longest_segment=1.0))
    stream = batch.join()
    batch.accept(stream, features_of(noise(1.2, 19), student[1]).numpy())
    while not stream.segments:
        batch.run()
    assert [segment.rule for segment in stream.segments] == ["longest_segment"]
    assert batch.mode.search.places.slots[stream.row].any()


def test_a_stream_may_have_its_own_silence_that_ends_segments(student):  # noqa: F811
    features = features_of(noise(8.0, 19), student[1]).numpy()
    batch = scripted(student, lambda frames: frames < 10, EndpointOptions(silence_after_speech=1.2))
    streams = [batch.join() for _ in range(3)]
    batch.end_segments_after(streams[1], 0.5)  # 13 frames behind frame 9: with chunk 3
    batch.end_segments_after(streams[2], 0.5)
    batch.end_segments_after(streams[2], None)
    for stream in streams:
        batch.accept(stream, features)
        batch.finish(stream)
    batch.run()
    counts = [[segment.num_frames for segment in stream.segments][:5] for stream in streams]
    assert counts == [[40] * 5, [24] * 5, [40] * 5]
    batch.end_segments_after(streams[1], 3.0)  # nor does a shorter pause end its long segments
    assert streams[1].endpoint.late_pause == 3.0 and streams[2].endpoint.late_pause == 0.4
    batch.end_segments_after(streams[1], 60.0)
    assert streams[1].endpoint.late_pause == EndpointOptions().longest_segment / 2
    with pytest.raises(ConfigError, match="silence_after_speech"):
        batch.end_segments_after(batch.join(), -1.0)


def test_a_decoder_keeps_its_silence_through_a_reset_and_one_without_endpoints_has_none(student):  # noqa: F811
    options = DecodingOptions(mode="two_pass", left_context_ms=640)
    decoder = decoder_of(student, options, EndpointOptions())
    decoder.end_segments_after(0.3)
    decoder.reset()
    assert decoder._stream.endpoint == EndpointOptions(silence_after_speech=0.3)
    with pytest.raises(ValueError, match="one segment"):
        decoder_of(student, options).end_segments_after(0.3)
