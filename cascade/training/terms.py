"""The terms of the objective: the transducer loss of a pass, CTC, the KL to a teacher and between the passes, MWER.

A new one is a class like these, a field of the config, and a line in `build_terms`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.config.options import Config, DistillationConfig, LossConfig
from cascade.data.batches import Batch
from cascade.losses.distillation import distillation_loss
from cascade.losses.joiner_cells import JoinerInputs
from cascade.losses.mwer import mwer_loss
from cascade.losses.transducer import TransducerLoss, transducer_loss
from cascade.models.transducer import CascadedTransducer
from cascade.training.mwer import NBest


class PassOutput(NamedTuple):
    """One pass of one model over a batch."""

    encoder_out: Tensor
    """(N, T, C)"""
    joiner: JoinerInputs
    am: Tensor
    """(N, T, V)"""
    lm: Tensor
    """(N, U + 1, V)"""


class Outputs(NamedTuple):
    """Outputs of the networks for a batch."""

    passes: dict[str, PassOutput]
    """By the name of the pass, causal or noncausal: those that are computed in this step."""
    teacher: dict[str, PassOutput]
    """The same passes of the teacher, without gradient; empty without one."""
    boundary: Tensor
    """(N, 4) int64 [0, 0, tokens, encoder frames] of each utterance."""
    ranges: dict[str, Tensor]
    """(N, T, R) band of each pass, which its transducer loss leaves here for later terms."""
    n_best: dict[str, NBest] | None = None
    """The hypotheses by which each pass is judged; None without MWER."""


class Term(NamedTuple):
    """One term of the objective: `weight` times the mean of `total` over `count` things."""

    total: Tensor
    """() sum over the batch, with gradient."""
    count: float
    """Tokens, or for distillation lattice cells: what the sum over all processes is divided by."""
    weight: float
    left_out: Tensor | None = None
    """(N,) bool: utterances whose value is not finite, which are in neither total nor count; None: not looked for."""


class LossTerm(Protocol):
    """A part of what is minimised; called for each pass that is computed, causal before noncausal."""

    def __call__(self, name: str, outputs: Outputs, batch: Batch, step: int) -> dict[str, Term]:
        """
        Args:
          name: the pass in question, a key of outputs.passes.
        Returns:
          terms by name, weighted without the pass's own weight. {}: nothing for this pass.
        """


def build_terms(
    config: Config, model: CascadedTransducer, teacher: CascadedTransducer | None
) -> list[LossTerm]:
    """The terms that the config asks for, in the order in which they are computed."""
    terms: list[LossTerm] = [Transducer(config.loss)]
    if config.loss.ctc_scale:
        terms.append(Ctc(config.loss.ctc_scale, model.heads.ctc))
    if teacher is not None:
        terms.append(Distillation(config.distillation, config.loss))
    if config.mwer is not None:
        terms = [_scaled(term, config.mwer.loss_scale) for term in terms]
        terms.append(Mwer(config.loss, model))
    return terms


def _scaled(term: LossTerm, scale: float) -> LossTerm:
    """The term with `scale` times its weights."""

    def call(name: str, outputs: Outputs, batch: Batch, step: int) -> dict[str, Term]:
        parts = term(name, outputs, batch, step).items()
        return {part: value._replace(weight=scale * value.weight) for part, value in parts}

    return call


class Warmup(NamedTuple):
    """State of the losses' warm-up: simple falls to simple_scale, pruned rises from 0.1 to 1."""

    simple_scale: float
    pruned_scale: float
    done: bool


def loss_warmup(config: LossConfig, step: int) -> Warmup:
    share = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    return Warmup(1.0 - share * (1.0 - config.simple_scale), 0.1 + 0.9 * share, share >= 1.0)


def _transducer_loss(
    output: PassOutput, tokens: Tensor, boundary: Tensor, config: LossConfig, **more
) -> TransducerLoss:
    options = {"rnnt_type": config.rnnt_type} | more
    return transducer_loss(
        output.am, output.lm, *output.joiner, tokens, boundary, prune_range=config.prune_range,
        lm_scale=config.lm_scale, am_scale=config.am_scale, **options,
    )


class Transducer:
    """Simple and pruned loss of a pass, per token."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def __call__(self, name: str, outputs: Outputs, batch: Batch, step: int) -> dict[str, Term]:
        warmup = loss_warmup(self.config, step)
        # Users wait for the causal pass; the other one corrects it and keeps its own times.
        penalty = self.config.delay_penalty if warmup.done and name == "causal" else 0.0
        loss = _transducer_loss(
            outputs.passes[name], batch.tokens, outputs.boundary, self.config, delay_penalty=penalty
        )
        outputs.ranges[name] = loss.ranges
        bad = ~(torch.isfinite(loss.simple) & torch.isfinite(loss.pruned)).detach()
        num_tokens = float(batch.token_lens[~bad].sum())
        return {
            part: Term(torch.where(bad, 0.0, values).sum(), num_tokens, scale, bad)
            for part, values, scale in (
                ("simple", loss.simple, warmup.simple_scale), ("pruned", loss.pruned, warmup.pruned_scale)
            )
        }


class Ctc:
    """CTC on a pass's encoder output, per token; an utterance with too few frames counts as 0."""

    def __init__(self, scale: float, heads: nn.ModuleDict) -> None:
        self.scale, self.heads = scale, heads

    def __call__(self, name: str, outputs: Outputs, batch: Batch, step: int) -> dict[str, Term]:
        logits, lens = self.heads[name](outputs.passes[name].encoder_out), outputs.boundary[:, 3]
        log_probs = functional.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        total = functional.ctc_loss(
            log_probs.transpose(0, 1), batch.tokens, lens, batch.token_lens, reduction="sum", zero_infinity=True
        )
        return {"ctc": Term(total, float(batch.token_lens.sum()), self.scale)}


class Distillation:
    """KL(teacher || student) of like pass to like pass, per lattice cell or per weight of the cells."""

    def __init__(self, config: DistillationConfig, loss: LossConfig) -> None:
        self.config, self.loss = config, loss

    def __call__(self, name: str, outputs: Outputs, batch: Batch, step: int) -> dict[str, Term]:
        config, teacher, ranges, weights = self.config, outputs.teacher[name], outputs.ranges[name], None
        if config.kind != "one_best":  # which has cells of its own
            own = config.ranges == "student" and loss_warmup(self.loss, step).done
            with torch.no_grad():
                loss = _transducer_loss(
                    teacher, batch.tokens, outputs.boundary, self.loss, ranges=ranges if own else None
                )
            ranges = loss.ranges
            weights = loss.occupancy if config.cell_weight == "teacher_occupancy" else None
        values, counts = distillation_loss(
            outputs.passes[name].joiner, teacher.joiner, batch.tokens, outputs.boundary, ranges, kind=config.kind,
            temperature=config.temperature, cell_weights=weights, rnnt_type=self.loss.rnnt_type,
        )
        return {"kd": Term(values.sum(), float(counts.sum()), config.weight)}


class Mwer:
    """Expected word errors of a pass over the N-best, less their mean, per token of the references.

    log P(y | x) is the pruned loss of each hypothesis on its own band, in the modified topology: the sum that the
    search approximates. The predictor has no dropout here, because its noise would differ between hypotheses. The
    second term, of weight 0, is the expected word errors themselves, for the log.
    """

    def __init__(self, loss: LossConfig, model: CascadedTransducer) -> None:
        self.loss, self.predictor, self.simple_lm = loss, model.predictor, model.heads.simple_lm

    def __call__(self, name: str, outputs: Outputs, batch: Batch, step: int) -> dict[str, Term]:
        n_best, device = outputs.n_best[name], outputs.boundary.device
        errors = [[each.errors for each in hypotheses] for hypotheses in n_best]
        # where all hypotheses have as many errors, their probabilities do not matter
        rows = [row for row, counts in enumerate(errors) if len(set(counts)) > 1]
        mean_errors = torch.tensor([sum(counts) / len(counts) for counts in errors], device=device)
        losses = torch.zeros_like(mean_errors)
        if rows:
            sequences = [torch.tensor(each.tokens, dtype=torch.int64) for row in rows for each in n_best[row]]
            lengths = torch.tensor([len(errors[row]) for row in rows], device=device)
            places = torch.tensor(rows, device=device)
            log_likelihoods = self._log_likelihoods(name, outputs, places.repeat_interleave(lengths), sequences)
            counts = torch.tensor([count for row in rows for count in errors[row]], device=device)
            values = mwer_loss(log_likelihoods, counts, lengths)
            losses = losses.to(values).index_put((places,), values)
        bad = ~torch.isfinite(losses.detach())
        losses, num_tokens = torch.where(bad, 0.0, losses), float(batch.token_lens[~bad].sum())
        expected = torch.where(bad, 0.0, losses.detach() + mean_errors)
        return {
            "mwer": Term(losses.sum(), num_tokens, 1.0, bad), "word_errors": Term(expected.sum(), num_tokens, 0.0),
        }

    def _log_likelihoods(self, name: str, outputs: Outputs, utts: Tensor, sequences: list[Tensor]) -> Tensor:
        """(M,) log P of M token sequences, each with the number (M,) of its utterance."""
        output, boundary = outputs.passes[name], outputs.boundary[utts]
        boundary[:, 2] = torch.tensor([len(sequence) for sequence in sequences])
        tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(utts.device)
        predictor_out = self._predict(tokens)
        with torch.no_grad():  # these choose the band only
            am, lm = output.am[utts], self.simple_lm(predictor_out)
        joiner = output.joiner._replace(encoder=output.joiner.encoder[utts], predictor=predictor_out)
        heard = PassOutput(output.encoder_out, joiner, am, lm)
        return -_transducer_loss(heard, tokens, boundary, self.loss, rnnt_type="modified").pruned

    def _predict(self, tokens: Tensor) -> Tensor:
        """(M, U) -> (M, U + 1, D) without dropout."""
        dropout, training = self.predictor.dropout, self.predictor.dropout.training
        dropout.eval()
        try:
            return self.predictor(tokens)
        finally:
            dropout.train(training)
