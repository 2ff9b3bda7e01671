"""Modified beam search: at most one symbol per frame, equal token sequences merged; utterances and hypotheses batched.

At every frame the search takes the best B of the B * V continuations of each stream, then adds up (log-add) the
probabilities of those that are the same token sequence, reached by saying the last token earlier or later: the order of
sherpa-onnx and icefall. Of equal scores, the continuation of the hypothesis in the better place wins, then the lower
symbol, so blank first; of equal sequences and of equal final scores, the one in the better place. (What is equal in
exact arithmetic may differ by rounding.) What a frame does beside the matrix product stands in `beam_numpy`, to be
read, and in `beam_numba`, compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade.search.rows import Networks, Search
from cascade.search.scorer import Scorer


class ModifiedBeamSearch(Search):
    """Keep the best `beam` token sequences of every stream.

    Args:
      networks, blank_penalty, unk_id, scorers: see `Search`.
      beam: hypotheses B per stream.
      backend: see `search_kernels`.
    Raises:
      ValueError: beam below 1, or as `search_kernels`.
    """

    hash_multiplier = 6364136223846793005

    def __init__(
        self, networks: Networks, beam: int = 4, blank_penalty: float = 0.0, unk_id: int | None = None,
        scorers: Sequence[Scorer] = (), backend: str = "auto",
    ) -> None:  # fmt: skip
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        super().__init__(networks, beam, blank_penalty, unk_id, scorers, backend)

    def _advance(self, rows: np.ndarray, encoder_out: np.ndarray, lens: np.ndarray) -> None:
        order = np.argsort(-lens, kind="stable")  # the streams that still have frames are always the first
        rows, lens = rows[order], lens[order]
        frames = np.ascontiguousarray(encoder_out[order].swapaxes(0, 1))  # (T, N, D)
        work = _Work(len(rows), self)
        for frame in range(lens[0]):
            live = int(np.searchsorted(-lens, -frame))
            self._advance_frame(rows[:live], frames[frame, :live], self.num_frames[rows[:live]] + frame, work)

    def _advance_frame(self, rows: np.ndarray, frame: np.ndarray, numbers: np.ndarray, work: _Work) -> None:
        """One frame (N, D), number (N,) of each stream."""
        num_streams, silent = len(rows), -1 if self.unk_id is None else self.unk_id
        self.slots.reserve(num_streams * self.beam, self.places.slots)
        joined = work.joined[:num_streams]
        count = self._kernels.join_rows(frame, self.slots.out, rows, self.places, joined, work.hidden)
        logits, sums, label_sums = work.logits[:count], work.sums[:count], work.label_sums[:count]
        self.output_layer(work.hidden[:count], logits)
        self._kernels.log_sums(logits, silent, sums, label_sums)
        values = (logits, sums, joined)
        if self.scorers:
            values = self._with_scores(rows, *values, label_sums, silent, work)
        parents, symbols, grows = (array[:num_streams] for array in (work.parents, work.symbols, work.grows))
        self.entries.count = self._kernels.choose(
            *values, logits, sums, joined, rows, self.places, self.entries.chains, self.entries.count, numbers, silent,
            self.hash_multiplier, parents, symbols, grows,
        )  # fmt: skip
        if self.scorers:
            parents = (parents + self.beam * np.arange(num_streams)[:, None]).ravel()
        for states, scorer in zip(self.scorer_states, self.scorers, strict=True):
            before = states[rows]
            after = scorer.advance(before.reshape(-1, *before.shape[2:]), parents, symbols.ravel())
            states[rows] = after.reshape(before.shape)
        streams, places = np.nonzero(grows)
        if len(streams):
            grown = (rows[streams], places)
            self.places.slots[grown] = self.slots.after(self.places.slots[grown], symbols[streams, places])

    def _with_scores(
        self, rows: np.ndarray, logits: np.ndarray, sums: np.ndarray, joined: np.ndarray, label_sums: np.ndarray,
        silent: int, work: _Work,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """What `choose` ranks by: a row for each hypothesis, with the scorers' part."""
        live = self.places.log_probs[rows] > -np.inf
        scores = self._scores([states[rows][live] for states in self.scorer_states])
        values, value_rows = work.values[: len(scores)], work.value_rows[: len(rows)]
        scores = np.ascontiguousarray(scores, logits.dtype)
        self._kernels.weigh(
            scores, self.blank_weight, logits, sums, label_sums, joined, live, silent, values, value_rows
        )  # fmt: skip
        return values, work.zeros[: len(scores)], value_rows


class _Work:
    """Arrays that a chunk of `num_streams` streams works in."""

    def __init__(self, num_streams: int, search: Search) -> None:
        size = num_streams * search.beam
        self.hidden = np.empty((size, search.dim), search.dtype)
        self.logits, self.values = np.empty((2, size, search.vocab_size), search.dtype)
        self.sums, self.label_sums, self.zeros = np.empty(size), np.empty(size), np.zeros(size)
        self.joined, self.value_rows, self.parents, self.symbols = np.zeros((4, num_streams, search.beam), np.int64)
        self.grows = np.zeros((num_streams, search.beam), bool)
