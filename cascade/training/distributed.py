"""Several processes under torchrun; one process without it. Sums travel, never means."""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed, nn

from cascade.training.launch import EXIT_PEER_LOST, is_worker


class Processes:
    """This process among the others that train the same model."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    @classmethod
    def from_environment(cls) -> Processes:
        """Join the group that torchrun describes in RANK and WORLD_SIZE; a lone process without them."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(distributed.get_rank(), world_size)

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_first(self) -> bool:
        """The one that writes files."""
        return self.rank == 0

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Each number added up over the processes."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        self.sum_in_place(tensor)
        return tensor.tolist()

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Add a tensor up over the processes."""
        if self.world_size > 1:
            _all_reduce(tensor)

    def sum_gradients(self, model: nn.Module) -> None:
        """Add every gradient up over the processes; a missing one counts as zero."""
        if self.world_size == 1:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        _all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def barrier(self) -> None:
        self.sum([0.0], self.device)

    def close(self) -> None:
        if self.world_size > 1:
            distributed.destroy_process_group()


def _all_reduce(tensor: torch.Tensor) -> None:
    try:
        distributed.all_reduce(tensor)
    except RuntimeError as error:  # gloo's and NCCL's words for a connection that broke
        if is_worker():
            sys.exit(EXIT_PEER_LOST)
        raise OSError(f"another process of this training ended, its error says why ({error})") from error
