"""The commands that a recipe would run, from a copy of it whose Python only notes them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAKES = {
    "tools/setup.sh": '#!/bin/sh\necho "$FAKE"\n',
    # Called as python tools/run_stage.py --stamp FILE ... -- python WORD...
    "python": '#!/bin/bash\nwords="$*"\necho "${words#* -- python }" >>"$LOG"\n',
}


def commands_of(recipe: str, folder: Path, *options: str, tests: tuple[str, ...] = ("test",)) -> list[str]:
    """Run egs/RECIPE in `folder`, as egs/books; one line per command, without its `python`."""
    for name, text in FAKES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    shutil.copy(ROOT / "tools" / "recipe.sh", folder / "tools")
    shutil.copytree(ROOT / "egs" / recipe, folder / "egs" / "books", ignore=shutil.ignore_patterns("exp", "download"))
    manifests = folder / "egs" / "books" / "exp" / ("quick" if "--quick" in options else "") / "manifests"
    manifests.mkdir(parents=True)
    for split in ("train", "dev", *tests):
        (manifests / f"{split}.jsonl").touch()
    environment = {**os.environ, "LOG": str(folder / "log"), "FAKE": str(folder / "python")}
    done = subprocess.run(
        [folder / "egs" / "books" / "run.sh", *options], cwd=folder, capture_output=True, text=True, timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_text().splitlines()
