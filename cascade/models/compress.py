"""The size of a smaller model.

The rule is the paper's (2312.09842): the non-causal encoder is shallow already and stays; the causal encoder and the
predictor are cut in proportion to the target. The layer counts themselves are not published.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from cascade.config.options import Config, ConfigError
from cascade.models.build import build_model, params_by_part


def config_params(config: Config, vocab_size: int) -> dict[str, int]:
    """`params_by_part` of the model a config describes, without allocating it."""
    with torch.device("meta"):
        return params_by_part(build_model(config, vocab_size))


def plan_student(teacher: Config, target: float, vocab_size: int) -> Config:
    """The config of the student whose size comes nearest to `target` times the teacher's parameters.

    An LSTM predictor becomes a tied-and-reduced one; one that is already reduced gets fewer labels and heads. The
    causal encoder gives up as many layers as that takes.

    Raises:
      ConfigError: target not between 0 and 1.
      ValueError: it is so small that one causal layer is already too much.
    """
    if not 0 < target < 1:
        raise ConfigError(f"--target must lie between 0 and 1, got {target}")
    predictor = teacher.model.predictor
    if predictor.kind == "lstm":
        reduced = replace(predictor, kind="tied_reduced")
    else:
        reduced = replace(
            predictor, context_size=min(predictor.context_size, max(2, round(predictor.context_size * target))),
            num_heads=max(1, round(predictor.num_heads * target)),
        )
    budget = target * config_params(teacher, vocab_size)["total"]

    def with_layers(count: int) -> Config:
        causal = replace(teacher.model.causal, num_layers=count)
        return replace(teacher, model=replace(teacher.model, causal=causal, predictor=reduced))

    sizes = {
        count: config_params(with_layers(count), vocab_size)["total"]
        for count in range(1, teacher.model.causal.num_layers + 1)
    }
    if sizes[1] > budget:
        raise ValueError(
            f"--target {target} allows {int(budget):,} parameters, but one causal layer already makes {sizes[1]:,}: "
            "raise the target or start from a narrower teacher"
        )
    return with_layers(min(sizes, key=lambda count: abs(sizes[count] - budget)))
