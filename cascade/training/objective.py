"""The objective: draws the geometry and the passes of a step, runs the networks, gathers the terms of the loss."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.config.options import Config, ContextConfig
from cascade.data.batches import Batch
from cascade.device import takes_bfloat16
from cascade.losses.joiner_cells import JoinerInputs
from cascade.losses.transducer import has_alignment
from cascade.models.transducer import CascadedTransducer
from cascade.text.tokens import Tokenizer
from cascade.training.mwer import NBest, search_n_best
from cascade.training.terms import Outputs, PassOutput, Term, build_terms

PASSES = ("causal", "noncausal")


class Context(NamedTuple):
    """The geometry of one batch, in 40 ms frames; None = all."""

    chunk: int | None
    left: int | None
    block: int | None


VALIDATION_CONTEXT = Context(chunk=8, left=128, block=None)
"""Dev losses are comparable between epochs because the geometry is fixed: 320 ms chunks, full second pass."""


def draw_context(config: ContextConfig, rng: random.Random) -> Context:
    """C, L and B of one batch, each uniform over its list."""
    chunk = rng.choice(config.chunk_frames)
    left, block = rng.choice(config.left_chunks), rng.choice(config.block_chunks)
    return Context(chunk, None if left < 0 else left * chunk, None if block < 0 else block * chunk)


def run_passes(
    model: CascadedTransducer, batch: Batch, context: Context, passes: tuple[str, ...], before: Tensor | None = None
) -> tuple[dict[str, PassOutput], Tensor]:
    """Both encoders' outputs (the causal one runs once) and the (N, 4) boundary of the lattice.

    before: the labels that the predictor begins with.
    """
    out, lens = model.encoder.forward_causal(batch.features, batch.feature_lens, context.chunk, context.left)
    encoder_outs = {"causal": out}
    if "noncausal" in passes:
        encoder_outs["noncausal"] = model.encoder.forward_noncausal(out, lens, context.block, context.left)
    predictor_out = model.predictor(batch.tokens) if before is None else model.predictor(batch.tokens, before)
    lm = model.heads.simple_lm(predictor_out)
    outputs = {}
    for name in passes:
        joiner = JoinerInputs(
            model.joiner.project_encoder(encoder_outs[name]), predictor_out,
            model.joiner.output_weight, model.joiner.output_bias,
        )
        am = model.heads.simple_am(encoder_outs[name])
        outputs[name] = PassOutput(encoder_outs[name], joiner, am, lm)
    zeros = torch.zeros_like(lens)
    return outputs, torch.stack((zeros, zeros, batch.token_lens, lens), dim=1)


class Losses(NamedTuple):
    """Losses of a batch, and the utterances that have none."""

    terms: dict[str, Term]
    """By the names under which their means are logged, in the same order on every process."""
    impossible: list[str]
    """Ids of utterances without an alignment (too few frames for their tokens): they count in no transducer loss."""
    non_finite: list[str]
    """Ids of utterances whose loss is not a finite number: the model or its input is not, this step cannot be taken."""


class Objective:
    """Losses of a batch, as sums, with the counts that turn them into means.

    Sums and counts let several processes add up before they divide: a mean of means is not the mean.
    """

    def __init__(
        self, model: CascadedTransducer, config: Config, teacher: CascadedTransducer | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`tokenizer` is for MWER, which counts words."""
        self.model, self.config, self.teacher, self.tokenizer = model, config, teacher, tokenizer
        self.terms = build_terms(config, model, teacher)
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    def draw(self, step: int) -> tuple[Context, tuple[str, ...]]:
        """The geometry and the passes of a step: a function of (seed, step) only, the same on every rank."""
        rng = random.Random(f"{self.config.seed}/{step}")
        context = draw_context(self.config.context, rng)
        if not self.config.loss.pass_sampling:
            return context, PASSES
        return context, (PASSES[0] if rng.random() < self.config.loss.causal_weight else PASSES[1],)

    def __call__(self, batch: Batch, step: int, context: Context, passes: tuple[str, ...] = PASSES) -> Losses:
        """
        Args:
          batch: features and tokens of N utterances.
          step: for the warm-up of the losses.
          context: C, L, B of this batch, also used by the teacher.
          passes: which passes to compute.
        """
        config = self.config.loss
        device = batch.features.device
        low = self.model.training and takes_bfloat16(self.config.training.precision, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            student, boundary = run_passes(self.model, batch, context, passes, batch.carried)
            teacher = {}
            if self.teacher is not None:
                with torch.no_grad():
                    teacher, _ = run_passes(self.teacher, batch, context, passes)
        outputs = Outputs(student, teacher, boundary, {}, self._n_best(batch, context, passes))
        terms: dict[str, Term] = {}
        aligns = has_alignment(boundary, config.rnnt_type, config.prune_range)
        impossible = broken = torch.zeros_like(aligns)
        for name in passes:
            weight = config.causal_weight if name == "causal" else 1 - config.causal_weight
            weight = 1.0 if len(passes) == 1 else weight  # the draw has the weights
            no_path = ~aligns & _finite_outputs(student[name])
            for make_terms in self.terms:
                for part, term in make_terms(name, outputs, batch, step).items():
                    terms[f"{name}_{part}"] = term._replace(weight=weight * term.weight)
                    if term.left_out is not None:
                        impossible, broken = impossible | (term.left_out & no_path), broken | (term.left_out & ~no_path)
        impossible_ids, broken_ids = (
            [batch.ids[index] for index in torch.nonzero(rows).flatten().tolist()] for rows in (impossible, broken)
        )
        return Losses(terms, impossible_ids, broken_ids)

    def _n_best(self, batch: Batch, context: Context, passes: tuple[str, ...]) -> dict[str, NBest] | None:
        """The hypotheses by which MWER judges each pass."""
        config = self.config.mwer
        if config is None:
            return None
        sources = dict.fromkeys(passes, "noncausal") if config.hypotheses == "full" else {name: name for name in passes}
        n_best = search_n_best(self.model, self.tokenizer, config, batch, context, sorted(set(sources.values())))
        return {name: n_best[source] for name, source in sources.items()}


def _finite_outputs(output: PassOutput) -> Tensor:
    """(N,) whether all that a pass hands to its losses is finite, padding included."""
    parts = (output.am, output.lm, output.joiner.encoder, output.joiner.predictor)
    return torch.stack([torch.isfinite(part.detach()).flatten(1).all(dim=1) for part in parts]).all(dim=0)
