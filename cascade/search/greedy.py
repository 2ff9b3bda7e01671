"""Greedy transducer search over a batch of streams, at most one symbol per 40 ms frame.

Of equal symbols the lowest is taken, so blank first, as beam search does. With scorers the transducer alone decides
where a token is said, and the scores which one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade.search.beam_numpy import label_log_sums, log_sum_exp
from cascade.search.rows import Networks, Search
from cascade.search.scorer import Scorer

_FRAMES_AT_ONCE = 4
"""Most frames say nothing: this many are looked at together, and those after the first symbol again."""


class GreedySearch(Search):
    """A search with one hypothesis per stream: the best symbol of every frame.

    Args:
      networks, blank_penalty, unk_id, scorers: see `Search`.
    """

    def __init__(
        self, networks: Networks, blank_penalty: float = 0.0, unk_id: int | None = None, scorers: Sequence[Scorer] = ()
    ) -> None:
        super().__init__(networks, 1, blank_penalty, unk_id, scorers)
        self._silent = [0] if unk_id is None else [0, unk_id]

    def choose(self, logits: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """The symbols (R,) to say: logits (R, V) of frames (R,), which are counted from the segment's start."""
        return logits.argmax(axis=1)

    def _advance(self, rows: np.ndarray, encoder_out: np.ndarray, lens: np.ndarray) -> None:
        place, ahead = np.zeros_like(lens), np.arange(_FRAMES_AT_ONCE)
        while (live := np.flatnonzero(place < lens)).size:
            frames = place[live, None] + ahead  # (N, W)
            inside = frames < lens[live, None]
            streams, frames = np.nonzero(inside)[0], frames[inside]  # (R,) each
            own = rows[live][streams]
            hidden = encoder_out[live[streams], frames]
            hidden += self.slots.out[self.places.slots[own, 0]]
            np.tanh(hidden, out=hidden)
            logits = hidden @ self.weight.T
            logits += self.bias
            symbols = self.choose(logits, self.num_frames[own] + frames)
            says = (symbols != 0) & (symbols != self._silent[-1])
            # What was said so far holds up to the first frame that says more; the frames after it wait for it.
            said = np.zeros_like(inside)
            said[inside] = says
            taken = (said.cumsum(axis=1) - said == 0)[inside]
            place[live] += np.bincount(streams[taken], minlength=len(live))
            self._say(own[taken], frames[taken], logits[taken], symbols[taken], says[taken])

    def _say(
        self, rows: np.ndarray, frames: np.ndarray, logits: np.ndarray, symbols: np.ndarray, says: np.ndarray
    ) -> None:
        """Let the hypotheses of `rows` go on through frames (R,); at most one in each row says a symbol."""
        grown = rows[says]
        if self.scorers:
            states = [states[grown, 0] for states in self.scorer_states]
            scores = sum(scorer.score(state) for scorer, state in zip(self.scorers, states, strict=True))
            ranked = logits[says] + scores
            ranked[:, self._silent] = -np.inf
            symbols[says] = ranked.argmax(axis=1)
        sums = log_sum_exp(logits)
        log_probs = logits[np.arange(len(rows)), symbols] - sums
        added = np.zeros_like(log_probs)
        if self.scorers:
            added = self.blank_weight * log_probs
            added[says] = self.blank_weight * (label_log_sums(logits[says], self._silent) - sums[says])
            added[says] += scores[np.arange(len(grown)), symbols[says]]
        np.add.at(self.places.acoustic[:, 0], rows, log_probs)
        np.add.at(self.places.log_probs[:, 0], rows, log_probs + added)
        if not len(grown):
            return
        labels = symbols[says]
        before = self.places.ends[grown, 0]
        numbers = self.num_frames[grown] + frames[says]
        self.places.ends[grown, 0] = self.entries.add(before, labels, numbers, log_probs[says])
        self.places.num_tokens[grown, 0] += 1
        for states, scorer in zip(self.scorer_states, self.scorers, strict=True):
            states[grown, 0] = scorer.advance(states[grown, 0], np.arange(len(grown)), labels)
        self.slots.reserve(len(grown), self.places.slots)
        self.places.slots[grown, 0] = self.slots.after(self.places.slots[grown, 0], labels)
