"""Streams of different age and length advance together, one causal chunk at a time; they join, wait, leave, restart.

What a stream remembers is explicit: a row of each encoder's state, a row of the search for its open segment, and the
frames that still wait for a pass; `modes` says what waits for what.

With endpoints, the text is cut into segments. As in sherpa-onnx the encoders' states are kept and frame numbers
restart, but behind a pause the next segment's search begins without labels. The full pass sees its segment only.
Without endpoints a stream is one segment, and its tokens are those of the whole utterance under the masks of streaming;
memory then grows with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cascade.config.options import ENCODER_FRAME_MS, SUBSAMPLING, ConfigError
from cascade.search.hotwords import Hotwords
from cascade.search.methods import DecodingOptions
from cascade.search.rows import Starts
from cascade.search.scorer import Scorer
from cascade.stream.endpoint import EndpointOptions, find_endpoint
from cascade.stream.engine import Engine, pad
from cascade.stream.modes import EndedSegment, Stream, Streams, build_mode
from cascade.stream.words import NOTHING, count_changed
from cascade.text.tokens import Tokenizer


class StreamBatch:
    """Decodes many streams of one model with one set of options.

    Args:
      options: any mode of STREAMING_MODES.
      endpoint: rules that cut streams into segments; None = each stream is one segment.
      scorers: scores from outside, for the search that says the text.
    Raises:
      ConfigError: a decoding step longer than the longest segment.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, options: DecodingOptions,
        endpoint: EndpointOptions | None = None, scorers: Sequence[Scorer] = (),
    ) -> None:  # fmt: skip
        self.options, self.tokenizer, self.engine, self._endpoint = options, tokenizer, engine, endpoint
        self.mode = build_mode(engine, options, tokenizer.unk_id, endpoint is not None, scorers)
        step_ms = self.mode.step_frames * ENCODER_FRAME_MS
        if endpoint is not None and step_ms / 1000 > endpoint.longest_segment:
            raise ConfigError(
                f"longest_segment must be at least one decoding step of {step_ms} ms, "
                f"got {endpoint.longest_segment:g} s"
            )
        self.chunk_features = options.chunk_ms // ENCODER_FRAME_MS * SUBSAMPLING
        """Feature frames of a chunk."""
        self._encoder = engine.causal_rows(options.left_context_ms // ENCODER_FRAME_MS)
        self._streams: list[Stream] = []
        self._given_up: deque[Stream] = deque()

    def __len__(self) -> int:
        return len(self._streams)

    def join(self) -> Stream:
        """A new stream, which has heard nothing."""
        nothing = np.zeros((0, self.engine.num_mel_bins), np.float32)
        stream = Stream(nothing, self._endpoint, causal=self._encoder.join())
        self.mode.join(stream)
        self._streams.append(stream)
        return stream

    def leave(self, stream: Stream) -> None:
        """Forget a stream, in the middle of a segment if need be."""
        self._streams.remove(stream)
        self._encoder.leave(stream.causal)
        self.mode.leave(stream)
        _release(stream.starts)

    def prefer(self, stream: Stream, hotwords: Sequence[str]) -> None:
        """Give a stream phrases of its own, besides those that all streams have, in the place of earlier ones.

        They hold from the next step on, for the whole open segment. A phrase may end with its boost, `new york :2.5`.

        Raises:
          ValueError: a phrase that the model's tokens cannot say; the earlier ones stay.
        """
        if not hotwords and not stream.starts:
            return
        search = self.mode.text_search
        known = next((scorer for scorer in search.scorers if isinstance(scorer, Hotwords)), None)
        scorer = known or Hotwords(self.tokenizer, scale=self.options.hotword_scale)
        earlier, stream.starts = stream.starts, {scorer: scorer.hold(hotwords)}
        if known is None:
            search.add(scorer)
        self.mode.begin_with(stream)
        _release(earlier)

    def end_segments_after(self, stream: Stream, silence: float | None) -> None:
        """Give a stream its own silence_after_speech, in seconds; None: that of all streams.

        Its late_pause is no shorter, so that this silence is what ends long segments too, up to half of the longest.

        Raises:
          ValueError: streams here are one segment each.
          ConfigError: no such silence.
        """
        if self._endpoint is None:
            raise ValueError("streams without endpoints are one segment each: no silence ends it")
        stream.endpoint = options = self._endpoint
        if silence is not None:
            late = max(options.late_pause, min(silence, options.longest_segment / 2))
            stream.endpoint = replace(options, silence_after_speech=silence, late_pause=late)

    def accept(self, stream: Stream, features: np.ndarray) -> None:
        """Let a stream hear (t, F) feature frames, not normalised; `step` decodes them."""
        assert not stream.finished, "accept() after finish()"
        if len(features):
            stream.features = np.concatenate((stream.features[stream.num_taken :], features))
            stream.num_taken = 0

    def finish(self, stream: Stream) -> None:
        """No more features will come: the next steps decode the rest, end the segment and close the stream."""
        stream.finished = True

    def give_up(self, stream: Stream) -> None:
        """Let a stream leave with the next `run`; any thread may ask, at any moment."""
        self._given_up.append(stream)

    def run(self) -> None:
        """Decode all that can be decoded."""
        while self._given_up:
            stream = self._given_up.popleft()
            if not stream.closed:
                stream.finished = stream.closed = True
                self.leave(stream)
        while self.step():
            pass

    def step(self) -> bool:
        """Advance every stream that can by one chunk (a finished one by its shorter rest, then to its end).

        Returns:
          False if there was nothing to do.
        """
        advancing, closing = [], []
        for stream in self._streams:
            if stream.num_waiting >= (SUBSAMPLING if stream.finished else self.chunk_features):
                advancing.append(stream)
            elif stream.finished:
                closing.append(stream)
        if advancing:
            self._advance(advancing)
        if closing:
            self._close(closing)
        return bool(advancing or closing)

    def stable_tokens(self, stream: Stream) -> tuple[int, ...]:
        """The first tokens of the open segment, which no pass but the full one can take back."""
        return self.mode.stable_tokens(stream)

    def _advance(self, streams: Streams) -> None:
        """One chunk of the causal pass, and what follows from it."""
        features, lens = pad([stream.take(self.chunk_features) for stream in streams])
        out = self._encoder.advance([stream.causal for stream in streams], features, lens)
        causal_out = []
        for stream, frames, length in zip(streams, out, (lens // SUBSAMPLING).tolist(), strict=True):
            stream.num_frames += length
            causal_out.append(frames[:length].copy())
        heard = self.mode.hear(streams, causal_out)
        self._show(streams)
        if self._endpoint is not None:
            self._end_segments([(stream, rule) for stream in heard if (rule := self._rule(stream))])

    def _rule(self, stream: Stream) -> str | None:
        """The rule that ends a stream's segment here."""
        last_token = stream.best.timestamps[-1] if stream.best.timestamps else None
        return find_endpoint(stream.endpoint, stream.num_frames, last_token, self.mode.step_frames)

    def _show(self, streams: Streams) -> None:
        for stream in streams:
            stream.num_steps += 1
            if self.mode.shows:
                stream.num_changed_words += count_changed(stream.shown, stream.best, self.tokenizer)
                stream.shown = stream.best

    def _end_segments(self, ended: Sequence[tuple[Stream, str]]) -> None:
        """The final text of these streams' open segments, which a rule ends; the next ones begin."""
        if not ended:
            return
        finals = self.mode.finals([stream for stream, _ in ended])
        for (stream, rule), hypotheses in zip(ended, finals, strict=True):
            stream.num_changed_words += count_changed(stream.shown, hypotheses[0], self.tokenizer)
            if hypotheses[0].tokens:
                stream.segments.append(
                    EndedSegment(stream.first_frame, stream.num_frames, tuple(hypotheses), rule)
                )
            stream.first_frame += stream.num_frames
            stream.num_frames = 0
            stream.best = stream.shown = NOTHING
            self.mode.restart(stream, keep_labels=rule == "longest_segment")

    def _close(self, streams: Streams) -> None:
        self._show(self.mode.rest(streams))
        self._end_segments([(stream, "end_of_stream") for stream in streams if stream.num_frames])
        for stream in streams:
            stream.num_steps += 1
            stream.closed = True
            self.leave(stream)


def _release(starts: Starts) -> None:
    for scorer, start in starts.items():
        scorer.release(start)
