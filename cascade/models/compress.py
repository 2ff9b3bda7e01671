"""A smaller model out of a larger one."""

from __future__ import annotations

from torch import nn

from cascade.models.conformer import ConformerEncoder
from cascade.models.transducer import CascadedTransducer


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
