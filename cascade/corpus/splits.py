"""Divide a corpus that has no splits into train, dev and test, so that nothing of one group is in two of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence

SPLITS = ("train", "dev", "test")
_SHARE = 0.1
_MOST = 2000
"""Utterances that a dev or test split needs at most: some hours, after which error rates hardly get surer."""


def split_by(keys: Sequence[Hashable], splits: Sequence[str] = SPLITS, seed: int = 42) -> list[str]:
    """The split of each utterance, by the group it belongs to: a speaker, or a recording.

    Every split but train gets about a tenth of the utterances, 2000 at most, and at least one group. The groups' order
    is a hash of the seed and their names: a corpus that grows keeps most of its split.

    Args:
      keys: the group of each utterance; there must be as many different ones as splits.
      splits: train first.
    Raises:
      ValueError: fewer groups than splits.
    """
    sizes = Counter(keys)
    if len(sizes) < len(splits):
        raise ValueError(f"{len(sizes)} groups are too few for the splits {', '.join(splits)}")
    target = min(max(1, round(_SHARE * len(keys))), _MOST)
    order = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).hexdigest())
    chosen: dict[Hashable, str] = {}
    for place, split in enumerate(splits[1:], 1):
        free = [key for key in order if key not in chosen]
        spare = len(free) - (len(splits) - place)  # one group stays for each split that follows, and for train
        taken = 0
        for key in free:
            if taken < target and spare > 0 and taken + sizes[key] <= 1.5 * target:
                chosen[key], taken, spare = split, taken + sizes[key], spare - 1
        if not taken:
            chosen[min(free, key=lambda key: (sizes[key], order.index(key)))] = split
    return [chosen.get(key, splits[0]) for key in keys]
