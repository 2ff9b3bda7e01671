import pytest

from cascade.config.load import load_config
from cascade.models.build import build_model, params_by_part
from cascade.models.compress import config_params, plan_student

FULL_SIZE = ["model.causal.num_layers=22", "model.predictor.kind=lstm"]


def test_half_of_the_full_size_teacher_is_the_designed_student():
    teacher = load_config(overrides=FULL_SIZE)
    student = plan_student(teacher, 0.5, 500)
    assert student.model.causal.num_layers == 10
    assert student.model.noncausal == teacher.model.noncausal
    assert student.model.predictor.kind == "tied_reduced"
    ratio = config_params(student, 500)["total"] / config_params(teacher, 500)["total"]
    assert abs(ratio - 0.5) < 0.02


def test_planned_counts_are_those_of_the_built_model():
    config = load_config(overrides=["model.causal.num_layers=2", "model.d_model=16", "model.predictor.kind=stateless"])
    assert config_params(config, 37) == params_by_part(build_model(config, 37))


def test_a_reduced_predictor_is_cut_in_proportion():
    teacher = load_config(overrides=["model.predictor.context_size=8", "model.predictor.num_heads=4"])
    student = plan_student(teacher, 0.5, 500)
    assert (student.model.predictor.context_size, student.model.predictor.num_heads) == (4, 2)


def test_a_predictor_of_one_label_stays_one():
    teacher = load_config(overrides=["model.predictor.context_size=1", "model.predictor.num_heads=4"])
    assert plan_student(teacher, 0.5, 500).model.predictor.context_size == 1


def test_impossible_targets_are_errors():
    teacher = load_config(overrides=FULL_SIZE)
    for target in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="--target must lie between 0 and 1"):
            plan_student(teacher, target, 500)
    with pytest.raises(ValueError, match="one causal layer already makes"):
        plan_student(teacher, 0.05, 500)
