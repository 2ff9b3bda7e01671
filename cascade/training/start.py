"""The weights that a training begins with, in one place: random ones, a teacher's layers, or those of a checkpoint.

From a checkpoint (fine-tuning, --init-from) every parameter is taken whose name and shape fit. What has one row per
symbol (the matrix E, which is the joiner's output and a tied predictor's embedding; its bias; another predictor's
embedding; the heads of the simple loss and of CTC) is taken row by row: symbols that both vocabularies have keep their
rows, new ones start at random. Encoders must be alike, because everything else stands on them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cascade.checkpoint import load_file
from cascade.config.load import changed_options, config_from_dict
from cascade.config.options import Config
from cascade.models.build import build_model
from cascade.models.encoder import Encoder
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


def start_model(
    config: Config, tokenizer: Tokenizer, stats: dict[str, Tensor], teacher: CascadedTransducer | None = None,
    source: Source | None = None,
) -> tuple[CascadedTransducer, list[str]]:
    """The model of a run before its first step: random weights from the config's seed, over them those of the source,
    or of the teacher where `distillation.init_from_teacher` says so. Features are normalised as they will be to the
    end: as the source does, whose encoder was trained on that, or by the new data's stats.

    Returns:
      the model, and lines for the log: what was taken from where, what starts at random.
    """
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer.vocab_size)
    expect_blank(model)
    if source is not None:
        return model, from_checkpoint(model, source, tokenizer, config)
    model.encoder.set_feature_stats(stats["mean"], stats["std"])
    if teacher is not None and config.distillation.init_from_teacher:
        return model, from_teacher(model, teacher)
    return model, []


def expect_blank(model: CascadedTransducer, probability: float = 0.9) -> None:
    """Set the output biases so that every head begins with this probability of blank, about what speech has.

    Else the first gradients all ask for blank, whatever is heard: the encoder learns to put out a constant, and takes
    hundreds of steps to come back (CTC on single words: 6.0 nats after 450 steps, what chance has).
    """
    bias = math.log(probability / (1 - probability) * (model.vocab_size - 1))
    heads = model.heads
    with torch.no_grad():
        for head in (model.joiner.output, heads.simple_am, *heads.ctc.values()):
            head.bias[0] = bias  # blank


def evenly_chosen(num_teacher: int, num_student: int) -> list[int]:
    """Indices of `num_student` of `num_teacher` layers, evenly spaced, first and last included."""
    if num_student > num_teacher:
        raise ValueError(f"the student has {num_student} layers, its teacher only {num_teacher}")
    if num_student == 1:
        return [num_teacher - 1]
    return [round(index * (num_teacher - 1) / (num_student - 1)) for index in range(num_student)]


def from_teacher(student: CascadedTransducer, teacher: CascadedTransducer) -> list[str]:
    """Start the student from evenly chosen teacher layers and every part of equal kind and shape.

    Returns:
      one line per part, for the log: what was copied from where, what keeps its random start.
    """
    report = []

    def copy(name: str, target: nn.Module, source: nn.Module, note: str = "") -> None:
        shapes = [{key: tensor.shape for key, tensor in part.state_dict().items()} for part in (target, source)]
        if type(target) is not type(source):
            report.append(f"{name}: random start (another kind than the teacher's)")
        elif shapes[0] != shapes[1]:
            report.append(f"{name}: random start (its shape differs from the teacher's)")
        else:
            target.load_state_dict(source.state_dict())
            report.append(f"{name}: copied from the teacher{note}")

    def copy_encoder(name: str, target: Encoder, source: Encoder) -> None:
        if type(target) is not type(source):
            return copy(name, target, source)
        chosen = evenly_chosen(len(source.layers), len(target.layers))
        picked = nn.ModuleList(source.layers[index] for index in chosen)
        copy(name, target.layers, picked, f", layers {' '.join(str(index) for index in chosen)}")
        for part, module in target.named_children():
            if module is not target.layers:
                copy(f"{name}'s {part}", module, source.get_submodule(part))

    copy("front end", student.encoder.subsampling, teacher.encoder.subsampling)
    copy_encoder("causal encoder", student.encoder.causal, teacher.encoder.causal)
    copy_encoder("non-causal encoder", student.encoder.noncausal, teacher.encoder.noncausal)
    copy("joiner", student.joiner, teacher.joiner)
    copy("training heads", student.heads, teacher.heads)
    copy("predictor", student.predictor, teacher.predictor)
    return report


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
    source_config = config_from_dict(values["config"])
    if not (path.parent / "tokens").is_dir():
        raise FileNotFoundError(f"--init-from {path}: no tokens/ beside it; name a checkpoint in its model directory")
    tokenizer = Tokenizer.load(path.parent / "tokens")
    if tokenizer.vocab_size != values["vocab_size"]:
        raise ValueError(f"--init-from {path} has {values['vocab_size']} tokens, tokens/ {tokenizer.vocab_size}")
    changed = changed_options(source_config, config)
    for prefixes, what in ((("features.",), "features"), (_ENCODERS, "encoders")):
        wrong = [
            f"{name}={values[0]}" for name, values in changed.items()
            if name.startswith(prefixes) and not name.endswith((".dropout", ".extractor"))
        ]
        if wrong:
            raise ValueError(f"--init-from {path} was trained with other {what}: set {' '.join(wrong)} as it has them")
    return Source(path, source_config, tokenizer, values["model"])


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
def from_checkpoint(model: CascadedTransducer, source: Source, tokenizer: Tokenizer, config: Config) -> list[str]:
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
