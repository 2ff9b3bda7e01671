import random

import pytest
import torch

from cascade.config.load import load_config
from cascade.config.options import LossConfig
from cascade.data.batches import Batch
from cascade.models.build import build_model
from cascade.text.tokens import BLANK, UNKNOWN, Tokenizer
from cascade.training.objective import Context, Objective, draw_context
from cascade.training.terms import loss_warmup
from tests.training.conftest import OPTIONS

CONTEXT = Context(4, 8, None)
TOKENIZER = Tokenizer("word", "keep", [BLANK, UNKNOWN, *(f"\u2581{word}" for word in "ABCDEFG")])


def make(*options, seed=0):
    torch.manual_seed(seed)
    config = load_config(overrides=[*OPTIONS, "features.num_mel_bins=10", *options])
    return build_model(config, 9).eval(), config


def make_batch(token_lens=(3, 2), frames=(60, 44)):
    torch.manual_seed(7)
    tokens = torch.zeros(len(token_lens), max(token_lens), dtype=torch.int64)
    for row, count in enumerate(token_lens):
        tokens[row, :count] = torch.randint(1, 9, (count,))
    features = torch.randn(len(frames), max(frames), 10)
    names = [f"utt-{row}" for row in range(len(frames))]
    texts = [TOKENIZER.decode(row) for row in tokens.tolist()]
    return Batch(features, torch.tensor(frames), tokens, torch.tensor(token_lens), names, texts)


def value(losses):
    """What is minimised, with this batch alone."""
    return sum(term.weight * term.total / term.count for term in losses.terms.values())


def test_losses_are_sums_over_utterances():
    model, config = make()
    batch, objective = make_batch(), Objective(model, config)
    whole = objective(batch, 100, CONTEXT).terms
    parts = []
    for row in range(2):
        frames, count = int(batch.feature_lens[row]), int(batch.token_lens[row])
        one = Batch(batch.features[row : row + 1, :frames], batch.feature_lens[row : row + 1],
                    batch.tokens[row : row + 1, :count], batch.token_lens[row : row + 1], ["x"], ["x"])
        parts.append(objective(one, 100, CONTEXT).terms)
    for name, term in whole.items():
        assert torch.allclose(term.total, parts[0][name].total + parts[1][name].total, rtol=1e-3)
        assert term.count == parts[0][name].count + parts[1][name].count == 5


def test_an_impossible_utterance_is_named_and_leaves_the_others_alone():
    model, config = make("loss.ctc_scale=0", "loss.rnnt_type=modified")
    objective = Objective(model, config)
    batch = make_batch((3, 30), (60, 44))  # 30 tokens in 11 frames: no path in the modified topology
    losses = objective(batch, 100, CONTEXT)
    assert losses.impossible == ["utt-1"] and not losses.non_finite
    value(losses).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    alone = Batch(batch.features[:1], batch.feature_lens[:1], batch.tokens[:1, :3], batch.token_lens[:1], ["x"], ["x"])
    for name, term in objective(alone, 100, CONTEXT).terms.items():
        assert torch.allclose(losses.terms[name].total, term.total, rtol=1e-4)


@pytest.mark.parametrize("broken", ["features", "weights"])
def test_numbers_that_are_not_finite_are_told_from_a_missing_alignment(broken):
    model, config = make("loss.rnnt_type=modified")
    batch = make_batch((3, 2), (60, 44))
    if broken == "features":
        batch.features[1, 5] = torch.nan
    else:
        torch.nn.init.constant_(model.joiner.output.weight, torch.nan)
    losses = Objective(model, config)(batch, 100, CONTEXT)
    assert losses.non_finite == (["utt-1"] if broken == "features" else ["utt-0", "utt-1"])
    assert not losses.impossible


def test_a_loss_beyond_all_numbers_is_not_taken_for_a_missing_alignment():
    model, config = make("loss.rnnt_type=modified", "loss.ctc_scale=0")
    torch.nn.init.constant_(model.joiner.output.bias[1:], -1e20)  # finite, and no symbol can be said
    losses = Objective(model, config)(make_batch((3, 30), (60, 44)), 100, CONTEXT)
    assert losses.impossible == ["utt-1"] and losses.non_finite == ["utt-0"]


def test_a_student_equal_to_its_teacher_has_no_divergence():
    for kind in ("pruned", "collapsed", "one_best"):
        model, config = make(f"distillation.kind={kind}")
        teacher, _ = make(f"distillation.kind={kind}")
        terms = Objective(model, config, teacher)(make_batch(), 100, CONTEXT).terms
        other, _ = make(seed=1)
        far = Objective(model, config, other)(make_batch(), 100, CONTEXT).terms
        for name in ("causal_kd", "noncausal_kd"):
            assert abs(float(terms[name].total)) < 1e-3
            assert float(far[name].total) > 1e-2 and far[name].count > 1


def test_one_best_has_a_cell_for_each_frame_where_a_frame_has_one_symbol():
    teacher, batch = make(seed=1)[0], make_batch()
    for rnnt_type, more in (("regular", int(batch.token_lens.sum())), ("modified", 0)):
        model, config = make("distillation.kind=one_best", f"loss.rnnt_type={rnnt_type}")
        terms = Objective(model, config, teacher)(batch, 100, CONTEXT).terms
        assert terms["causal_kd"].count == int((batch.feature_lens // 4).sum()) + more


def test_the_teacher_gets_no_gradient_and_stays_in_eval_mode():
    model, config = make("distillation.weight=3")
    teacher, _ = make(seed=1)
    value(Objective(model.train(), config, teacher.train())(make_batch(), 100, CONTEXT)).backward()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_pass_sampling_draws_the_causal_pass_at_its_weight():
    model, config = make("loss.pass_sampling=true", "loss.causal_weight=0.25")
    objective = Objective(model, config)
    drawn = [objective.draw(step)[1] for step in range(400)]
    assert all(len(passes) == 1 for passes in drawn)
    assert 60 < drawn.count(("causal",)) < 140
    assert objective.draw(5) == objective.draw(5)


def test_the_drawn_geometry_fits_the_streaming_rules():
    config = load_config(overrides=["context.chunk_frames=[4,8]", "context.block_chunks=[1,3,-1]"]).context
    seen = {draw_context(config, random.Random(seed)) for seed in range(300)}
    assert {context.chunk for context in seen} == {4, 8}
    assert any(context.block is None for context in seen) and any(context.left is None for context in seen)
    assert all(context.block is None or context.block in (context.chunk, 3 * context.chunk) for context in seen)


def test_warmup_moves_from_the_simple_to_the_pruned_loss():
    config = LossConfig(simple_scale=0.5, warmup_steps=100)
    assert loss_warmup(config, 0)[:2] == (1.0, 0.1)
    assert loss_warmup(config, 100) == (0.5, 1.0, True)
    assert not loss_warmup(config, 99).done


def test_delay_penalty_acts_on_the_causal_pass_after_the_warm_up():
    terms = {}
    for penalty in (0.0, 0.5):
        model, config = make(f"loss.delay_penalty={penalty}")  # loss.warmup_steps=3
        for step in (0, 2, 3, 100):
            terms[penalty, step] = Objective(model, config)(make_batch(), step, CONTEXT).terms
    for step in (0, 2, 3, 100):
        for name, term in terms[0.0, step].items():
            touched = step >= 3 and name in ("causal_simple", "causal_pruned")
            assert (float(terms[0.5, step][name].total) != float(term.total)) == touched, (step, name)


def test_labels_that_are_carried_over_are_the_students_alone(monkeypatch):
    model, config = make("distillation.weight=2")
    teacher, _ = make("model.predictor.context_size=1", seed=1)
    batch = make_batch()
    batch.carried = torch.randint(1, 9, (2, model.predictor.context_size))
    seen = {}
    for name, of in (("student", model), ("teacher", teacher)):
        forward = of.predictor.forward
        monkeypatch.setattr(of.predictor, "forward", lambda *labels, name=name, forward=forward: (
            seen.__setitem__(name, labels), forward(*labels))[1])
    with_carried = value(Objective(model, config, teacher)(batch, 100, CONTEXT))
    assert torch.equal(seen["student"][1], batch.carried) and len(seen["teacher"]) == 1
    batch.carried = None
    assert value(Objective(model, config, teacher)(batch, 100, CONTEXT)) != with_carried
