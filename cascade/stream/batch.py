"""Streams of different age and length advance together, one causal chunk at a time; they join, wait, leave, restart.

What a stream remembers is explicit: a row of the causal encoder's state and one of the non-causal encoder's, the search
state of its open segment, and the frames that still wait for a pass. In mode

- streaming, the causal pass is searched chunk by chunk;
- look_ahead, the causal output waits until a look-ahead block is complete;
- full, the causal output of the segment waits until the segment ends;
- two_pass, every chunk is searched at once, going on from where the look-ahead pass ended; a complete block replaces
  that by the look-ahead pass (the chunk that completes it is searched by that pass alone); the full pass gives the
  text of the segment when it ends. All of them read the one causal output.

With endpoints, the text is cut into segments. What sherpa-onnx does at an endpoint holds here: the encoders' states are
kept, frame numbers restart, and the next segment's search remembers the last labels if the segment said any. The full
pass sees its segment only and starts without labels. Without endpoints a stream is one segment, and its tokens are
those of `decode_batch` on the whole utterance; memory then grows with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cascade.config.options import ENCODER_FRAME_MS, SUBSAMPLING, ConfigError
from cascade.models.state import join_streams, map_state, select_streams
from cascade.models.torch_engine import TorchEngine
from cascade.models.transducer import CascadedTransducer
from cascade.search.greedy import GreedySearch
from cascade.search.hypothesis import Hypothesis
from cascade.search.methods import DecodingOptions, build_search
from cascade.search.rows import Search
from cascade.stream.endpoint import EndpointOptions, find_endpoint
from cascade.stream.words import NOTHING, count_changed
from cascade.text.tokens import Tokenizer


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

    features: Tensor
    """(t, F) frames that were heard; those before `num_taken` are decoded."""
    num_taken: int = 0
    finished: bool = False
    """No more features will come."""
    closed: bool = False
    """All is decoded, and the stream has left the batch."""
    first_frame: int = 0
    """Start of the open segment."""
    num_frames: int = 0
    """Frames of the open segment so far."""
    block: list[Tensor] = field(default_factory=list)
    """(t, C) causal output of the look-ahead block that is not complete yet."""
    causal_out: list[Tensor] = field(default_factory=list)
    """(t, C) causal output of the open segment, for the full pass."""
    row: int = 0
    """The search row of the pass that is shown."""
    corrected: int = 0
    """In mode two_pass, the row that the look-ahead pass left at the end of its last block; else the same row."""
    best: Hypothesis = NOTHING
    """The open segment's best hypothesis; `shown` is what a user saw of it after the last step."""
    shown: Hypothesis = NOTHING
    segments: list[EndedSegment] = field(default_factory=list)
    """Final, not fetched yet."""
    num_changed_words: int = 0
    """Words that were shown and changed or taken back later: flicker."""
    num_steps: int = 0

    @property
    def num_waiting(self) -> int:
        """Feature frames heard and not decoded."""
        return self.features.shape[0] - self.num_taken

    @property
    def num_block_frames(self) -> int:
        return sum(part.shape[0] for part in self.block)

    def take(self, count: int) -> Tensor:
        """The next (t, F) frames, `count` of them at most."""
        taken = self.features[self.num_taken : self.num_taken + count]
        self.num_taken += taken.shape[0]
        return taken


class _EncoderRows:
    """The state of one encoder for all streams, a row each."""

    def __init__(self, new_state: Callable[[int], Any], forward: Callable[..., tuple[Tensor, Any]]) -> None:
        self._new_state, self._forward = new_state, forward
        self._state = new_state(0)
        self._num_rows = 0

    def join(self) -> None:
        new = self._new_state(1)
        self._state = join_streams(self._state, new) if self._num_rows else new
        self._num_rows += 1

    def leave(self, row: int) -> None:
        kept = [index for index in range(self._num_rows) if index != row]
        self._num_rows -= 1
        self._state = select_streams(self._state, self._index(kept))

    def advance(self, rows: list[int], parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Feed these rows, in ascending order, one (t, C) part each; the others wait untouched.

        Returns:
          (N, T, C) the encoder's output, and the (N,) lengths of the parts.
        """
        frames = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lens = torch.tensor([part.shape[0] for part in parts], device=frames.device)
        even = bool((lens == frames.shape[1]).all())
        everyone = len(rows) == self._num_rows
        state = self._state if everyone else select_streams(self._state, self._index(rows))
        out, new = self._forward(frames, state, None if even else lens)
        if everyone:
            self._state = new
        else:
            map_state(lambda whole, part: whole.index_copy_(0, self._index(rows), part), self._state, new)
        return out, lens

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self._state.processed_lens.device if hasattr(self._state, "processed_lens") else self._state[0].device


class StreamBatch:
    """Decodes many streams of one model with one set of options.

    Args:
      options: any mode of STREAMING_MODES.
      endpoint: rules that cut streams into segments; None = each stream is one segment.
    Raises:
      ConfigError: a decoding step longer than the longest segment.
    """

    def __init__(
        self, model: CascadedTransducer, tokenizer: Tokenizer, options: DecodingOptions,
        endpoint: EndpointOptions | None = None,
    ) -> None:  # fmt: skip
        self.options, self.tokenizer = options, tokenizer
        self._model, self._endpoint = model, endpoint
        mode = options.mode
        self._chunk = options.chunk_ms // ENCODER_FRAME_MS
        self._block = options.look_ahead_ms // ENCODER_FRAME_MS
        self._step_frames = self._block if mode == "look_ahead" else self._chunk
        if endpoint is not None and self._step_frames * ENCODER_FRAME_MS / 1000 > endpoint.longest_segment:
            raise ConfigError(
                f"longest_segment must be at least one decoding step of {self._step_frames * ENCODER_FRAME_MS} ms, "
                f"got {endpoint.longest_segment:g} s"
            )
        self._first_pass = mode in ("streaming", "two_pass") or (mode == "full" and endpoint is not None)
        self._look_ahead = mode in ("look_ahead", "two_pass")
        self._full_pass = mode in ("full", "two_pass")
        engine = TorchEngine(model)
        self._search = build_search(engine, options, tokenizer.unk_id)
        # In mode full the causal pass only looks for endpoints.
        self._step_search: Search = (
            GreedySearch(engine, options.blank_penalty, tokenizer.unk_id) if mode == "full" else self._search
        )
        encoder, left = model.encoder, options.left_context_ms // ENCODER_FRAME_MS
        self._like = encoder.feature_mean
        self._streams: list[Stream] = []
        self._rows = {"causal": _EncoderRows(lambda count: encoder.initial_state(count, left), encoder.forward_chunk)}
        if self._look_ahead:
            self._rows["look_ahead"] = _EncoderRows(
                lambda count: encoder.initial_block_state(count, left), encoder.forward_block
            )

    def __len__(self) -> int:
        return len(self._streams)

    @torch.inference_mode()
    def join(self) -> Stream:
        """A new stream, which has heard nothing."""
        stream = Stream(features=self._like.new_zeros(0, self._like.shape[0]))
        stream.row = stream.corrected = self._step_search.join()
        if self.options.mode == "two_pass":
            stream.corrected = self._step_search.join()
        self._streams.append(stream)
        for rows in self._rows.values():
            rows.join()
        return stream

    @torch.inference_mode()
    def leave(self, stream: Stream) -> None:
        """Forget a stream, in the middle of a segment if need be."""
        row = self._streams.index(stream)
        del self._streams[row]
        for search_row in {stream.row, stream.corrected}:
            self._step_search.leave(search_row)
        for rows in self._rows.values():
            rows.leave(row)

    def accept(self, stream: Stream, features: Tensor) -> None:
        """Let a stream hear (t, F) feature frames, not normalised; `step` decodes them."""
        assert not stream.finished, "accept() after finish()"
        if features.shape[0]:
            waiting = stream.features[stream.num_taken :]
            stream.features, stream.num_taken = torch.cat((waiting, features.to(self._like))), 0

    def finish(self, stream: Stream) -> None:
        """No more features will come: the next steps decode the rest, end the segment and close the stream."""
        stream.finished = True

    def run(self) -> None:
        """Decode all that can be decoded."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """Advance every stream that can by one chunk (a finished one by its shorter rest, then to its end).

        Returns:
          False if there was nothing to do.
        """
        size = self._chunk * SUBSAMPLING
        advancing, closing = [], []
        for stream in self._streams:
            if stream.num_waiting >= size or (stream.finished and stream.num_waiting >= SUBSAMPLING):
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
        if self.options.mode == "full":
            return ()
        return self._step_search.stable_tokens(stream.corrected)

    def _advance(self, streams: list[Stream]) -> None:
        """One chunk of the causal pass, and what follows from it."""
        parts = [stream.take(self._chunk * SUBSAMPLING) for stream in streams]
        causal_out, lens = self._rows["causal"].advance(self._rows_of(streams), parts)
        lens = lens // SUBSAMPLING
        for stream, out, length in zip(streams, causal_out, lens.tolist(), strict=True):
            stream.num_frames += length
            out = out[:length].clone()
            if self._look_ahead:
                stream.block.append(out)
            if self._full_pass:
                stream.causal_out.append(out)
        complete = [stream for stream in streams if self._look_ahead and stream.num_block_frames == self._block]
        if self._first_pass:
            searched = [index for index, stream in enumerate(streams) if stream not in complete]
            if searched:
                index = torch.tensor(searched, device=lens.device)
                some = [streams[place] for place in searched]
                rows = [stream.row for stream in some]
                self._search_on(some, rows, causal_out.index_select(0, index), lens.index_select(0, index))
        self._advance_blocks(complete)
        self._show(streams)
        if self._endpoint is not None:
            self._end_segments_where_due(complete if self.options.mode == "look_ahead" else streams)

    def _end_segments_where_due(self, streams: list[Stream]) -> None:
        ended, rules = [], []
        for stream in streams:
            last_token = stream.best.timestamps[-1] if stream.best.timestamps else None
            rule = find_endpoint(self._endpoint, stream.num_frames, last_token, self._step_frames)
            if rule is not None:
                ended.append(stream)
                rules.append(rule)
        if self.options.mode == "two_pass":  # blocks restart with segments; the full pass says what these frames say
            self._advance_blocks([stream for stream in ended if stream.block], searched=False)
        self._end_segments(ended, rules)

    def _advance_blocks(self, streams: list[Stream], searched: bool = True) -> None:
        """One block (at a segment's end a shorter one) of the look-ahead pass."""
        if not streams:
            return
        parts = [torch.cat(stream.block) for stream in streams]
        out, lens = self._rows["look_ahead"].advance(self._rows_of(streams), parts)
        for stream in streams:
            stream.block.clear()
        if searched:
            self._search_on(streams, [stream.corrected for stream in streams], out, lens)
            for stream in streams:
                self._step_search.copy(stream.corrected, stream.row)

    def _search_on(self, streams: list[Stream], rows: list[int], encoder_out: Tensor, lens: Tensor) -> None:
        """Let these rows, one per stream, search on through (N, T, C) encoder output."""
        self._step_search.advance(rows, *self._projected(encoder_out, lens))
        for stream, best in zip(streams, self._step_search.results(rows, final=False), strict=True):
            stream.best = best

    def _projected(self, encoder_out: Tensor, lens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Encoder output as searches take it."""
        return self._model.joiner.project_encoder(encoder_out).cpu().numpy(), lens.cpu().numpy()

    def _show(self, streams: list[Stream]) -> None:
        for stream in streams:
            stream.num_steps += 1
            if self.options.mode != "full":
                stream.num_changed_words += count_changed(stream.shown, stream.best, self.tokenizer)
                stream.shown = stream.best

    def _end_segments(self, streams: list[Stream], rules: list[str]) -> None:
        """The final text of these streams' open segments; the next ones begin."""
        if self._full_pass:
            finals = self._decode_whole(streams)
        else:
            finals = self._search.n_best([stream.row for stream in streams])
        for stream, hypotheses, rule in zip(streams, finals, rules, strict=True):
            stream.num_changed_words += count_changed(stream.shown, hypotheses[0], self.tokenizer)
            if hypotheses[0].tokens:
                stream.segments.append(
                    EndedSegment(stream.first_frame, stream.num_frames, tuple(hypotheses), rule)
                )
            stream.first_frame += stream.num_frames
            stream.num_frames = 0
            stream.causal_out.clear()
            stream.best = stream.shown = NOTHING
            self._step_search.restart(stream.row)
            self._step_search.copy(stream.row, stream.corrected)

    def _decode_whole(self, streams: list[Stream]) -> list[list[Hypothesis]]:
        """The full pass over the open segments: their hypotheses, best first.

        In mode two_pass the next segments' search goes on from it; in mode full the endpoints' search goes its own way.
        """
        if not streams:
            return []
        parts = [torch.cat(stream.causal_out) for stream in streams]
        lens = torch.tensor([part.shape[0] for part in parts], device=self._like.device)
        causal_out = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        out = self._model.encoder.forward_noncausal(causal_out, lens, None, None)
        rows = [self._search.join() for _ in streams]
        self._search.advance(rows, *self._projected(out, lens))
        hypotheses = self._search.n_best(rows)
        for stream, row in zip(streams, rows, strict=True):
            if self._search is self._step_search:
                self._search.copy(row, stream.row)
            self._search.leave(row)
        return hypotheses

    def _close(self, streams: list[Stream]) -> None:
        if self.options.mode == "look_ahead":
            rest = [stream for stream in streams if stream.block]
            self._advance_blocks(rest)
            self._show(rest)
        heard = [stream for stream in streams if stream.num_frames]
        self._end_segments(heard, ["end_of_stream"] * len(heard))
        for stream in streams:
            stream.num_steps += 1
            stream.closed = True
            self.leave(stream)

    def _rows_of(self, streams: list[Stream]) -> list[int]:
        wanted = set(map(id, streams))
        return [row for row, stream in enumerate(self._streams) if id(stream) in wanted]
