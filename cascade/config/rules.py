"""What the options of an experiment may be, how they must fit together, and what another value means for a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

_CHOICES = {
    "features.extractor": ("lhotse", "kaldifeat"),
    "tokens.kind": ("bpe", "char", "word"),
    "tokens.case": ("keep", "lower", "upper"),
    "tokens.normal_form": ("nfc", "nfkc"),
    "model.causal.convolution": ("left",),
    "model.noncausal.convolution": ("left", "centred"),
    "model.predictor.kind": ("lstm", "stateless", "tied_reduced"),
    "loss.rnnt_type": ("regular", "modified", "constrained"),
    "training.optimizer": ("muon", "adamw"),
    "distillation.kind": ("pruned", "collapsed", "one_best"),
    "distillation.ranges": ("teacher", "student"),
    "distillation.cell_weight": ("uniform", "teacher_occupancy"),
}

_AT_LEAST = {
    "seed": 0, "features.sampling_rate": 8000, "features.num_mel_bins": 4,
    "tokens.vocab_size": 3,
    "data.min_duration": 0, "data.max_duration": 0.1, "data.max_quarantine_share": 0, "data.batch_duration": 0.1,
    "data.num_buckets": 1, "data.sorted_epochs": 0, "data.num_workers": 0,
    "augment.num_time_masks": 0, "augment.time_mask_frames": 0, "augment.num_freq_masks": 0,
    "augment.freq_mask_bins": 0, "augment.time_warp_frames": 0, "augment.share": 0, "augment.max_time_mask_share": 0,
    "augment.noise_share": 0, "augment.rir_share": 0,
    "model.d_model": 2, "model.subsampling_channels": 1, "model.joiner_dim": 1,
    "model.causal.num_layers": 1, "model.causal.num_heads": 1, "model.causal.feedforward_dim": 1,
    "model.causal.dropout": 0, "model.noncausal.num_layers": 1, "model.noncausal.num_heads": 1,
    "model.noncausal.feedforward_dim": 1, "model.noncausal.dropout": 0, "model.predictor.context_size": 1,
    "model.predictor.num_heads": 1, "model.predictor.embedding_dim": 1, "model.predictor.hidden_dim": 1,
    "model.predictor.num_layers": 1, "model.predictor.dropout": 0,
    "loss.prune_range": 2, "loss.lm_scale": 0, "loss.am_scale": 0, "loss.simple_scale": 0, "loss.warmup_steps": 0,
    "loss.delay_penalty": 0, "loss.causal_weight": 0, "loss.ctc_scale": 0,
    "distillation.weight": 0, "distillation.temperature": 1e-3,
    "training.num_epochs": 1, "training.learning_rate": 0, "training.muon_learning_rate": 0,
    "training.max_bad_steps": 1, "training.warmup_steps": 0, "training.average_last": 1,
    "training.keep_epochs": 1, "training.log_every_steps": 1, "training.max_grad_norm": 0,
    "training.validate_every_epochs": 1, "training.final_lr_share": 0, "training.weight_decay": 0, "training.beta2": 0,
    "training.save_every_minutes": 0,
}

_AT_MOST = {
    "data.max_quarantine_share": 1, "augment.share": 1, "augment.max_time_mask_share": 1, "augment.noise_share": 1,
    "augment.rir_share": 1, "model.causal.dropout": 0.9, "model.noncausal.dropout": 0.9, "model.predictor.dropout": 0.9,
    "loss.lm_scale": 1, "loss.am_scale": 1, "loss.causal_weight": 1, "training.final_lr_share": 1,
}

_LESS_THAN = {"training.beta2": 1}

_LARGEST_INT = 2**31 - 1
_MAY_BE_INFINITE = {"data.max_duration", "data.batch_duration", "training.max_grad_norm", "training.save_every_minutes"}

# Whether a training in --exp-dir starts over when an option has another value than before. Every option stands in one
# of these two tables, below its section: a new one belongs into the first if it changes a single number of a training.
STARTS_OVER = {
    "": "seed",
    "features": "sampling_rate num_mel_bins",
    "data": "speed_factors batch_duration num_buckets sorted_epochs",
    "augment": "num_time_masks time_mask_frames max_time_mask_share num_freq_masks freq_mask_bins time_warp_frames "
               "share vtlp_factor noise_share noise_snr_db",
    "model": "d_model subsampling_channels joiner_dim",
    "model.causal": "kind num_layers num_heads feedforward_dim kernel_size convolution dropout",
    "model.noncausal": "kind num_layers num_heads feedforward_dim kernel_size convolution dropout",
    "model.predictor": "kind context_size num_heads embedding_dim hidden_dim num_layers dropout",
    "context": "chunk_frames left_chunks block_chunks",
    "loss": "prune_range lm_scale am_scale simple_scale warmup_steps rnnt_type delay_penalty causal_weight "
            "pass_sampling ctc_scale",
    "distillation": "weight kind ranges cell_weight temperature init_from_teacher",
    "training": "optimizer learning_rate muon_learning_rate warmup_steps final_lr_share weight_decay beta2 "
                "max_grad_norm",
}
GOES_ON = {
    "features": "extractor",  # both give the same features
    # Only earlier stages read these; what came of it is in their files, which a run compares too.
    "tokens": "kind vocab_size byte_fallback case normal_form strip_punctuation",
    "data": "min_duration max_duration max_quarantine_share num_workers",
    "augment": "rir_share",
    # max_bad_steps matters where training diverges, from there on. The last two: epochs are added, or those that are
    # there averaged anew.
    "training": "keep_epochs log_every_steps save_every_minutes validate_every_epochs max_bad_steps num_epochs "
                "average_last",
    "decoding": "blank_penalty",  # written into the models that are there
}


def starts_over(name: str) -> bool:
    """Whether another value of this option, "section.key", makes another training."""
    section, _, option = name.rpartition(".")
    if option in GOES_ON.get(section, "").split():
        return False
    assert option in STARTS_OVER.get(section, "").split(), f"{name} is in neither table"
    return True


def _get(config: Any, name: str) -> Any:
    value = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a config with its option's name."""
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)):
                yield name, number


def _beyond_bounds(config: Any) -> str | None:
    """What is wrong with the first number that is too small, too large or none."""
    for name, bound in _AT_LEAST.items():
        value = _get(config, name)
        if value is not None and not value >= bound:
            return f"{name} must be at least {bound}, got {value}"
    for name, bound in _AT_MOST.items():
        value = _get(config, name)
        if value is not None and not value <= bound:
            return f"{name} must be at most {bound}, got {value}"
    for name, bound in _LESS_THAN.items():
        value = _get(config, name)
        if not value < bound:
            return f"{name} must be less than {bound}, got {value}"
    for name, value in _numbers(config):
        if isinstance(value, int) and value > _LARGEST_INT:
            return f"{name} must be at most {_LARGEST_INT}, got {value}"
        if name not in _MAY_BE_INFINITE and not math.isfinite(value):
            return f"{name} must be a finite number, got {value}"
    return None


def first_problem(config: Any) -> str | None:
    """One sentence that names an option, its value and what is allowed; None when all is well.

    config: a `cascade.config.Config`.
    """
    for name, choices in _CHOICES.items():
        value = _get(config, name)
        if value is not None and value not in choices:
            return f"{name} must be one of {' | '.join(choices)}, got {value!r}"
    problem = _beyond_bounds(config)
    if problem is not None:
        return problem
    for name in ("causal", "noncausal"):
        encoder = getattr(config.model, name)
        head_dim, rest = divmod(config.model.d_model, encoder.num_heads)
        if rest or head_dim % 2:
            return (
                f"model.d_model / model.{name}.num_heads must be an even whole number, "
                f"got {config.model.d_model} / {encoder.num_heads}"
            )
        if encoder.kernel_size < 1 or encoder.kernel_size % 2 == 0:
            return f"model.{name}.kernel_size must be odd, got {encoder.kernel_size}"
    for name in ("chunk_frames", "left_chunks", "block_chunks"):
        values = getattr(config.context, name)
        if not values:
            return f"context.{name} must list at least one value"
        all_allowed = name != "chunk_frames"
        if any(value < 1 and not (value == -1 and all_allowed) for value in values):
            return f"context.{name} must hold positive numbers{' or -1' * all_allowed}, got {values}"
    if -1 not in config.context.block_chunks:
        return "context.block_chunks must include -1 (the whole utterance), the full mode needs it"
    if not config.data.speed_factors or any(not 0.5 <= factor <= 2.0 for factor in config.data.speed_factors):
        return f"data.speed_factors must lie between 0.5 and 2.0, got {config.data.speed_factors}"
    snr = config.augment.noise_snr_db
    if len(snr) != 2 or not -40 <= snr[0] <= snr[1] <= 80:
        return f"augment.noise_snr_db must be two numbers from -40 to 80, the lower one first, got {snr}"
    factors = config.augment.vtlp_factor
    if len(factors) != 2 or not 0.5 <= factors[0] <= factors[1] <= 2.0:
        return f"augment.vtlp_factor must be two numbers from 0.5 to 2.0, the lower one first, got {factors}"
    if config.training.keep_epochs < config.training.average_last:
        return (
            f"training.keep_epochs ({config.training.keep_epochs}) must be at least "
            f"training.average_last ({config.training.average_last})"
        )
    return None
