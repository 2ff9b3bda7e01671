"""Rules for the options of an experiment, alone (the limits of their fields) and together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from cascade.config.options import Config, DistillationConfig, Limits, MwerConfig

LARGEST_INT = 2**31 - 1


def each_option(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Dotted name, field and value of every option; a section that is None has none."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if not any(dataclasses.is_dataclass(part) for part in (field.type, *get_args(field.type))):
            yield name, field, value
        elif value is not None:
            yield from each_option(value, f"{name}.")


FIELDS = {name: field for name, field, _ in each_option(Config(distillation=DistillationConfig(), mwer=MwerConfig()))}
"""The field of every option by its dotted name."""


def limits_of(field: dataclasses.Field) -> Limits:
    return field.metadata.get("limits", Limits())


def describe_type(of: Any) -> str:
    """The values of a type in words: `one of bpe | char | word`, `a list of whole numbers`."""
    first, *others = (*get_args(of), of)
    if get_origin(of) is Literal:
        return f"one of {' | '.join(get_args(of))}"
    if get_origin(of) is tuple:
        return f"{'a list of' if ... in others else 'two'} {'whole numbers' if first is int else 'numbers'}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[first]


def starts_over(name: str) -> bool:
    """Tell whether another value of this option, "section.key", makes another training."""
    return not limits_of(FIELDS[name]).goes_on


def first_problem(config: Config) -> str | None:
    """One sentence that names an option, its value and what is allowed; None when all is well."""
    for name, field, value in each_option(config):
        problem = None
        if isinstance(value, tuple):
            problem = _list_problem(value, limits_of(field), is_range=... not in get_args(field.type))
        elif isinstance(value, (int, float)):
            problem = _number_problem(value, limits_of(field))
        if problem is not None:
            return f"{name} must {problem}, got {value}"
    return _encoder_problem(config) or _other_problem(config)


def _number_problem(number: float, limits: Limits) -> str | None:
    """The limit that a number breaks."""
    at_most = LARGEST_INT if limits.at_most is None and isinstance(number, int) else limits.at_most
    if limits.at_least is not None and not number >= limits.at_least:
        return f"be at least {limits.at_least}"
    if at_most is not None and not number <= at_most:
        return f"be at most {at_most}"
    if limits.below is not None and not number < limits.below:
        return f"be less than {limits.below}"
    return None if limits.may_be_infinite or math.isfinite(number) else "be a finite number"


def _list_problem(numbers: tuple[float, ...], limits: Limits, is_range: bool) -> str | None:
    """The limits of a list that is empty or has a number beyond them, or of a range that begins with its upper end."""
    inside = all(limits.or_all and number == -1 or _number_problem(number, limits) is None for number in numbers)
    if numbers and inside and not (is_range and sorted(numbers) != list(numbers)):
        return None
    kind = "positive numbers" if limits.at_least == 1 else f"numbers of at least {limits.at_least}"
    if limits.at_most is not None:
        kind = f"numbers from {limits.at_least} to {limits.at_most}"
    return f"be two {kind}, the lower one first" if is_range else f"hold {kind}{' or -1' * limits.or_all}"


def _encoder_problem(config: Config) -> str | None:
    d_model = config.model.d_model
    for name in ("causal", "noncausal"):
        encoder = getattr(config.model, name)
        head_dim, rest = divmod(d_model, encoder.num_heads)
        if rest or head_dim % 2:
            ratio = f"{d_model} / {encoder.num_heads}"
            return f"model.d_model / model.{name}.num_heads must be an even whole number, got {ratio}"
        if encoder.kernel_size % 2 == 0:
            return f"model.{name}.kernel_size must be odd, got {encoder.kernel_size}"
    if config.model.causal.convolution != "left":
        return f"model.causal.convolution must be one of left, got {config.model.causal.convolution!r}"
    return None


def _other_problem(config: Config) -> str | None:
    if -1 not in config.context.block_chunks:
        return "context.block_chunks must include -1 (the whole utterance), the full mode needs it"
    kept, averaged = config.training.keep_epochs, config.training.average_last
    if kept < averaged:
        return f"training.keep_epochs ({kept}) must be at least training.average_last ({averaged})"
    if config.augment.carry_over_share and config.model.predictor.kind == "lstm":
        return "augment.carry_over_share wants a predictor with a context of labels, model.predictor.kind is lstm"
    if config.mwer is not None and config.mwer.nbest > config.mwer.beam:
        return f"mwer.nbest ({config.mwer.nbest}) must be at most mwer.beam ({config.mwer.beam})"
    return None
