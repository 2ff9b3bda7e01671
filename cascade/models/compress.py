"""A smaller model out of a larger one: its size, and its start.

The rule is the paper's (2312.09842): the non-causal encoder is shallow already and stays; the causal encoder and the
predictor are cut in proportion to the target. The layer counts themselves are not published.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from cascade.config.options import Config
from cascade.models.build import build_model, params_by_part
from cascade.models.conformer import ConformerEncoder
from cascade.models.transducer import CascadedTransducer


def config_params(config: Config, vocab_size: int) -> dict[str, int]:
    """`params_by_part` of the model a config describes, without allocating it."""
    with torch.device("meta"):
        return params_by_part(build_model(config, vocab_size))


def plan_student(teacher: Config, target: float, vocab_size: int) -> Config:
    """The config of the student whose size comes nearest to `target` times the teacher's parameters.

    An LSTM predictor becomes a tied-and-reduced one; one that is already reduced gets fewer labels and heads. The
    causal encoder gives up as many layers as that takes.

    Raises:
      ValueError: target not between 0 and 1, or so small that one causal layer is already too much.
    """
    if not 0 < target < 1:
        raise ValueError(f"--target must lie between 0 and 1, got {target}")
    predictor = teacher.model.predictor
    if predictor.kind == "lstm":
        reduced = replace(predictor, kind="tied_reduced")
    else:
        reduced = replace(
            predictor, context_size=max(2, round(predictor.context_size * target)),
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


def evenly_chosen(num_teacher: int, num_student: int) -> list[int]:
    """Indices of `num_student` of `num_teacher` layers, evenly spaced, first and last included."""
    if num_student > num_teacher:
        raise ValueError(f"the student has {num_student} layers, its teacher only {num_teacher}")
    if num_student == 1:
        return [num_teacher - 1]
    return [round(index * (num_teacher - 1) / (num_student - 1)) for index in range(num_student)]


def _same_shapes(student: nn.Module, teacher: nn.Module) -> bool:
    shapes = [{name: tensor.shape for name, tensor in part.state_dict().items()} for part in (student, teacher)]
    return shapes[0] == shapes[1]


def init_from_teacher(student: CascadedTransducer, teacher: CascadedTransducer) -> list[str]:
    """Start the student from evenly chosen teacher layers and every part of equal shape.

    Returns:
      one line per part, for the log: what was copied from where, what keeps its random start.
    """
    report = []

    def copy(name: str, target: nn.Module, source: nn.Module, note: str = "") -> None:
        if _same_shapes(target, source):
            target.load_state_dict(source.state_dict())
            report.append(f"{name}: copied from the teacher{note}")
        else:
            report.append(f"{name}: random start (its shape differs from the teacher's)")

    def copy_encoder(name: str, target: ConformerEncoder, source: ConformerEncoder) -> None:
        chosen = evenly_chosen(len(source.layers), len(target.layers))
        picked = nn.ModuleList(source.layers[index] for index in chosen)
        copy(name, target.layers, picked, f", layers {' '.join(str(index) for index in chosen)}")
        copy(f"{name}'s norm", target.norm, source.norm)

    copy("front end", student.encoder.subsampling, teacher.encoder.subsampling)
    copy_encoder("causal encoder", student.encoder.causal, teacher.encoder.causal)
    copy_encoder("non-causal encoder", student.encoder.noncausal, teacher.encoder.noncausal)
    copy("joiner", student.joiner, teacher.joiner)
    copy("training heads", student.heads, teacher.heads)
    if type(student.predictor) is type(teacher.predictor):
        copy("predictor", student.predictor, teacher.predictor)
    else:
        report.append("predictor: random start (another kind than the teacher's)")
    return report
