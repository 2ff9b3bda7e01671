"""The one mask rule of both encoders.

With block size P (the causal chunk C, or the look-ahead block B) and s(i) = floor(i / P) * P, frame i sees j iff
max(0, s(i) - L) <= j < min(T, s(i) + P). For T = 7, P = 2, L = 2 (1 = sees):

    i\\j 0 1 2 3 4 5 6
    0   1 1
    1   1 1
    2   1 1 1 1
    3   1 1 1 1
    4       1 1 1 1
    5       1 1 1 1
    6           1 1 1
"""

from __future__ import annotations

import torch
from torch import Tensor


def padding_mask(lens: Tensor, num_frames: int) -> Tensor:
    """(N,) lengths -> (N, T) bool, True = padded."""
    return torch.arange(num_frames, device=lens.device) >= lens.unsqueeze(1)


def block_attention_mask(lens: Tensor, num_frames: int, block: int | None, left: int | None) -> Tensor:
    """Which frame may attend to which, as `scaled_dot_product_attention` wants it.

    Args:
      lens: (N,) valid frames.
      num_frames: T.
      block: P in frames; None = the whole utterance.
      left: L in frames; None = everything before the block.
    Returns:
      (N, 1, T, T) bool, True = may attend. A padded frame sees itself only, which keeps its softmax finite.
    """
    frames = torch.arange(num_frames, device=lens.device)
    seen = ~padding_mask(lens, num_frames).unsqueeze(1)  # (N, 1, T)
    if block is not None:
        start = frames // block * block
        allowed = frames < (start + block).unsqueeze(1)  # (T, T)
        if left is not None:
            allowed = allowed & (frames >= (start - left).unsqueeze(1))
        seen = seen & allowed
    itself = frames == frames.unsqueeze(1)
    return (seen | itself).unsqueeze(1)


def chunk_attention_mask(
    processed_lens: Tensor, chunk_lens: Tensor, num_frames: int, left: int, chunk: int | None = None
) -> Tensor:
    """The same rule for one chunk behind a cache of `left` frames, for streams of different age.

    Args:
      processed_lens: (N,) frames each stream has been through; the cache ends with min(processed, left) of them.
      chunk_lens: (N,) valid frames of this chunk.
      num_frames: frames of the chunk, padding included.
      left: frames the cache has room for.
      chunk: P where the frames are several chunks; None = they are one.
    Returns:
      (N, 1, num_frames, left + num_frames) bool, True = may attend.
    """
    window = torch.arange(left + num_frames, device=processed_lens.device)
    first = left - processed_lens.clamp(max=left)
    seen = (window >= first.unsqueeze(1)) & (window < left + chunk_lens.unsqueeze(1))  # (N, L + C)
    itself = window == left + torch.arange(num_frames, device=window.device).unsqueeze(1)  # (C, L + C)
    mask = (seen.unsqueeze(1) | itself).unsqueeze(1)
    if chunk is None:
        return mask
    start = (torch.arange(num_frames, device=window.device) // chunk * chunk).unsqueeze(1)
    return mask & (window >= start) & (window < start + left + chunk)
