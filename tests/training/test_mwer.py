"""Minimum word error rate training: what it minimises, against all paths of a tiny lattice, and that this helps."""

import collections
import functools
import itertools
import json
import random

import pytest
import torch

from cascade.config.load import load_config
from cascade.config.options import ConfigError
from cascade.measure.wer import align, count_errors
from cascade.models.build import build_model
from cascade.text.tokens import BLANK, UNKNOWN, Tokenizer
from cascade.training.mwer import ScoredTokens, num_word_errors, score_tokens, search_n_best
from cascade.training.objective import PASSES, Context, Objective, run_passes
from cascade.training.terms import Outputs
from tests.training.conftest import OPTIONS, run
from tests.training.test_objective import TOKENIZER, make, make_batch, value

CONTEXT = Context(2, 4, None)
PIECES = Tokenizer("word", "keep", [BLANK, UNKNOWN, "\u2581A", "B"])  # "A", "AB", "ABB", ...: words of several tokens
ALONE = ["mwer.loss_scale=0", "loss.ctc_scale=0"]


def tiny(*options, seed=0):
    """(model, config, batch): float64, 4 tokens, utterances of 5 and 3 frames."""
    config = load_config(overrides=[*OPTIONS, "features.num_mel_bins=10", *ALONE, *options])
    torch.manual_seed(seed)
    model = build_model(config, 4).double().eval()
    torch.nn.init.normal_(model.joiner.output.weight)
    batch = make_batch((1, 2), (21, 13))
    batch.features, batch.tokens = batch.features.double(), torch.tensor([[3, 0], [2, 3]])
    batch.texts = ["B", "AB"]
    return model, config, batch


def all_sequences(model, encoder):
    """{tokens: P} of every token sequence over (T, D), path by path, one symbol a frame."""

    @functools.cache
    def after(tokens):
        predictor = model.predictor(torch.tensor([tokens], dtype=torch.int64))[0, -1]
        logits = torch.tanh(encoder + predictor) @ model.joiner.output_weight.T + model.joiner.output_bias
        return logits.softmax(dim=1).tolist()

    probs = collections.Counter()
    for path in itertools.product(range(4), repeat=len(encoder)):
        tokens, prob = (), 1.0
        for frame, symbol in enumerate(path):
            prob *= after(tokens)[frame][symbol]
            tokens = tokens if symbol == 0 else (*tokens, symbol)
        probs[tokens] += prob
    return probs


@pytest.mark.parametrize("beam", [3, 256])
@torch.no_grad()
def test_the_terms_equal_the_formula_on_all_paths_of_a_lattice(beam):
    model, config, batch = tiny(f"mwer.beam={beam}", f"mwer.nbest={beam}", "loss.prune_range=6")
    terms = Objective(model, config, None, PIECES)(batch, 100, CONTEXT).terms
    passes, boundary = run_passes(model, batch, CONTEXT, PASSES)
    n_best = search_n_best(model, PIECES, config.mwer, batch, CONTEXT, PASSES)
    for name in PASSES:
        loss = expected = 0.0
        for row, hypotheses in enumerate(n_best[name]):
            probs = all_sequences(model, passes[name].joiner.encoder[row, : boundary[row, 3]])
            tokens = [item.tokens for item in hypotheses]
            assert 1 < len(tokens) == len(set(tokens)) <= beam
            assert beam == 3 or len(tokens) == 2 ** (int(boundary[row, 3]) + 1) - 1  # all there are
            weights = torch.tensor([probs[each] for each in tokens], dtype=torch.float64)
            weights /= weights.sum()
            errors = [count_errors(align(batch.texts[row].split(), PIECES.decode(each).split())).errors
                      for each in tokens]
            assert errors == [item.errors for item in hypotheses]
            errors = torch.tensor(errors, dtype=torch.float64)
            loss += float((weights * (errors - errors.mean())).sum())
            expected += float((weights * errors).sum())
        assert float(terms[f"{name}_mwer"].total) == pytest.approx(loss, abs=1e-9) and abs(loss) > 1e-3
        assert float(terms[f"{name}_word_errors"].total) == pytest.approx(expected, abs=1e-6)
        assert terms[f"{name}_mwer"].count == 3 and terms[f"{name}_word_errors"].weight == 0


def test_the_gradient_of_the_whole_term_equals_finite_differences():
    model, config, batch = tiny("mwer.nbest=4", seed=3)
    objective = Objective(model, config, None, PIECES)
    value(objective(batch, 100, CONTEXT)).backward()
    generator, touched = torch.Generator().manual_seed(0), set()
    for name, parameter in model.named_parameters():
        step = 1e-6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = 0.0 if parameter.grad is None else float((parameter.grad * step).sum())
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step
                values.append(float(value(objective(batch, 100, CONTEXT))))
            parameter += step
        assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-4, abs=1e-13), name
        touched |= {name.split(".")[0]} if abs(slope) > 1e-12 else set()
    assert touched == {"encoder", "predictor", "joiner"}


def judged(model, config, batch, n_best, name):
    """The term of a pass for given hypotheses."""
    passes, boundary = run_passes(model, batch, CONTEXT, PASSES)
    term = Objective(model, config, None, PIECES).terms[-1]
    return term(name, Outputs(passes, {}, boundary, {}, {name: n_best}), batch, 100)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PASSES)
def test_a_step_down_the_gradient_raises_the_probability_of_the_hypothesis_with_fewer_errors(name, seed):
    model, config, batch = tiny("mwer.nbest=2", seed=seed)
    n_best = [score_tokens([(2, 3), (2, 2, 3)], PIECES, "AB"), score_tokens([()], PIECES, "A")]
    assert n_best == [[ScoredTokens((2, 3), 0), ScoredTokens((2, 2, 3), 1)], [ScoredTokens((), 1)]]
    before = judged(model, config, batch, n_best, name)
    before["mwer"].total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-5 / norm * parameter.grad
        after = judged(model, config, batch, n_best, name)
    gain = float(before["word_errors"].total - after["word_errors"].total)  # with errors 0 and 1: what P gains
    assert gain == pytest.approx(1e-5 * float(norm), rel=0.01) and gain > 1e-8


def test_hypotheses_that_cannot_be_told_apart_cost_nothing_and_an_empty_one_counts():
    model, config, batch = tiny()
    alone = judged(model, config, batch, [score_tokens([(), (2, 3)], PIECES, "AB"), [ScoredTokens((3,), 1)]], "causal")
    assert float(alone["mwer"].total) != 0 and alone["mwer"].count == 3
    same = [ScoredTokens((2, 3, 3), 1), ScoredTokens((2,), 1)]
    both = judged(model, config, batch, [score_tokens([(), (2, 3)], PIECES, "AB"), same], "causal")
    assert float(both["mwer"].total) == float(alone["mwer"].total)
    assert float(both["word_errors"].total) == float(alone["word_errors"].total)
    nothing = judged(model, config, batch, [same, [ScoredTokens((), 1)]], "causal")
    assert float(nothing["mwer"].total) == 0 and float(nothing["word_errors"].total) == 2
    assert not nothing["mwer"].left_out.any()


def test_the_search_hears_what_decoding_hears_and_leaves_the_model_as_it_was():
    model, config, batch = tiny("model.causal.dropout=0.5", "model.noncausal.dropout=0.5", "mwer.beam=8")
    without = search_n_best(model, PIECES, config.mwer, batch, CONTEXT, PASSES)
    model.train()
    assert search_n_best(model, PIECES, config.mwer, batch, CONTEXT, PASSES) == without
    assert all(module.training for module in model.modules())
    Objective(model, config, None, PIECES)(batch, 100, CONTEXT)
    assert all(module.training for module in model.modules())
    assert without["causal"] != without["noncausal"]
    assert all(1 < len(hypotheses) <= config.mwer.nbest for hypotheses in without["causal"])


def test_the_full_pass_can_lend_its_hypotheses():
    model, config, batch = tiny("mwer.hypotheses=full")
    objective = Objective(model, config, None, PIECES)
    found = objective._n_best(batch, CONTEXT, PASSES)
    own = search_n_best(model, PIECES, config.mwer, batch, CONTEXT, PASSES)
    assert found["causal"] == found["noncausal"] == own["noncausal"] != own["causal"]
    assert objective._n_best(batch, CONTEXT, ("causal",)) == {"causal": own["noncausal"]}


def test_word_errors_are_those_of_the_word_error_rate():
    generator = random.Random(0)
    for _ in range(300):
        one, other = ([generator.choice("abc") for _ in range(generator.randrange(7))] for _ in range(2))
        assert num_word_errors(one, other) == count_errors(align(one, other)).errors


@pytest.mark.parametrize("broken", ["features", "weights"])
def test_numbers_that_are_not_finite_are_named(broken):
    model, config = make("mwer.nbest=4")
    batch = make_batch()
    if broken == "features":
        batch.features[1, 5] = torch.nan
    else:
        torch.nn.init.constant_(model.joiner.output.weight, torch.nan)
    losses = Objective(model, config, None, TOKENIZER)(batch, 100, CONTEXT)
    assert losses.non_finite == (["utt-1"] if broken == "features" else ["utt-0", "utt-1"])
    assert torch.isfinite(losses.terms["noncausal_mwer"].total)


def test_the_expected_word_errors_of_a_model_and_those_of_its_search_fall():
    model, config = make("mwer.beam=8", "mwer.nbest=8", *ALONE)
    objective, batch = Objective(model, config, None, TOKENIZER), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def errors():
        with torch.no_grad():
            terms = objective(batch, 100, CONTEXT).terms
            best = objective._n_best(batch, CONTEXT, PASSES)
        return [float(terms[f"{name}_word_errors"].total) for name in PASSES] + [
            sum(hypotheses[0].errors for hypotheses in best[name]) for name in PASSES]

    before = errors()
    for _ in range(40):
        optimizer.zero_grad()
        value(objective(batch, 100, CONTEXT)).backward()
        optimizer.step()
    after = errors()
    assert all(now < 0.5 * then for now, then in zip(after, before, strict=True)), (before, after)


def test_training_wants_a_model_to_start_from_and_then_lowers_the_word_errors(trained, train, tmp_path, corpus):
    done = train(tmp_path / "none", "mwer.nbest=4", check=False)
    assert done.returncode == 2 and "name it with --init-from MODEL" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
    options = ["--init-from", trained, "mwer.nbest=4", "loss.warmup_steps=0"]
    for program, words in (("train", ["--exp-dir", tmp_path / "none", "--dry-run"]), ("max_batch", [])):
        run(program, "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--threads", 1, *OPTIONS, *options,
            *words)
    train(tmp_path / "tuned", *options, "training.learning_rate=1e-2", "training.num_epochs=6",
          "training.validate_every_epochs=6", "augment.share=0")
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "losses.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    for name in PASSES:
        assert rows[-1][f"{name}_word_errors"] < rows[0][f"{name}_word_errors"]
        assert rows[-1][f"{name}_word_errors"] > rows[-1][f"{name}_mwer"]


def test_more_hypotheses_than_the_beam_has_are_refused():
    with pytest.raises(ConfigError, match=r"mwer.nbest \(6\) must be at most mwer.beam \(4\)"):
        load_config(overrides=["mwer.nbest=6"])
