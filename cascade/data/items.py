"""Utterances to train on: what is kept in memory of a cut, and which of them can be used with a tokenizer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cascade.config.options import SUBSAMPLING, Config
from cascade.corpus.cuts import read_cuts
from cascade.corpus.quarantine import token_problem
from cascade.data.storage import Stored, stored
from cascade.text.tokens import Tokenizer

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """What is kept of a cut: 281 k utterances in three speeds fit in memory."""

    id: str
    text: str
    tokens: tuple[int, ...]
    num_frames: int
    features: Stored
    utterance: str
    """The id without the speed."""
    voice: str
    """The speaker and the speed of the copy; utterances without a speaker count as one speaker's."""


def read_items(cuts_path: str | Path, tokenizer: Tokenizer, config: Config) -> Iterator[tuple[Item, int]]:
    """Yield (item, samples at speed 1) of each cut."""
    for cut in read_cuts(cuts_path):
        if cut.features is None:
            raise ValueError(f"{cuts_path}: {cut.id} has no stored features; run stage 1 (compute_features)")
        if cut.features.num_features != config.features.num_mel_bins:
            raise ValueError(
                f"{cuts_path}: {cut.features.num_features} mel bins, but features.num_mel_bins="
                f"{config.features.num_mel_bins}: run stage 1 again"
            )
        text = tokenizer.normalize(" ".join(supervision.text or "" for supervision in cut.supervisions))
        tokens = tuple(tokenizer.encode(text))
        custom = cut.custom or {}
        speed = custom.get("speed", 1.0)
        speaker = next((supervision.speaker for supervision in cut.supervisions), None)
        voice = sys.intern(f"{speaker} {speed}")
        utterance = custom.get("utterance", cut.id)
        item = Item(cut.id, text, tokens, cut.features.num_frames, stored(cut.features), utterance, voice)
        yield item, round(cut.num_samples * speed)


def usable(
    items: Iterator[tuple[Item, int]], tokenizer: Tokenizer, config: Config
) -> tuple[list[Item], dict[str, str]]:
    """What can be trained on, and {utterance id: reason} of what cannot, which goes with all its speed copies."""
    kept: list[Item] = []
    bad: dict[str, str] = {}
    for item, num_samples in items:
        kept.append(item)
        rate, speeds = config.features.sampling_rate, config.data.speed_factors
        problem = token_problem(item.text, num_samples, rate, speeds, tokenizer)
        if problem is not None:
            bad[item.utterance] = problem
    if bad:
        log.warning("%d training utterances do not fit the tokenizer and are left out, as stage 2 has listed", len(bad))
    fitting = [item for item in kept if item.utterance not in bad]
    usable = [item for item in fitting if len(item.tokens) <= item.num_frames // SUBSAMPLING]
    if len(usable) < len(fitting):
        log.info("%d fast copies have fewer frames than tokens and are left out", len(fitting) - len(usable))
    return usable, bad
