"""Several seeds: the table of runs.csv, mean and range of each arm, and the intervals of comparisons.json.

Both files are made by tools/run_arms.py and lie beside RESULTS.md; without them there is no such section.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from cascade.models.transducer import MODES
from cascade.report.markdown import table

RUNS, COMPARISONS = "runs.csv", "comparisons.json"


def seeds_section(folder: Path) -> str:
    """Markdown of the runs and comparisons in a folder; empty where there are none.

    Raises:
      ValueError: a file is damaged.
    """
    blocks = []
    if (path := folder / RUNS).is_file():
        try:
            with open(path, encoding="utf-8", newline="") as file:
                blocks.append(_runs_table(list(csv.DictReader(file))))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is damaged ({error}): make it again with tools/run_arms.py") from error
    if (path := folder / COMPARISONS).is_file():
        try:
            blocks.append(_comparisons_table(json.loads(path.read_text(encoding="utf-8"))))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): make it again with tools/run_arms.py") from error
    return "## Arms and seeds\n\n" + "\n\n".join(blocks) if blocks else ""


def _runs_table(runs: Sequence[dict[str, str]]) -> str:
    method = "beam" if all(run[f"wer_{mode}_beam"] for run in runs for mode in MODES) else "greedy"
    columns = ("dev_loss", "dev_cer", *(f"wer_{mode}_{method}" for mode in MODES))
    arms: dict[str, list[dict[str, str]]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    rows = [
        [
            name, each[0]["note"], f"{int(each[0]['num_params']) / 1e6:.2f}", each[0]["steps"], str(len(each)),
            *(_mean_and_range([float(run[column]) for run in each]) for column in columns),
        ]
        for name, each in arms.items()
    ]  # fmt: skip
    test_set, commits = runs[0]["test_set"], ", ".join(dict.fromkeys(run["commit"] for run in runs))
    header = ["arm", "what", "params M", "steps", "seeds", "dev loss", "dev CER %", *MODES]
    return (
        f"Word error rate, %, on `{test_set}`, {method} search: mean over seeds (lowest to highest). Dev loss and dev "
        "character error rate are pooled over the passes. `arms.yaml` has the options of each arm; commit "
        f"{commits}.\n\n"
        + table(header, rows, left=2)
    )


def _mean_and_range(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def _comparisons_table(comparisons: Sequence[dict]) -> str:
    rows = [
        [
            f"{row['b']} against {row['a']}", str(len(row["seeds"])), f"{row['wer_a']:.2f}", f"{row['wer_b']:.2f}",
            _interval(row["difference"], row["over_utterances"], "", "+.2f"),
            _interval(row["difference"], row["over_speakers"], "", "+.2f"),
            _interval(row["relative"], row["over_utterances"], "relative_", "+.1f"),
        ]
        for row in comparisons
    ]  # fmt: skip
    points = ("points [over utterances]", "points [over speakers]")
    header = ["", "seeds", "WER before", "WER after", *points, "relative %"]
    return (
        "Differences, all passes and seeds pooled, with 95 % intervals of the paired bootstrap, which vary the test "
        "set and not the training.\n\n"
        + table(header, rows)
    )


def _interval(value: float | None, interval: dict | None, kind: str, digits: str) -> str:
    if value is None or interval is None or interval[f"{kind}low"] is None:
        return "-"
    return f"{value:{digits}} [{interval[f'{kind}low']:{digits}}, {interval[f'{kind}high']:{digits}}]"
