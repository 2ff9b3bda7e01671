"""The memory of every search: streams in rows of a store, tokens in chains of entries, predictor outputs in slots.

Streams join, wait and leave by their row's number. Hypotheses that go on from the same tokens share the entries of
these tokens, so that keeping a history copies nothing, however long it is. What the predictor says is kept by what it
depends on, and looked up before the predictor runs.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cascade.product import Product
from cascade.search.compiled import search_kernels
from cascade.search.hypothesis import Hypothesis
from cascade.search.scorer import Rescoring, Scorer

State = tuple[np.ndarray, ...]
Starts = Mapping[Scorer, np.ndarray | int]
"""The state in which a scorer begins a stream's segments, where it is another than its initial one."""
_MAX_SLOTS = 4096
"""Slots kept besides those in use: 8 MB at D = 512. When they are full, those not in use are forgotten."""


class Predictor(Protocol):
    """A prediction network. A state is a tuple of arrays with the rows on axis 0.

    The state of a predictor that sees the last labels only is these labels, ((rows, K) int64, oldest first,).
    """

    context_size: int
    """Labels it sees; 1 for a recurrent predictor, which has no fixed number."""

    def initial(self, n: int) -> tuple[np.ndarray, State]:
        """(n, D) outputs and states where nothing was said."""

    def step(self, labels: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """(rows,) labels -> (rows, D) outputs and the states after them."""

    def with_product(self, product: type[Product]) -> Predictor:
        """The same, where it multiplies with matrices by such products; a predictor that cannot gives itself."""


class Networks(Protocol):
    """What a search runs: logits = weight tanh(encoder + predictor) + bias, float32 or float64."""

    predictor: Predictor
    weight: np.ndarray
    """(V, D)"""
    bias: np.ndarray
    """(V,)"""


class Places(NamedTuple):
    """The hypotheses: arrays of (S, B), S rows of B places."""

    log_probs: np.ndarray
    """float64, what scorers added included; -inf: no hypothesis in this place."""
    acoustic: np.ndarray
    """float64, the transducer's log-probability alone."""
    hashes: np.ndarray
    """int64, of the token sequence; equal ones are only candidates, tokens are compared too."""
    num_tokens: np.ndarray
    ends: np.ndarray
    """The entry of the last token, -1: nothing said."""
    slots: np.ndarray


class Chains(NamedTuple):
    """Tokens that were said, a forest: entries (E,), several of which may go on from one."""

    before: np.ndarray
    """The entry of the token before, -1: none; always a lower number."""
    token: np.ndarray
    frame: np.ndarray
    log_prob: np.ndarray


class Entries:
    """Chains with room for more."""

    def __init__(self) -> None:
        self.chains = Chains(*(np.empty(0, np.int64) for _ in range(3)), np.empty(0))
        self.count = 0

    def reserve(self, number: int, ends: np.ndarray) -> None:
        """Make room for `number` entries more; those that no end leads to are dropped, and `ends` renumbered."""
        if self.count + number <= len(self.chains.before):
            return
        kept = np.zeros(self.count, bool)
        layer = np.unique(ends[ends >= 0])
        while layer.size:
            kept[layer] = True
            layer = np.unique(self.chains.before[layer])
            layer = layer[(layer >= 0) & ~kept[layer]]
        old, new_numbers = np.flatnonzero(kept), np.append(np.cumsum(kept) - 1, -1)  # index -1 stays -1
        size = max(len(self.chains.before), 2 * (len(old) + number))
        grown = Chains(*(np.empty(size, array.dtype) for array in self.chains))
        for new, array in zip(grown, self.chains, strict=True):
            new[: len(old)] = array[old]
        grown.before[: len(old)] = new_numbers[grown.before[: len(old)]]
        ends[...] = new_numbers[ends]
        self.chains, self.count = grown, len(old)

    def add(self, *fields: np.ndarray) -> np.ndarray:
        """Append (rows,) arrays of before, token, frame and log_prob; returns the entries' numbers."""
        numbers = np.arange(self.count, self.count + len(fields[0]))
        for array, values in zip(self.chains, fields, strict=True):
            array[numbers] = values
        self.count += len(numbers)
        return numbers

    def chain(self, end: int) -> list[int]:
        """The entries that lead to this one, oldest first."""
        entries, before = [], self.chains.before
        while end >= 0:
            entries.append(end)
            end = before.item(end)
        return entries[::-1]


class Slots:
    """What the predictor said, and its states, by its last labels; of a recurrent one by (slot before, label).

    Slot 0 holds what it says where nothing was said.
    """

    def __init__(self, predictor: Predictor, vocab_size: int) -> None:
        self._predictor, self._vocab_size = predictor, vocab_size
        self.out, self.states = predictor.initial(1)
        self.count, self._index = 1, {}
        # Labels as digits of one number, where they fit into 63 bits.
        size = vocab_size ** self.states[0].shape[1] if self.states[0].dtype == np.int64 else 2**63
        self._older = size // vocab_size if size < 2**63 else None
        self._keys = np.zeros(1, np.int64)
        if self._older is not None:
            self._index[0] = 0

    def reserve(self, number: int, used: np.ndarray) -> None:
        """Make room for `number` slots more; if need be all but the `used` ones are forgotten, which are renumbered."""
        if self.count + number <= len(self.out):
            return
        kept, renumbered = np.unique(np.append(0, used), return_inverse=True)
        used[...] = renumbered[1:].reshape(used.shape)
        size, arrays = _MAX_SLOTS + len(kept) + number, (self.out, self._keys, *self.states)
        grown = [np.empty((size, *array.shape[1:]), array.dtype) for array in arrays]
        for new, array in zip(grown, arrays, strict=True):
            new[: len(kept)] = array[kept]
        self.out, self._keys, self.states, self.count = grown[0], grown[1], tuple(grown[2:]), len(kept)
        if self._older is None:
            self._keys[...], self._index = np.arange(size), {}
        else:
            self._index = {key: slot for slot, key in enumerate(self._keys[: len(kept)].tolist())}

    def after(self, slots: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The slots (rows,) of these labels after those slots; the predictor runs for those that are new."""
        keys = self._keys[slots]
        keys = (keys if self._older is None else keys % self._older) * self._vocab_size + labels
        index, start, following, new = self._index, self.count, [], []
        for row, key in enumerate(keys.tolist()):
            slot = index.setdefault(key, self.count)
            if slot == self.count:
                new.append(row)
                self.count += 1
            following.append(slot)
        if new:
            parents = slots[new]
            out, states = self._predictor.step(labels[new], tuple([state[parents] for state in self.states]))
            self.out[start : self.count] = out
            for array, values in zip(self.states, states, strict=True):
                array[start : self.count] = values
            if self._older is not None:
                self._keys[start : self.count] = keys[new]
        return np.array(following, np.int64)


class Search(ABC):
    """The store of a search: rows of B hypotheses, one row a stream.

    Args:
      networks: the predictor and the joiner's weights.
      beam: hypotheses B per stream.
      blank_penalty: subtracted from the blank's logit; positive values give fewer deletions.
      unk_id: this token is treated as a blank (sherpa-onnx's rule for `<unk>`); None: no such token.
      scorers: scores from outside; those that are Rescoring are added where a segment ends.
      backend: see `search_kernels`.
    """

    def __init__(
        self, networks: Networks, beam: int, blank_penalty: float = 0.0, unk_id: int | None = None,
        scorers: Sequence[Scorer | Rescoring] = (), backend: str = "auto",
    ) -> None:  # fmt: skip
        self.beam, self.unk_id = beam, unk_id
        self.context_size, self.dtype = networks.predictor.context_size, networks.weight.dtype
        self.vocab_size, self.dim = networks.weight.shape
        bias = networks.bias.copy()
        bias[0] -= blank_penalty
        self._kernels = search_kernels(backend, self.dtype)
        self.output_layer = self._kernels.Product(networks.weight, bias)
        self.slots = Slots(networks.predictor.with_product(self._kernels.Product), self.vocab_size)
        self.entries = Entries()
        self.num_frames = np.zeros(0, np.int64)  # (S,) encoder frames searched
        floats, whole = np.zeros((0, beam)), np.zeros((0, beam), np.int64)
        self.places = Places(floats, floats, whole, whole, whole, whole)
        self._free: list[int] = []
        self.scorers: list[Scorer] = []
        self._rescoring: list[Rescoring] = []
        self.scorer_states: list[np.ndarray] = []  # (S, B, ...) each
        self._starts: list[np.ndarray] = []  # (S, ...) each: the states in which a row's segments begin
        self.blank_weight = 0.0
        for scorer in scorers:
            self.add(scorer)

    def add(self, scorer: Scorer | Rescoring) -> None:
        """Let another scorer have a say from now on."""
        if isinstance(scorer, Rescoring):
            self._rescoring.append(scorer)
            return
        self.scorers.append(scorer)
        self.blank_weight += scorer.blank_weight
        starts = scorer.initial(len(self.num_frames))
        self._starts.append(starts)
        self.scorer_states.append(np.repeat(starts[:, None], self.beam, axis=1))

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return (self.num_frames, *self.places, *self.scorer_states, *self._starts)

    def join(self, starts: Starts | None = None) -> int:
        """A row for a stream that has heard nothing."""
        if not self._free:
            size, fields, scorers = len(self.num_frames), 1 + len(Places._fields), len(self.scorers)
            arrays = [np.zeros((max(1, 2 * size), *array.shape[1:]), array.dtype) for array in self._arrays()]
            for new, array in zip(arrays, self._arrays(), strict=True):
                new[:size] = array
            self.num_frames, self.places = arrays[0], Places(*arrays[1:fields])
            self.scorer_states, self._starts = arrays[fields : fields + scorers], arrays[fields + scorers :]
            self._free = list(range(len(self.num_frames) - 1, size - 1, -1))
            for row in self._free:
                self._clear(row)
        row = self._free.pop()
        for array, scorer in zip(self._starts, self.scorers, strict=True):
            array[row] = (starts or {}).get(scorer, scorer.initial(1)[0])
        self._clear(row)
        return row

    def begin_with(self, row: int, starts: Starts) -> None:
        """Let scorers begin a row's segments in other states; they score the tokens of the open one anew."""
        places = np.flatnonzero(self.places.log_probs[row] > -np.inf)
        chains = [self.entries.chains.token[self.entries.chain(self.places.ends.item(row, place))] for place in places]
        for states, array, scorer in zip(self.scorer_states, self._starts, self.scorers, strict=True):
            old, new = array[row].copy(), starts.get(scorer, scorer.initial(1)[0])
            if np.array_equal(old, new):
                continue
            array[row] = states[row] = new
            for place, tokens in zip(places, chains, strict=True):
                before, _ = _score_tokens(scorer, old, tokens)
                after, states[row, place] = _score_tokens(scorer, new, tokens)
                self.places.log_probs[row, place] += after - before

    def leave(self, row: int) -> None:
        """Forget a stream; its row is given to another."""
        self._clear(row)
        self._free.append(row)

    def copy(self, source: int, target: int) -> None:
        """Let one row remember what another does."""
        for array in self._arrays():
            array[target] = array[source]

    def restart(self, row: int, keep_context: bool = True, over_silence: bool = False) -> None:
        """Begin a stream's next segment: nothing heard and nothing said.

        With keep_context the predictor remembers the last labels of the best hypothesis, as in sherpa-onnx's greedy
        search. A segment that said nothing leaves nothing to remember, but with over_silence, as in sherpa-onnx, what
        the segment before it left.
        """
        slot = 0
        if keep_context:
            best = int(self._external_and_score(np.array([row]), True)[1][0].argmax())
            if over_silence or self.places.num_tokens[row, best]:
                slot = self.places.slots[row, best]
        self._clear(row)
        self.places.slots[row] = slot

    def _clear(self, row: int) -> None:
        for array, nothing in zip(self.places, (-np.inf, -np.inf, 0, 0, -1, 0), strict=True):
            array[row] = nothing
        self.places.log_probs[row, 0] = self.places.acoustic[row, 0] = 0.0
        self.num_frames[row] = 0
        for states, starts in zip(self.scorer_states, self._starts, strict=True):
            states[row] = starts[row]

    def advance(self, rows: Sequence[int], encoder_out: np.ndarray, encoder_out_lens: np.ndarray) -> None:
        """Search on through a chunk.

        Args:
          rows: the N streams that hear it.
          encoder_out: (N, T, D) frames projected to the joiner; what lies after a length is ignored.
          encoder_out_lens: (N,) frames of each stream in this chunk, 0 to T.
        """
        rows, lens = np.asarray(rows, np.int64), np.asarray(encoder_out_lens, np.int64)
        assert encoder_out.ndim == 3, encoder_out.shape
        assert len(set(rows.tolist())) == len(rows) == len(encoder_out), (rows, encoder_out.shape)
        assert lens.shape == rows.shape and (lens <= encoder_out.shape[1]).all(), (lens, encoder_out.shape)
        if lens.any():
            self.entries.reserve(int(lens.sum()) * self.beam, self.places.ends)
            self._advance(rows, encoder_out.astype(self.dtype, copy=False), lens)
            self.num_frames[rows] += lens

    @abstractmethod
    def _advance(self, rows: np.ndarray, encoder_out: np.ndarray, lens: np.ndarray) -> None:
        """`advance` where some stream has frames."""

    def _scores(self, states: Sequence[np.ndarray]) -> np.ndarray:
        """(rows, V) of all scorers in these states (rows, ...)."""
        scores = self.scorers[0].score(states[0])
        for scorer, own in zip(self.scorers[1:], states[1:], strict=True):
            scores = scores + scorer.score(own)
        return scores

    def decode(self, encoder_out: np.ndarray, encoder_out_lens: np.ndarray) -> list[list[Hypothesis]]:
        """Whole utterances, (N, T, D) projected frames and their (N,) lengths: what `n_best` gives."""
        rows = [self.join() for _ in encoder_out]
        try:
            self.advance(rows, encoder_out, encoder_out_lens)
            return self.n_best(rows)
        finally:
            for row in rows:
                self.leave(row)

    def results(self, rows: Sequence[int], final: bool = True) -> list[Hypothesis]:
        """The best hypothesis of each row; `final`: its segment ends here, and scorers say what that means."""
        return [hypotheses[0] for hypotheses in self.n_best(rows, final, 1)]

    def n_best(self, rows: Sequence[int], final: bool = True, most: int | None = None) -> list[list[Hypothesis]]:
        """All hypotheses of each row, or as many as `most`, best `Hypothesis.score` first."""
        rows = np.asarray(rows, np.int64)
        external, scores = self._external_and_score(rows, final)
        order, counts = np.argsort(-scores, axis=1, kind="stable"), (scores > -np.inf).sum(axis=1)
        return [
            [self._hypothesis(row, place, added[place]) for place in places[:count][:most]]
            for row, places, count, added in zip(rows, order.tolist(), counts, external.tolist(), strict=True)
        ]

    def stable_tokens(self, row: int) -> tuple[int, ...]:
        """The first tokens of a row, which all its hypotheses share."""
        live = np.flatnonzero(self.places.log_probs[row] > -np.inf)
        chains = [self.entries.chain(end) for end in self.places.ends[row, live].tolist()]
        tokens = self.entries.chains.token
        return tuple(os.path.commonprefix([tokens[chain].tolist() for chain in chains]))

    def _external_and_score(self, rows: np.ndarray, final: bool) -> tuple[np.ndarray, np.ndarray]:
        """(N, B) what scorers have added, and `Hypothesis.score`; -inf: no hypothesis in this place."""
        log_probs = self.places.log_probs[rows]
        live = log_probs > -np.inf
        for states, scorer in zip(self.scorer_states, self.scorers, strict=True):
            if final:
                log_probs[live] += scorer.final(states[rows][live])
        if final and self._rescoring:
            chains = [self.entries.chain(end) for end in self.places.ends[rows][live].tolist()]
            sequences = [self.entries.chains.token[chain] for chain in chains]
            log_probs[live] += sum(scorer(sequences) for scorer in self._rescoring)
        external = np.subtract(log_probs, self.places.acoustic[rows], where=live, out=np.zeros_like(log_probs))
        return external, log_probs / (self.places.num_tokens[rows] + self.context_size)

    def _hypothesis(self, row: int, place: int, external: float) -> Hypothesis:
        chain, entries = self.entries.chain(self.places.ends.item(row, place)), self.entries.chains
        return Hypothesis(
            tuple(entries.token[chain].tolist()), tuple(entries.frame[chain].tolist()),
            tuple(entries.log_prob[chain].tolist()), self.places.acoustic.item(row, place), self.context_size, external,
        )  # fmt: skip


def _score_tokens(scorer: Scorer, start: np.ndarray, tokens: np.ndarray) -> tuple[float, np.ndarray]:
    """What a scorer adds for these tokens, and the state after them."""
    state, total = np.asarray(start)[None], 0.0
    for token in tokens:
        total += float(scorer.score(state)[0, token])
        state = scorer.advance(state, np.zeros(1, np.int64), token[None])
    return total, state[0]
