"""What training minimises: the pruned transducer loss of both passes, CTC, and the KL to a teacher."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cascade.config.options import Config, ContextConfig
from cascade.data.batches import Batch
from cascade.losses.distillation import JoinerInputs, distillation_loss
from cascade.losses.transducer import TransducerLoss, transducer_loss
from cascade.models.transducer import CascadedTransducer

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


class Warmup(NamedTuple):
    """How far the warm-up of the losses is: simple falls to simple_scale, pruned rises from 0.1 to 1."""

    simple_scale: float
    pruned_scale: float
    done: bool


def loss_warmup(simple_scale: float, warmup_steps: int, step: int) -> Warmup:
    share = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return Warmup(1.0 - share * (1.0 - simple_scale), 0.1 + 0.9 * share, share >= 1.0)


class PassOutput(NamedTuple):
    """One pass of one model over a batch."""

    encoder_out: Tensor
    """(N, T, C)"""
    joiner: JoinerInputs
    am: Tensor
    """(N, T, V)"""
    lm: Tensor
    """(N, U + 1, V)"""


def run_passes(
    model: CascadedTransducer, batch: Batch, context: Context, passes: tuple[str, ...]
) -> tuple[dict[str, PassOutput], Tensor]:
    """Both encoders' outputs (the causal one runs once) and the (N, 4) boundary of the lattice."""
    out, lens = model.encoder.forward_causal(batch.features, batch.feature_lens, context.chunk, context.left)
    encoder_outs = {"causal": out}
    if "noncausal" in passes:
        encoder_outs["noncausal"] = model.encoder.forward_noncausal(out, lens, context.block, context.left)
    predictor_out = model.predictor(batch.tokens)
    lm = model.heads.simple_lm(predictor_out)
    outputs = {}
    for name in passes:
        joiner = JoinerInputs(
            model.joiner.project_encoder(encoder_outs[name]), predictor_out,
            model.joiner.output_weight, model.joiner.output_bias,
        )
        outputs[name] = PassOutput(encoder_outs[name], joiner, model.heads.simple_am(encoder_outs[name]), lm)
    zeros = torch.zeros_like(lens)
    return outputs, torch.stack((zeros, zeros, batch.token_lens, lens), dim=1)


class Term(NamedTuple):
    """One term of the objective: `weight` times the mean of `total` over `count` things."""

    total: Tensor
    """() sum over the batch, with gradient."""
    count: float
    """Tokens, or for distillation lattice cells: what the sum over all processes is divided by."""
    weight: float


class Losses(NamedTuple):
    """What `Objective` says of a batch."""

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

    def __init__(self, model: CascadedTransducer, config: Config, teacher: CascadedTransducer | None = None) -> None:
        self.model, self.config, self.teacher = model, config, teacher
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
        loss_config = self.config.loss
        warmup = loss_warmup(loss_config.simple_scale, loss_config.warmup_steps, step)
        outputs, boundary = run_passes(self.model, batch, context, passes)
        teacher_outputs = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_outputs, _ = run_passes(self.teacher, batch, context, passes)
        terms: dict[str, Term] = {}
        impossible = torch.zeros_like(batch.token_lens, dtype=torch.bool)
        broken = torch.zeros_like(impossible)
        for name in passes:
            weight = loss_config.causal_weight if name == "causal" else 1 - loss_config.causal_weight
            weight = 1.0 if len(passes) == 1 else weight  # the draw has the weights
            # Users wait for the causal pass; the other one corrects it and keeps its own times.
            delay_penalty = loss_config.delay_penalty if warmup.done and name == "causal" else 0.0
            loss = self._transducer(outputs[name], batch, boundary, delay_penalty)
            finite = _finite_outputs(outputs[name])
            no_path = finite & (torch.isposinf(loss.simple) | torch.isposinf(loss.pruned)).detach()
            bad = ~(torch.isfinite(loss.simple) & torch.isfinite(loss.pruned)).detach()
            impossible, broken = impossible | no_path, broken | (bad & ~no_path)
            num_tokens = float(batch.token_lens[~bad].sum())
            for part, values in (("simple", loss.simple), ("pruned", loss.pruned)):
                scale = warmup.simple_scale if part == "simple" else warmup.pruned_scale
                terms[f"{name}_{part}"] = Term(torch.where(bad, 0.0, values).sum(), num_tokens, weight * scale)
            if loss_config.ctc_scale:
                ctc = self._ctc(name, outputs[name].encoder_out, batch, boundary)
                terms[f"{name}_ctc"] = Term(ctc, float(batch.token_lens.sum()), weight * loss_config.ctc_scale)
            if teacher_outputs is not None:
                own = self.config.distillation.ranges == "student" and warmup.done
                kl, count = self._distill(outputs[name], teacher_outputs[name], loss.ranges, batch, boundary, own)
                terms[f"{name}_kd"] = Term(kl, count, weight * self.config.distillation.weight)
        impossible_ids, broken_ids = (
            [batch.ids[index] for index in torch.nonzero(rows).flatten().tolist()] for rows in (impossible, broken)
        )
        return Losses(terms, impossible_ids, broken_ids)

    def _transducer(
        self, output: PassOutput, batch: Batch, boundary: Tensor, delay_penalty: float = 0.0,
        ranges: Tensor | None = None,
    ) -> TransducerLoss:
        config = self.config.loss
        return transducer_loss(
            output.am, output.lm, *output.joiner, batch.tokens, boundary, prune_range=config.prune_range,
            lm_scale=config.lm_scale, am_scale=config.am_scale, rnnt_type=config.rnnt_type,
            delay_penalty=delay_penalty, ranges=ranges,
        )

    def _ctc(self, name: str, encoder_out: Tensor, batch: Batch, boundary: Tensor) -> Tensor:
        logits = self.model.heads.ctc[name](encoder_out)
        log_probs = functional.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        return functional.ctc_loss(
            log_probs.transpose(0, 1), batch.tokens, boundary[:, 3], batch.token_lens, reduction="sum",
            zero_infinity=True,
        )

    def _distill(
        self, student: PassOutput, teacher: PassOutput, ranges: Tensor, batch: Batch, boundary: Tensor, own: bool
    ) -> tuple[Tensor, float]:
        """KL(teacher || student) of like pass to like pass: the sum over valid cells and their number or weight.

        ranges: (N, T, R) the student's; own: compare on them, otherwise on the teacher's. one_best needs neither.
        """
        config = self.config.distillation
        weights = None
        if config.kind != "one_best":
            with torch.no_grad():
                loss = self._transducer(teacher, batch, boundary, ranges=ranges if own else None)
            ranges = loss.ranges
            weights = loss.occupancy if config.cell_weight == "teacher_occupancy" else None
        values, counts = distillation_loss(
            student.joiner, teacher.joiner, batch.tokens, boundary, ranges, kind=config.kind,
            temperature=config.temperature, cell_weights=weights,
        )
        return values.sum(), float(counts.sum())


def _finite_outputs(output: PassOutput) -> Tensor:
    """(N,) whether all that a pass hands to its losses is finite, padding included."""
    parts = (output.am, output.lm, output.joiner.encoder, output.joiner.predictor)
    return torch.stack([torch.isfinite(part.detach()).flatten(1).all(dim=1) for part in parts]).all(dim=0)
