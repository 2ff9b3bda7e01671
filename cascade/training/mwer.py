"""Hypotheses of a model's own search for a training batch, with their word errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cascade.config.options import MwerConfig
from cascade.data.batches import Batch
from cascade.measure.wer import align, count_errors
from cascade.models.torch_engine import TorchEngine
from cascade.models.transducer import CascadedTransducer
from cascade.search.beam import ModifiedBeamSearch
from cascade.text.normal import split_words
from cascade.text.tokens import Tokenizer


class ScoredTokens(NamedTuple):
    """A hypothesis."""

    tokens: tuple[int, ...]
    errors: int
    """Word errors against the reference."""


NBest = list[list[ScoredTokens]]
"""The hypotheses of each utterance of a batch, best first: token sequences that differ, at least one."""


@torch.no_grad()
def search_n_best(
    model: CascadedTransducer, tokenizer: Tokenizer, config: MwerConfig, batch: Batch,
    context: tuple[int | None, int | None, int | None], passes: Sequence[str],
) -> dict[str, NBest]:
    """The N-best of each of the passes (causal, noncausal), found as decoding finds them: without dropout.

    Args:
      batch: where the model is. context: C, L, B in 40 ms frames; None = all.
    """
    chunk, left, block = context
    training = model.encoder.training
    model.encoder.eval()
    try:
        out, lens = model.encoder.forward_causal(batch.features, batch.feature_lens, chunk, left)
        outs = {"causal": out}
        if "noncausal" in passes:
            outs["noncausal"] = model.encoder.forward_noncausal(out, lens, block, left)
    finally:
        model.encoder.train(training)
    search = ModifiedBeamSearch(TorchEngine(model), config.beam, unk_id=tokenizer.unk_id)
    n_best = {}
    for name in passes:
        frames = model.joiner.project_encoder(outs[name])
        heard = lens * torch.isfinite(frames).all(dim=2).all(dim=1)  # nothing, where it is not a number
        hypotheses = search.decode(frames.nan_to_num().cpu().numpy(), heard.cpu().numpy())
        n_best[name] = [
            score_tokens([each.tokens for each in beam][: config.nbest] or [()], tokenizer, text)  # or weights are nan
            for beam, text in zip(hypotheses, batch.texts, strict=True)
        ]
    return n_best


def score_tokens(sequences: Sequence[tuple[int, ...]], tokenizer: Tokenizer, text: str) -> list[ScoredTokens]:
    """Each token sequence once, with its word errors against the reference `text`."""
    reference = split_words(text)
    return [
        ScoredTokens(tokens, num_word_errors(reference, split_words(tokenizer.decode(tokens))))
        for tokens in dict.fromkeys(sequences)
    ]


def num_word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Fewest substitutions, deletions and insertions; only what lies between common ends is aligned."""
    begin, same = 0, min(len(reference), len(hypothesis))
    while begin < same and reference[begin] == hypothesis[begin]:
        begin += 1
    end = 0
    while end < same - begin and reference[-1 - end] == hypothesis[-1 - end]:
        end += 1
    rest = (words[begin : len(words) - end] for words in (reference, hypothesis))
    return count_errors(align(*rest)).errors
