"""Greedy transducer search over a batch of streams, at most one symbol per 40 ms frame.

Of equal symbols the lowest is taken, so blank first, as beam search does. With scorers the transducer alone decides
where a token is said, and the scores which one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade.search.beam_numpy import log_sum_exp
from cascade.search.rows import Networks, Search
from cascade.search.scorer import Scorer

_FRAMES_AT_ONCE = 4
"""Most frames say nothing: this many are looked at together, and those after the first symbol again."""


class GreedySearch(Search):
    """A search with one hypothesis per stream: the best symbol of every frame.

    Args:
      networks, blank_penalty, unk_id, scorers: see `Search`.
      backend: see `search_kernels`; a search that begins without scorers takes numpy, and waits for no compiler.
    """

    def __init__(
        self, networks: Networks, blank_penalty: float = 0.0, unk_id: int | None = None,
        scorers: Sequence[Scorer] = (), backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(networks, 1, blank_penalty, unk_id, scorers, backend if scorers else "numpy")
        self._silent = 0 if unk_id is None else unk_id

    def logits_of(self, hidden: np.ndarray) -> np.ndarray:
        """Logits (R, V) of the sums (R, D) of projected encoder and predictor output, which are overwritten."""
        return self.output_layer(np.tanh(hidden, out=hidden))

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
            logits = self.logits_of(hidden)
            symbols = self.choose(logits, self.num_frames[own] + frames)
            says = (symbols != 0) & (symbols != self._silent)
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
        said = says.nonzero()[0]
        grown, sums = rows[said], log_sum_exp(logits)
        if self.scorers:
            log_probs, totals = np.empty_like(sums), np.empty_like(sums)
            states, parents = [states[grown, 0] for states in self.scorer_states], np.arange(len(grown))
            scores = np.ascontiguousarray(self._scores(states), logits.dtype)
            self._kernels.say(
                scores, self.blank_weight, logits, sums, said, self._silent, symbols, log_probs, totals
            )  # fmt: skip
        else:
            log_probs = totals = logits[np.arange(len(rows)), symbols] - sums
        np.add.at(self.places.acoustic[:, 0], rows, log_probs)
        np.add.at(self.places.log_probs[:, 0], rows, totals)
        if not len(grown):
            return
        labels = symbols[said]
        before = self.places.ends[grown, 0]
        numbers = self.num_frames[grown] + frames[said]
        self.places.ends[grown, 0] = self.entries.add(before, labels, numbers, log_probs[said])
        self.places.num_tokens[grown, 0] += 1
        for place, scorer in enumerate(self.scorers):
            self.scorer_states[place][grown, 0] = scorer.advance(states[place], parents, labels)
        self.slots.reserve(len(grown), self.places.slots)
        self.places.slots[grown, 0] = self.slots.after(self.places.slots[grown, 0], labels)
