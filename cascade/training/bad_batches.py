"""Batches of steps that could not be taken, kept so that the cause can be found."""

from __future__ import annotations

import json
from pathlib import Path

from cascade.checkpoint import FORMAT, save_file
from cascade.data.batches import Batch
from cascade.training.step import StepResult

MOST_FILES = 50
"""Of each process; what comes later is only listed."""


def save_bad_batch(exp_dir: Path, batch: Batch, step: int, rank: int, result: StepResult) -> Path:
    """Write EXP/bad_batches/step-N-rank-R.pt (features, tokens, ids and texts of a process's batch) and a line in
    ids-rank-R.jsonl; returns the folder.

    torch.load(FILE, weights_only=True) reads it.
    """
    folder = exp_dir / "bad_batches"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"step": step, "problem": result.problem, "non_finite": result.non_finite, "ids": batch.ids}
    with open(folder / f"ids-rank-{rank}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metadata, ensure_ascii=False) + "\n")
    if len(list(folder.glob(f"step-*-rank-{rank}.pt"))) < MOST_FILES:
        values = {"format": FORMAT, **metadata, **vars(batch)}
        save_file(values, folder / f"step-{step}-rank-{rank}.pt")
    return folder
