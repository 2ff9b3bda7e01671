"""Models built from configs, and their numbers of parameters."""

from __future__ import annotations

from torch import nn

from cascade.config.options import Config
from cascade.models.transducer import CascadedTransducer


def build_model(config: Config, vocab_size: int) -> CascadedTransducer:
    """A model with fresh random weights (from torch's global generator) for `vocab_size` tokens, blank included."""
    return CascadedTransducer(config.model, vocab_size, config.features.num_mel_bins)


def count_params(module: nn.Module) -> int:
    """Parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def params_by_part(model: CascadedTransducer) -> dict[str, int]:
    """Parameters that decoding needs, by part: a tied matrix counts once, under the joiner; `total` is the sum."""
    parts = {
        "front end": count_params(model.encoder.subsampling),
        "causal encoder": count_params(model.encoder.causal),
        "non-causal encoder": count_params(model.encoder.noncausal),
        "predictor": count_params(model.predictor),
        "joiner": count_params(model.joiner),
    }
    return parts | {"total": sum(parts.values())}
