"""How much memory a model needs that decodes one stream, each measured in a fresh process.

`python -m cascade.measure.memory JSON` is that process: it loads the model, streams for a while on one thread and
prints {"peak_memory_mb", "process_memory_mb"}: the peak resident set above what the libraries take, and all of it.
MB = 10^6 bytes.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade.checkpoint import load_model
from cascade.config.load import load_config
from cascade.config.options import ENCODER_FRAME_MS
from cascade.measure.compute import TimedModel, chunk_runner
from cascade.models.build import build_model
from cascade.models.prepack import prepack

_NUM_CHUNKS = 60
_NOISE_FRAMES = 2000
_MEGABYTE = 1e6
Spec = dict[str, Any]
"""{"exp_dir": folder} or {"config": [YAML files], "overrides": [section.key=value]}: random weights; in both
"blank_penalty": the one in force."""


def measure_memory(specs: Sequence[Spec], chunk_ms: int, left_context_ms: int) -> list[dict[str, float | None]]:
    """What each model needs, in `specs`' order; None, with a warning, where it cannot be found out."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    contexts = {"chunk_ms": chunk_ms, "left_ms": left_context_ms}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, json.dumps(spec | contexts)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for spec in specs
    ]  # fmt: skip
    found = []
    for process in processes:
        out, error = process.communicate()
        if process.returncode == 0:
            found.append(json.loads(out))
        else:
            last_line = (error.strip() or "no message").splitlines()[-1]
            logging.warning("memory was not measured: the process for it failed (%s)", last_line)
            found.append({"peak_memory_mb": None, "process_memory_mb": None})
    return found


def resident_bytes() -> tuple[int, int]:
    """This process's resident set, now and at its peak; where the system tells only the peak, that twice."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return now, peak
    import resource  # Windows lacks it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def stream_once(spec: Spec) -> None:
    """Load the model and let one stream of noise run."""
    if "exp_dir" in spec:
        model, config, tokenizer = load_model(spec["exp_dir"])
        unk_id, paced = tokenizer.unk_id, False
    else:
        config = load_config(spec["config"], spec["overrides"])
        model, unk_id, paced = build_model(config, config.tokens.vocab_size).eval(), None, True
    spread = torch.randn(_NOISE_FRAMES, config.features.num_mel_bins, generator=torch.Generator().manual_seed(0))
    features = model.encoder.feature_mean + spread / model.encoder.feature_scale
    timed = TimedModel("", prepack(model), features, unk_id, spec["blank_penalty"], paced)
    run = chunk_runner(timed, spec["chunk_ms"] // ENCODER_FRAME_MS, spec["left_ms"] // ENCODER_FRAME_MS)
    for _ in range(_NUM_CHUNKS):
        run()


def main() -> None:
    torch.set_num_threads(1)
    before, _ = resident_bytes()
    stream_once(json.loads(sys.argv[1]))
    _, peak = resident_bytes()
    megabytes = {"peak_memory_mb": (peak - before) / _MEGABYTE, "process_memory_mb": peak / _MEGABYTE}
    print(json.dumps({name: round(value, 1) for name, value in megabytes.items()}))


if __name__ == "__main__":
    main()
