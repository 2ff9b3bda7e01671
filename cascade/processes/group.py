"""Several processes that train one model, under torchrun or `launch`. Sums travel, never means.

Not torch's DistributedDataParallel: it averages per-rank means, where the mean over all tokens and lattice cells is
wanted; it sums inside of the backward pass, where a process that runs out of memory leaves the others waiting for ever;
and it makes a gradient of zeros where there is none (a pass that is not drawn), which the optimizers take for one.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from cascade.device import choose_device
from cascade.processes.exits import EXIT_PEER_LOST
from cascade.processes.launch import is_worker, seconds_from_environment, start_heartbeat


def group_timeout() -> timedelta:
    """Patience of a collective, CASCADE_GROUP_TIMEOUT seconds (600): for a machine that vanishes without closing its
    connections, or a process that waits for ever. It must be longer than what one process does alone, such as writing
    a checkpoint. A process that ends is noticed at once, on one machine one that stands still too (launch.py).

    Raises:
      ConfigError: the variable is not a number.
    """
    return timedelta(seconds=seconds_from_environment("CASCADE_GROUP_TIMEOUT", 600) or 600)



class Processes:
    """Group of processes that train one model, seen from one of them."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)

    @classmethod
    def from_environment(cls, device_choice: str = "auto") -> Processes:
        """Join the group that torchrun describes in RANK and WORLD_SIZE; a lone process without them.

        Args:
          device_choice: auto | cpu | cuda; on GPUs each process of this machine has its own.
        Raises:
          ConfigError, ValueError: as `choose_device`, before the group is joined.
        """
        world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        # Workers of --num-processes are all on this machine; who else starts processes without LOCAL_WORLD_SIZE may
        # have more machines.
        num_local = world_size if is_worker() else int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        device = choose_device(device_choice, num_local, local_rank)
        if world_size == 1:
            return cls(device=device)
        if is_worker():
            start_heartbeat()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=group_timeout())
        return cls(distributed.get_rank(), world_size, device)

    @property
    def is_first(self) -> bool:
        """The one that writes files."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each number added up over the processes."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_in_place(tensor)
        return tensor.tolist()

    def max(self, value: float) -> float:
        """The largest of the processes' numbers."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        self._together(distributed.all_reduce, tensor, distributed.ReduceOp.MAX)
        return float(tensor)

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Add a tensor up over the processes."""
        if self.world_size > 1:
            self._together(distributed.all_reduce, tensor)

    def sum_gradients(self, model: nn.Module) -> None:
        """Add every gradient up over the processes. Each has a batch and the same passes, so all have the same ones."""
        if self.world_size == 1:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        self.sum_in_place(flat)
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def gather(self, value: Any) -> list[Any]:
        """The processes' values (builtin types), in the order of their ranks, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        self._together(distributed.all_gather_object, values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value (builtin types and tensors) on every process."""
        if self.world_size == 1:
            return value
        values = [value if self.is_first else None]
        self._together(distributed.broadcast_object_list, values)
        return values[0]

    def barrier(self) -> None:
        self.sum([0.0])

    def close(self) -> None:
        if self.world_size > 1:
            distributed.destroy_process_group()

    @staticmethod
    def _together(operation: Any, *arguments: Any) -> None:
        try:
            operation(*arguments)
        except RuntimeError as error:  # gloo's and NCCL's words for a connection that broke
            if is_worker():
                sys.exit(EXIT_PEER_LOST)
            raise OSError(f"another process of this training ended, its error says why ({error})") from error
