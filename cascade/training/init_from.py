"""Fine-tuning: start a training from the weights of a trained model.

Every parameter is taken whose name and shape fit. What has one row per symbol (the matrix E, which is the joiner's
output and a tied predictor's embedding; its bias; another predictor's embedding; the heads of the simple loss and of
CTC) is taken row by row: symbols that both vocabularies have keep their rows, new ones start at random. Encoders must
be alike, because everything else stands on them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.checkpoint import load_file
from cascade.config.load import changed_options, config_from_dict
from cascade.config.options import Config
from cascade.models.transducer import CascadedTransducer
from cascade.text.tokens import BLANK, UNKNOWN, Tokenizer

PARTS = {
    "encoder.feature_": "feature normalisation", "encoder.subsampling.": "front end",
    "encoder.causal.": "causal encoder", "encoder.noncausal.": "non-causal encoder", "predictor.": "predictor",
    "joiner.": "joiner", "heads.": "training heads",
}
SYMBOL_ROWS = ("joiner.output.", "predictor.embedding.", "heads.")
_ENCODERS = ("model.d_model", "model.subsampling_channels", "model.causal.", "model.noncausal.")


class Source(NamedTuple):
    """A trained model to start from."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    weights: dict[str, Tensor]


def checkpoint_file(init_from: Path) -> Path:
    """The file that --init-from means: itself, or a model directory's final model.

    Raises:
      FileNotFoundError: nothing there.
    """
    path = init_from / "averaged.pt" if init_from.is_dir() else init_from
    if not path.is_file():
        hint = "its training has not finished; name an epoch: DIR/epoch-N.pt" if init_from.is_dir() else "no such file"
        raise FileNotFoundError(f"--init-from {init_from}: {path} not found, {hint}")
    return path


def read_source(init_from: Path, config: Config) -> Source:
    """Read the model to start from and check that a model of `config` can stand on it.

    Args:
      init_from: a model directory, or a checkpoint inside one (tokens/ beside it says what its rows mean).
    Raises:
      FileNotFoundError, ValueError: no checkpoint, a damaged one, other features or encoders than the config's.
    """
    path = checkpoint_file(init_from)
    values = load_file(path)
    found = config_from_dict(values["config"])
    if not (path.parent / "tokens").is_dir():
        raise FileNotFoundError(f"--init-from {path}: no tokens/ beside it; name a checkpoint in its model directory")
    tokenizer = Tokenizer.load(path.parent / "tokens")
    if tokenizer.vocab_size != values["vocab_size"]:
        raise ValueError(f"--init-from {path} has {values['vocab_size']} tokens, tokens/ {tokenizer.vocab_size}")
    changed = changed_options(found, config)
    for prefixes, what in ((("features.",), "features"), (_ENCODERS, "encoders")):
        wrong = [
            f"{name}={values[0]}" for name, values in changed.items()
            if name.startswith(prefixes) and not name.endswith((".dropout", ".extractor"))
        ]
        if wrong:
            raise ValueError(f"--init-from {path} was trained with other {what}: set {' '.join(wrong)} as it has them")
    return Source(path, found, tokenizer, values["model"])


def take_feature_stats(model: CascadedTransducer, source: Source) -> None:
    """Normalise features as the source does: its encoder was trained on that, whatever the new data's mean is."""
    for name in ("feature_mean", "feature_scale"):
        getattr(model.encoder, name).copy_(source.weights[f"encoder.{name}"])


def shared_rows(new: Tokenizer, old: Tokenizer) -> dict[int, int]:
    """{id in `new`: id in `old`} of the symbols that both have; of different kinds of tokens only the blank.

    A piece "_A" begins a word, a word "_A" is one: between kinds the same symbol means something else.
    """
    ids = {old.id_to_symbol(index): index for index in range(old.vocab_size)}
    symbols = {index: new.id_to_symbol(index) for index in range(new.vocab_size)}
    return {
        index: ids[symbol] for index, symbol in symbols.items()
        if symbol in ids and (new.kind == old.kind or symbol == BLANK)
    }


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, for the log."""
    return next(part for prefix, part in PARTS.items() if name.startswith(prefix))


@torch.no_grad()
def start_from(model: CascadedTransducer, source: Source, tokenizer: Tokenizer, config: Config) -> list[str]:
    """Copy the source's weights into a fresh model.

    A predictor's other weights work on the symbols' vectors: they are taken when at least half of the new symbols
    have theirs, and the predictor is of the same kind.

    Returns:
      lines for the log: what both vocabularies have, then one line per part: what was taken, what starts at random.
    """
    rows = shared_rows(tokenizer, source.tokenizer)
    special = (BLANK, UNKNOWN)
    num_new = tokenizer.vocab_size - len(special)
    num_known = sum(tokenizer.id_to_symbol(index) not in special for index in rows)
    new_ids, old_ids = torch.tensor(list(rows)), torch.tensor(list(rows.values()))
    kinds = source.config.model.predictor.kind, config.model.predictor.kind
    no_predictor = ""
    if kinds[0] != kinds[1]:
        no_predictor = f"it is {kinds[1]}, the checkpoint's is {kinds[0]}"
    elif 2 * num_known < num_new:
        no_predictor = f"it works on the symbols' vectors, and only {num_known} of {num_new} symbols are known"
    taken, total, fresh = defaultdict(int), defaultdict(int), defaultdict(list)
    for name, target in model.state_dict().items():
        part, value = part_of(name), source.weights.get(name)
        total[part] += target.numel()
        short = name.split(".", 1)[1]
        if part == "predictor" and no_predictor:
            continue
        if value is not None and name.startswith(SYMBOL_ROWS) and value.shape[1:] == target.shape[1:]:
            target[new_ids.to(target.device)] = value[old_ids].to(target.device)
            taken[part] += len(rows) * target[0].numel()
            if len(rows) < len(target):
                fresh[part].append(f"{short} ({len(target) - len(rows)} of {len(target)} rows)")
        elif value is not None and value.shape == target.shape:
            target.copy_(value)
            taken[part] += target.numel()
        else:
            fresh[part].append(f"{short} (another shape)")
    if no_predictor:
        fresh["predictor"] = [f"all of it ({no_predictor})"]
    same = len(rows) == tokenizer.vocab_size == source.tokenizer.vocab_size
    lines = [f"weights of {source.path}"]
    lines.append("vocabulary: the same" if same and all(new == old for new, old in rows.items()) else (
        f"vocabulary: {num_known} of {num_new} symbols were known and keep their rows, {num_new - num_known} are new; "
        f"{source.tokenizer.vocab_size - len(special) - num_known} of the checkpoint's are gone"
    ))
    for part in PARTS.values():
        if part == "feature normalisation":
            lines.append(f"{part}: the checkpoint's, not that of the new data")
        else:
            rest = f"; random start: {', '.join(fresh[part])}" if fresh[part] else ""
            lines.append(f"{part}: {taken[part]:,} of {total[part]:,} parameters taken{rest}")
    return lines
