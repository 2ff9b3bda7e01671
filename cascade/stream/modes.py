"""The modes of a stream: what its causal output waits for, when it is searched, and what says a segment's final text.

- streaming: every chunk is searched at once; the search's own text is final.
- look_ahead: the causal output waits until a block is complete; the block is searched.
- full: the causal output of the segment waits until the segment ends, and the full pass says its text. Where segments
  end by rules, a greedy search of the chunks looks for them.
- two_pass: every chunk is searched at once, going on from where the look-ahead pass ended; a complete block replaces
  that by the look-ahead pass (the chunk that completes it is searched by that pass alone); the full pass says the text.

A full pass begins without labels of the segment before, the other searches too unless the segment begins inside speech.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cascade.config.options import ENCODER_FRAME_MS
from cascade.search.greedy import GreedySearch
from cascade.search.hypothesis import Hypothesis
from cascade.search.methods import DecodingOptions, build_search
from cascade.search.rows import Search, Starts
from cascade.search.scorer import Scorer
from cascade.stream.endpoint import EndpointOptions
from cascade.stream.engine import Engine, pad
from cascade.stream.words import NOTHING


class EndedSegment(NamedTuple):
    """A segment whose text is final."""

    first_frame: int
    num_frames: int
    hypotheses: tuple[Hypothesis, ...]
    """Best first; timestamps count from first_frame. Greedy search has one."""
    rule: str
    """The endpoint rule that ended it, or end_of_stream."""


@dataclass(eq=False)
class Stream:
    """One stream of a StreamBatch. All counts are 40 ms encoder frames."""

    features: np.ndarray
    """(t, F) frames that were heard; those before `num_taken` are decoded."""
    endpoint: EndpointOptions | None = None
    """Rules that end its segments; None: it is one."""
    num_taken: int = 0
    finished: bool = False
    """No more features will come."""
    closed: bool = False
    """All is decoded, and the stream has left the batch."""
    first_frame: int = 0
    """Where the open segment begins."""
    num_frames: int = 0
    """Frames of the open segment so far."""
    causal: int = 0
    """Its row of the causal encoder; `blocks` that of the look-ahead pass."""
    blocks: int = 0
    row: int = 0
    """The search row of what is shown."""
    corrected: int = 0
    """In mode two_pass the search row of the look-ahead pass, at the end of its last block."""
    block: list[np.ndarray] = field(default_factory=list)
    """(t, D) causal output of the look-ahead block that is not complete yet."""
    causal_out: list[np.ndarray] = field(default_factory=list)
    """(t, D) causal output of the open segment, for the full pass."""
    best: Hypothesis = NOTHING
    """The open segment's best hypothesis; `shown` is what a user saw of it after the last step."""
    shown: Hypothesis = NOTHING
    starts: Starts = field(default_factory=dict)
    """Where scorers begin for this stream alone."""
    segments: list[EndedSegment] = field(default_factory=list)
    """Final, not fetched yet."""
    num_changed_words: int = 0
    """Words that were shown and changed or taken back later: flicker."""
    num_steps: int = 0

    @property
    def num_waiting(self) -> int:
        """Feature frames heard and not decoded."""
        return len(self.features) - self.num_taken

    @property
    def num_block_frames(self) -> int:
        return sum(map(len, self.block))

    def take(self, count: int) -> np.ndarray:
        """The next (t, F) frames, `count` of them at most."""
        taken = self.features[self.num_taken : self.num_taken + count]
        self.num_taken += len(taken)
        return taken


Streams = Sequence[Stream]
Frames = Sequence[np.ndarray]
"""(t, D) causal output, a stream each."""


class Streaming:
    """Mode streaming, and what the other modes do differently.

    Args:
      ends: rules end segments, not only the streams' ends.
      new_search: makes the search that the options name.
    """

    shows = True
    """There is a text before it is final."""

    def __init__(self, engine: Engine, options: DecodingOptions, ends: bool, new_search: Callable[[], Search]) -> None:
        self.engine, self.search = engine, new_search()
        self.text_search = self.search
        """The search that says the final text."""
        self.left = options.left_context_ms // ENCODER_FRAME_MS
        self.step_frames = options.chunk_ms // ENCODER_FRAME_MS
        """Frames of the steps after which a segment may end."""

    def join(self, stream: Stream) -> None:
        stream.row = self.search.join()

    def leave(self, stream: Stream) -> None:
        self.search.leave(stream.row)

    def begin_with(self, stream: Stream) -> None:
        """The stream's `starts` have changed."""
        self.search.begin_with(stream.row, stream.starts)

    def hear(self, streams: Streams, causal_out: Frames) -> Streams:
        """A chunk of causal output for every stream; returns those whose segment may end here."""
        self.search_on(streams, causal_out)
        return streams

    def rest(self, streams: Streams) -> Streams:
        """What still waits when these streams end; returns those that have another text now."""
        return ()

    def finals(self, streams: Streams) -> list[list[Hypothesis]]:
        """What these streams' segments say in the end, best hypotheses first."""
        return self.search.n_best([stream.row for stream in streams])

    def restart(self, stream: Stream, keep_labels: bool = False) -> None:
        """The next segment begins; without labels as utterances do in training, or in the middle of speech."""
        self.search.restart(stream.row, keep_labels)

    def stable_tokens(self, stream: Stream) -> tuple[int, ...]:
        """The first tokens of the open segment, which no pass but the full one can take back."""
        return self.search.stable_tokens(stream.row)

    def search_on(self, streams: Streams, frames: Frames) -> None:
        """Search on through the encoder output (t, D) of each stream."""
        if not streams:
            return
        padded, lens = pad(frames)
        rows = [stream.row for stream in streams]
        self.search.advance(rows, self.engine.project(padded), lens)
        for stream, best in zip(streams, self.search.results(rows, final=False), strict=True):
            stream.best = best


class LookAhead(Streaming):
    def __init__(self, engine: Engine, options: DecodingOptions, ends: bool, new_search: Callable[[], Search]) -> None:
        super().__init__(engine, options, ends, new_search)
        self.block_frames = self.step_frames = options.look_ahead_ms // ENCODER_FRAME_MS
        self.encoder = engine.block_rows(self.left)

    def join(self, stream: Stream) -> None:
        super().join(stream)
        stream.blocks = self.encoder.join()

    def leave(self, stream: Stream) -> None:
        super().leave(stream)
        self.encoder.leave(stream.blocks)

    def hear(self, streams: Streams, causal_out: Frames) -> Streams:
        for stream, frames in zip(streams, causal_out, strict=True):
            stream.block.append(frames)
        complete = [stream for stream in streams if stream.num_block_frames == self.block_frames]
        self.search_on(complete, self.encode(complete))
        return complete

    def rest(self, streams: Streams) -> Streams:
        streams = [stream for stream in streams if stream.block]
        self.search_on(streams, self.encode(streams))
        return streams

    def encode(self, streams: Streams) -> Frames:
        """The look-ahead pass over the block (at a segment's end a shorter one) of every stream."""
        if not streams:
            return []
        frames, lens = pad([np.concatenate(stream.block) for stream in streams])
        out = self.encoder.advance([stream.blocks for stream in streams], frames, lens)
        for stream in streams:
            stream.block.clear()
        return [each[:length] for each, length in zip(out, lens, strict=True)]


def _full_pass(engine: Engine, search: Search, streams: Streams) -> list[int]:
    """The full pass over the open segments of these streams, searched; the caller lets its search rows leave."""
    causal_out, lens = pad([np.concatenate(stream.causal_out) for stream in streams])
    rows = [search.join(stream.starts) for stream in streams]
    search.advance(rows, engine.project(engine.full(causal_out, lens)), lens)
    for stream in streams:
        stream.causal_out.clear()
    return rows


class Full(Streaming):
    shows = False

    def __init__(self, engine: Engine, options: DecodingOptions, ends: bool, new_search: Callable[[], Search]) -> None:
        super().__init__(engine, options, ends, new_search)
        self.ends = ends
        self.search = GreedySearch(engine, options.blank_penalty, self.text_search.unk_id)

    def hear(self, streams: Streams, causal_out: Frames) -> Streams:
        for stream, frames in zip(streams, causal_out, strict=True):
            stream.causal_out.append(frames)
        return super().hear(streams, causal_out) if self.ends else streams

    def finals(self, streams: Streams) -> list[list[Hypothesis]]:
        rows = _full_pass(self.engine, self.text_search, streams)
        hypotheses = self.text_search.n_best(rows)
        for row in rows:
            self.text_search.leave(row)
        return hypotheses

    def stable_tokens(self, stream: Stream) -> tuple[int, ...]:
        return ()


class TwoPass(LookAhead):
    def __init__(self, engine: Engine, options: DecodingOptions, ends: bool, new_search: Callable[[], Search]) -> None:
        super().__init__(engine, options, ends, new_search)
        self.step_frames = options.chunk_ms // ENCODER_FRAME_MS

    def join(self, stream: Stream) -> None:
        super().join(stream)
        stream.corrected = self.search.join()

    def leave(self, stream: Stream) -> None:
        super().leave(stream)
        self.search.leave(stream.corrected)

    def begin_with(self, stream: Stream) -> None:
        super().begin_with(stream)
        self.search.begin_with(stream.corrected, stream.starts)

    def hear(self, streams: Streams, causal_out: Frames) -> Streams:
        incomplete = []
        for stream, frames in zip(streams, causal_out, strict=True):
            stream.causal_out.append(frames)
            if stream.num_block_frames + len(frames) < self.block_frames:
                incomplete.append((stream, frames))
            else:
                self.search.copy(stream.corrected, stream.row)
        if incomplete:
            self.search_on(*zip(*incomplete, strict=True))
        for stream in super().hear(streams, causal_out):
            self.search.copy(stream.row, stream.corrected)
        return streams

    def rest(self, streams: Streams) -> Streams:
        for stream in streams:  # the full pass says what these frames say
            stream.block.clear()
        return ()

    def finals(self, streams: Streams) -> list[list[Hypothesis]]:
        self.encode([stream for stream in streams if stream.block])  # the next segment's blocks begin with it
        rows = _full_pass(self.engine, self.search, streams)
        hypotheses = self.search.n_best(rows)
        for row in rows:
            self.search.leave(row)
        return hypotheses

    def restart(self, stream: Stream, keep_labels: bool = False) -> None:
        super().restart(stream, keep_labels)
        self.search.copy(stream.row, stream.corrected)

    def stable_tokens(self, stream: Stream) -> tuple[int, ...]:
        return self.search.stable_tokens(stream.corrected)


_MODES = {"streaming": Streaming, "look_ahead": LookAhead, "full": Full, "two_pass": TwoPass}


def build_mode(
    engine: Engine, options: DecodingOptions, unk_id: int | None, ends: bool, scorers: Sequence[Scorer] = ()
) -> Streaming:
    """The mode that the options name."""
    return _MODES[options.mode](engine, options, ends, lambda: build_search(engine, options, unk_id, scorers))
