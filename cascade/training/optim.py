"""Muon for the encoders' matrices, AdamW for the rest, and the learning-rate schedule of both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cascade.config.options import TrainingConfig
from cascade.device import takes_bfloat16

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients of the quintic iteration: fast to near 1 from small singular values, not exact (Jordan et al. 2024)."""


def orthogonalise(matrices: Tensor, num_rounds: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly: singular values between about 0.7 and 1.2, directions kept.

    X <- Q X, Q = a I + b A + c A A with A = X X^T, from X = M / (|M| + 1e-7). Every Q is a polynomial of the first A:
    wide matrices are multiplied once, by the product of all Q, and A <- Q A Q follows X from round to round. In
    bfloat16 A drifts away from X, and the smallest values from 0 up, within four such rounds: X is multiplied and A
    computed again after three.

    Args:
      matrices: (M, rows, columns) with rows <= columns, so that A is the smaller product.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    if 2 * x.shape[1] > x.shape[2]:  # nearly square: as many products either way, and these are simpler
        for _ in range(num_rounds):
            gram = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    at_once = 3 if x.dtype == torch.bfloat16 else num_rounds
    for done in range(0, num_rounds, at_once):
        gram, product = x @ x.transpose(1, 2), None
        for left in reversed(range(min(at_once, num_rounds - done))):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
            gram = factor @ gram @ factor if left else gram
        x = product @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (https://kellerjordan.github.io/posts/muon): every direction of a matrix learns alike.

        m = lerp(m, g, 1 - mu);  u = lerp(g, m, mu);  W -= lr sqrt(max(1, rows / columns)) orthogonalise(u)

    Weight decay is decoupled. A parameter without a gradient is left alone. torch.optim.Muon orthogonalises in
    bfloat16, which is slow on CPUs without it, and one matrix at a time; here all matrices of one shape go together.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95,
        rank: int = 0, world_size: int = 1, add_up: Callable[[Tensor], None] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
          parameters: matrices (rows, columns).
          rank, world_size, add_up: several processes with equal gradients orthogonalise a part each; `add_up` sums a
            tensor over them in place.
          dtype: in which they orthogonalise; None = in that of the parameters.
        """
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._rank, self._world_size, self._add_up = rank, world_size, add_up
        self._dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stacks: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                update = update.T if update.shape[0] > update.shape[1] else update  # the wide side last
                stacks[update.shape].append((parameter, update))
            for (parameter, _), update in zip(
                (pair for stack in stacks.values() for pair in stack), self._orthogonal(stacks), strict=True
            ):
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = update.T if rows > columns else update
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _orthogonal(self, stacks: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]]) -> list[Tensor]:
        """Orthogonalised updates in the order of the stacks; of several processes each computes a share."""
        results = []
        for stack in stacks.values():
            updates = torch.stack([update for _, update in stack])
            if self._world_size > 1:
                shared = torch.zeros_like(updates)
                mine = slice(self._rank, None, self._world_size)
                if len(updates[mine]):
                    shared[mine] = orthogonalise(updates[mine].to(self._dtype)).to(updates)
                results.append(shared)
            else:
                results.append(orthogonalise(updates.to(self._dtype)).to(updates))
        if self._world_size > 1 and results:
            flat = torch.cat([result.flatten() for result in results])
            self._add_up(flat)
            parts = flat.split([result.numel() for result in results])
            results = [part.view_as(result) for part, result in zip(parts, results, strict=True)]
        return [update for result in results for update in result]


class Optimizer:
    """Optimizer of a model: one or two, with one schedule; looks like one to who saves and resumes it."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        for group in self.groups:
            group["peak"] = group["lr"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, rate: float) -> None:
        """One step at `rate` times the peak learning rates."""
        for group in self.groups:
            group["lr"] = rate * group["peak"]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        parts = values.get("parts", [values])  # before Muon there was AdamW alone
        for part, state in zip(self.parts, parts, strict=True):
            peaks = [group["peak"] for group in part.param_groups]
            part.load_state_dict(state)
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["peak"] = peak


def build_optimizer(
    model: nn.Module, config: TrainingConfig, rank: int = 0, world_size: int = 1,
    add_up: Callable[[Tensor], None] | None = None,
) -> Optimizer:
    """AdamW, or Muon for the encoders' matrices and AdamW for everything else; matrices decay, vectors do not."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    muon = [p for name, p in named if config.optimizer == "muon" and name.startswith("encoder.") and p.ndim == 2]
    taken = {id(parameter) for parameter in muon}
    rest = [parameter for _, parameter in named if id(parameter) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), eps=1e-8, fused=True)
    ]
    if muon:
        dtype = torch.bfloat16 if takes_bfloat16(config.precision, muon[0].device) else None
        parts.append(Muon(
            muon, config.muon_learning_rate, config.weight_decay, rank=rank, world_size=world_size, add_up=add_up,
            dtype=dtype,
        ))
    return Optimizer(parts)


def rate_share(config: TrainingConfig, step: int, progress: float) -> float:
    """The learning rate as a share of its peak: a linear warm-up over `warmup_steps`, times a cosine from 1 to
    final_lr_share over the run (progress 0 to 1)."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warmup * (config.final_lr_share + (1 - config.final_lr_share) * cosine)
