"""Running sums of losses, and the one place that writes them: log lines, losses.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cascade.processes.group import Processes


class Metrics:
    """Sums of (value, count) by name; `means` divides."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, sums: dict[str, tuple[float, float]]) -> None:
        for name, (value, count) in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + count

    def over(self, processes: Processes) -> Metrics:
        """The sums of all processes."""
        metrics = Metrics()
        for sums, counts in processes.gather((self.sums, self.counts)):
            metrics.add({name: (value, counts[name]) for name, value in sums.items()})
        return metrics

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / self.counts[name] for name in self.sums if self.counts[name]}


class MetricWriter:
    """Appends to losses.jsonl and TensorBoard; drops what a resumed run will write again."""

    def __init__(self, exp_dir: Path, resume_step: int) -> None:
        self.path = exp_dir / "losses.jsonl"
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resume_step]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.tensorboard = SummaryWriter(str(exp_dir / "tensorboard"), purge_step=resume_step)

    def write(self, split: str, epoch: int, step: int, means: dict[str, float]) -> None:
        row = {"step": step, "epoch": epoch, "split": split} | {name: round(mean, 6) for name, mean in means.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, mean in means.items():
            self.tensorboard.add_scalar(f"{split}/{name}", mean, step)
        shown = ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        logging.info("%s epoch %d step %d: %s", split, epoch, step, shown)

    def close(self) -> None:
        self.tensorboard.close()
