"""The delay penalty in training: what is rewarded is said earlier."""

import pytest
import torch

from cascade.losses.transducer import transducer_loss

FRAMES, LABELS, WIDTH, VOCABULARY = 20, 3, 8, 5


def train(penalty, rnnt_type):
    """Fit encoder frames and joiner to one utterance whose labels may stand anywhere; the mean frame of the labels."""
    torch.manual_seed(3)
    parts = {
        "encoder": 0.1 * torch.randn(1, FRAMES, WIDTH), "predictor": torch.randn(1, LABELS + 1, WIDTH),
        "weight": torch.randn(VOCABULARY, WIDTH), "bias": torch.zeros(VOCABULARY),
        "am": 0.1 * torch.randn(1, FRAMES, VOCABULARY), "lm": torch.randn(1, LABELS + 1, VOCABULARY),
    }  # fmt: skip
    for tensor in parts.values():
        tensor.requires_grad_()
    symbols, boundary = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, LABELS, FRAMES]])

    def loss(penalty):
        return transducer_loss(
            **parts, symbols=symbols, boundary=boundary, prune_range=LABELS + 1, lm_scale=0.0, am_scale=0.0,
            rnnt_type=rnnt_type, delay_penalty=penalty,
        )

    optimizer = torch.optim.Adam(parts.values(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        out = loss(penalty)
        (out.simple + out.pruned).sum().backward()
        optimizer.step()
    with torch.no_grad():  # the posterior that the trained model itself gives: no penalty
        out = loss(0.0)
    # The sum over frames of P(label u is not yet said) is the mean frame of label u.
    occupancy = torch.zeros(FRAMES, LABELS + 1).scatter_add_(1, out.ranges[0], out.occupancy[0])
    occupancy = occupancy / occupancy.sum(dim=1, keepdim=True)
    not_yet = occupancy.cumsum(dim=1)[:, :LABELS]  # (T, U)
    return float(not_yet.sum(dim=0).mean())


@pytest.mark.parametrize("rnnt_type", ["regular", "modified"])
def test_trained_model_speaks_earlier_the_larger_the_penalty(rnnt_type):
    frames = [train(penalty, rnnt_type) for penalty in (0.0, 0.02, 0.1, 0.5)]
    assert frames == sorted(frames, reverse=True) and len(set(frames)) == 4, frames
    assert frames[0] - frames[-1] > 1, frames
