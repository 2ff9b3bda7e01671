"""The whole recogniser: cascaded encoder, one predictor and one joiner. No loss and no search in here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade.config.options import MODES, Mode, ModelConfig
from cascade.models.cascaded_encoder import CascadedEncoder
from cascade.models.joiner import Joiner
from cascade.models.predictor import build_predictor


class TrainingHeads(nn.Module):
    """Linear heads that only training needs: the simple (pruning) transducer and CTC."""

    def __init__(self, d_model: int, joiner_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.simple_am = nn.Linear(d_model, vocab_size)
        self.simple_lm = nn.Linear(joiner_dim, vocab_size)
        self.ctc = nn.ModuleDict({name: nn.Linear(d_model, vocab_size) for name in ("causal", "noncausal")})


class CascadedTransducer(nn.Module):
    """One checkpoint, three ways to decode: streaming, look_ahead and full."""

    def __init__(self, config: ModelConfig, vocab_size: int, num_mel_bins: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.encoder = CascadedEncoder(config, num_mel_bins)
        self.joiner = Joiner(config.d_model, config.joiner_dim, vocab_size)
        self.predictor = build_predictor(config.predictor, self.joiner.output)
        self.heads = TrainingHeads(config.d_model, config.joiner_dim, vocab_size)

    @property
    def device(self) -> torch.device:
        """The device that the model, and its features, are on."""
        return self.encoder.feature_mean.device

    def encode(
        self, features: Tensor, feature_lens: Tensor, mode: Mode, chunk_frames: int | None,
        left_frames: int | None, block_frames: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Whole utterances through one pass, ready for the joiner.

        Args:
          features: (N, T, F) log-mel fbank, not normalised.
          feature_lens: (N,) valid frames.
          mode: streaming (causal pass), look_ahead (non-causal pass in blocks), full (non-causal pass over all).
          chunk_frames, left_frames, block_frames: C, L, B in 40 ms frames; None = all. C holds in every mode.
        Returns:
          (N, T // 4, D) projected encoder output and its (N,) lengths.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {' | '.join(MODES)}, got {mode!r}")
        if mode == "look_ahead" and block_frames is None:
            raise ValueError("mode look_ahead needs block_frames; the whole utterance is mode full")
        out, lens = self.encoder.forward_causal(features, feature_lens, chunk_frames, left_frames)
        if mode != "streaming":
            block = block_frames if mode == "look_ahead" else None
            out = self.encoder.forward_noncausal(out, lens, block, left_frames)
        return self.joiner.project_encoder(out), lens
