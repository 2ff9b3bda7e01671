"""Linear layers laid out once for the CPU's matrix kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrepackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's own blocks: (..., C_in) -> (..., C_out), float32, inference only.

    A plain layer's weight is laid out anew in every call, which for the 8 frames of a chunk costs as much as the
    product itself. torch.compile's CPU back end calls the same two operators.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)  # parameters, so that they are counted
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def prepack(model: nn.Module) -> nn.Module:
    """Replace every `nn.Linear` behind `model.encoder`, and the joiner's projection of its output, in place.

    Changes rounding only. The model can then be run, not trained, saved or exported. A model that is not float32 on
    the CPU stays as it is, and so does any where PyTorch comes without oneDNN.
    """
    weight = next(model.parameters())
    ready = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not ready or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return model
    # A plain weight is freed before the next layer's turn, so no list may hold a layer.
    for parent in [part for part in model.encoder.modules() if not isinstance(part, nn.Linear)] + [model.joiner]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not model.joiner.output:
                setattr(parent, name, PrepackedLinear(child))
    return model
