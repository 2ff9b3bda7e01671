"""A student's start from its teacher's layers."""

import pytest
import torch

from cascade.training.start import evenly_chosen, from_teacher
from tests.models.test_encoder import small_model


def test_layers_are_chosen_evenly():
    assert evenly_chosen(22, 10) == [0, 2, 5, 7, 9, 12, 14, 16, 19, 21]
    assert evenly_chosen(3, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="the student has 4 layers"):
        evenly_chosen(3, 4)


def test_student_starts_from_the_teachers_parts_of_equal_shape():
    teacher, student = small_model(predictor="lstm", seed=1), small_model(seed=2)
    position = student.predictor.position.clone()
    report = from_teacher(student, teacher)
    teacher_layer = teacher.encoder.noncausal.layers[1].attention.in_proj.weight
    assert torch.equal(student.encoder.noncausal.layers[1].attention.in_proj.weight, teacher_layer)
    assert torch.equal(student.predictor.position, position)
    assert any(line.startswith("predictor: random start") for line in report)
