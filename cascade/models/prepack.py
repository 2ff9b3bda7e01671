"""Linear layers laid out once for the CPU's matrix kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrepackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's own blocks: (..., C_in) -> (..., C_out), float32, inference only.

    For large layers and the 8 frames of a chunk it is faster than a plain layer, which calls the BLAS library.
    torch.compile's CPU back end calls the same two operators.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)  # parameters, so that they are counted
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def prepack(model: nn.Module, least_weights: int = 1 << 17) -> nn.Module:
    """Replace the large linear layers of `model.encoder.causal`, which sees chunks of one length, in place.

    Changes rounding only. The model can then be run, not trained, saved or exported. oneDNN keeps something for every
    number of rows, so the full pass and its segments of any length are left alone. A model that is not float32 on the
    CPU stays as it is, and so does any where PyTorch comes without oneDNN.

    Args:
      least_weights: smaller layers, where a call's fixed cost outweighs the gain, stay as they are.
    """
    weight = next(model.parameters())
    ready = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not ready or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return model
    # A plain weight is freed before the next layer's turn, so no list may hold a layer.
    for parent in [part for part in model.encoder.causal.modules() if not isinstance(part, nn.Linear)]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child.weight.numel() >= least_weights:
                setattr(parent, name, PrepackedLinear(child))
    return model
