"""Collect what decoding, timing and training measured into rows; results.json keys.

An experiment directory holds teacher/, student_alone/ and student/, each with decode/**/result.json, latency.json,
train_summary.json, losses.jsonl and, if it was exported, export/export.json. `latency_full_size.json` beside them is
optional: a list of timed models of full size with random weights.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from cascade.config.options import Config
from cascade.models.build import count_params, params_by_part
from cascade.models.transducer import MODES, CascadedTransducer
from cascade.search.methods import METHODS

MODELS = ("teacher", "student_alone", "student")
_TRAINING_STAGE = {"teacher": 3, "student_alone": 4, "student": 5}
_DECODE_STAGE, _LATENCY_STAGE = 6, 7
_TIMED_KEYS = ("chunk_compute_ms_p50", "chunk_compute_ms_p95", "chunk_compute_ms_p99", "rtf")
_OPTIONAL_KEYS = ("peak_memory_mb", "process_memory_mb")
_FLICKER_KEYS = ("changed_words_percent", "flicker_per_minute")
_SUMMARY_KEYS = ("seed", "train_minutes")
Row = dict[str, Any]


def describe_model(model: CascadedTransducer, model_dir: Path | None, config: Config) -> Row:
    """Properties of a model for results.json.

    `size_bytes` counts the float32 tensors decoding needs, tied matrices once; a checkpoint that also holds training
    heads is larger.
    """
    parts = params_by_part(model)
    summary = _read_object(model_dir / "train_summary.json") if model_dir is not None else None
    return {
        "device": model.device.type,
        "num_params": parts["total"],
        "num_params_training": count_params(model) - parts["total"],
        "params_by_part": parts,
        "size_bytes": 4 * (parts["total"] + sum(buffer.numel() for buffer in _decoding_buffers(model))),
        "seed": (summary or {}).get("seed", config.seed),
        "train_minutes": (summary or {}).get("train_minutes"),
    }


def _decoding_buffers(model: nn.Module) -> list:
    persistent = model.state_dict()
    return [buffer for name, buffer in model.named_buffers() if name in persistent and not name.startswith("heads.")]


@dataclass(frozen=True)
class Experiment:
    """Results under an experiment directory."""

    rows: list[Row]
    """One per model, mode and method; keys of results.json."""
    latency: dict[str, Row]
    """Per model: latency.json."""
    summaries: dict[str, Row]
    """Per model: train_summary.json."""
    losses: dict[str, list[Row]]
    """Per model: the points of losses.jsonl."""
    full_size: list[Row]
    """Timed models of full size with random weights; the first one is the teacher."""
    exports: dict[str, Row]
    """Per model: export/export.json."""
    missing: list[str]
    """One sentence per missing piece, with the stage that makes it."""

    @property
    def test_set(self) -> str:
        """The set that most rows are of: what is said of one set alone is said of it."""
        return _main_test_set(self.rows)

    def find(self, model: str, mode: str, method: str, test_set: str | None = None) -> Row | None:
        """The row of this model, mode and method, without scores from outside."""
        key = (model, mode, method, test_set or self.test_set)
        return next((row for row in self.rows if _key(row) == key and not is_aided(row)), None)


def collect(exp_dir: Path) -> Experiment:
    """Read an experiment directory.

    Raises:
      FileNotFoundError: it does not exist or holds no decoding result at all.
      ValueError: a file in it is damaged, or two results are of one model, mode, method and test set.
    """
    if not exp_dir.is_dir():
        raise FileNotFoundError(f"no such experiment directory: {exp_dir}")
    rows, missing, found = [], [], {}
    latency, summaries, losses, exports = {}, {}, {}, {}
    for name in MODELS:
        model_dir = exp_dir / name
        summary, timed = _read_object(model_dir / "train_summary.json"), _read_object(model_dir / "latency.json")
        if summary is None:
            missing.append(f"{name} has not finished training: run stage {_TRAINING_STAGE[name]}")
        else:
            summaries[name] = summary
        if timed is None:
            missing.append(f"{name} has not been timed: run stage {_LATENCY_STAGE}")
        else:
            latency[name] = timed
        if (export := _read_object(model_dir / "export" / "export.json")) is not None:
            exports[name] = export
        losses[name] = _read_lines(model_dir / "losses.jsonl")
        for path in sorted(model_dir.glob("decode/**/result.json")):
            row = _complete(_checked(_read_object(path), path), name, summary, timed)
            if not is_aided(row) and (other := found.setdefault(_key(row), path)) != path:
                raise ValueError(
                    f"{other} and {path} are both of {name}, {row['mode']} {row['method']} on {row['test_set']}: move "
                    f"one out of {model_dir / 'decode'}"
                )
            rows.append(row)
    if not rows:
        raise FileNotFoundError(
            f"{exp_dir} holds no decoding result (result.json below {'/decode, '.join(MODELS)}/decode): "
            f"run stage {_DECODE_STAGE}"
        )
    test_set = _main_test_set(rows)
    for name in MODELS:
        pairs = product(MODES, METHODS)
        absent = [f"{mode} {method}" for mode, method in pairs if (name, mode, method, test_set) not in found]
        if absent:
            missing.append(f"{name} has not been decoded with {', '.join(absent)}: run stage {_DECODE_STAGE}")
    full_size = exp_dir / "latency_full_size.json"
    return Experiment(
        sorted(rows, key=_order), latency, summaries, losses,
        _read_json(full_size, list) if full_size.is_file() else [], exports, missing,
    )


def write_rows(rows: list[Row], path: Path) -> None:
    """Write results.json."""
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def ratio(experiment: Experiment, key: str, mode: str, method: str) -> float | None:
    """student / teacher of one key; None where a row or its value is missing or the teacher's is 0."""
    rows = [experiment.find(name, mode, method) for name in ("student", "teacher")]
    values = [None if row is None else row.get(key) for row in rows]
    return None if None in values or not values[1] else values[0] / values[1]


def _complete(row: Row, model: str, summary: Row | None, timed: Row | None) -> Row:
    """Add what other programs measured: training to every row, timing to the rows it was measured for."""
    row = dict(row, model=model)
    row.update({key: summary[key] for key in _SUMMARY_KEYS if summary is not None and key in summary})
    is_timed = row["mode"] == "streaming" and row["method"] == "greedy_search"
    if is_aided(row) or timed is not None and timed.get("blank_penalty", 0.0) != row.get("blank_penalty", 0.0):
        return row  # other searches: other text, another compute
    if timed is not None and is_timed and timed["chunk_ms"] == row["chunk_ms"]:
        row.update({key: timed[key] for key in _TIMED_KEYS})
        row.update({key: timed[key] for key in _OPTIONAL_KEYS if key in timed})
    if timed is not None and timed.get("delays") and row["method"] == "greedy_search":
        row.update(_delays(row, timed))
    return row


def _delays(row: Row, timed: Row) -> Row:
    """The delays of a row's mode, if they were measured with its contexts; the first pass tells how it is changed."""
    delays = timed["delays"]
    if timed["chunk_ms"] != row["chunk_ms"] or row["look_ahead_ms"] not in (None, timed["look_ahead_ms"]):
        return {}
    values = {key: value for key, value in delays["modes"][row["mode"]].items() if not key.endswith("_quantiles")}
    values["delay_reference"] = delays["reference"]
    if row["mode"] == "streaming":
        values |= {key: delays[key] for key in _FLICKER_KEYS}
    return values


def is_aided(row: Row) -> bool:
    """Tell whether external scores entered the search of a row."""
    return bool(row.get("ngram") or row.get("hotwords"))


def _key(row: Row) -> tuple:
    return row["model"], row["mode"], row["method"], row["test_set"]


def _order(row: Row) -> tuple:
    places = MODELS.index(row["model"]), MODES.index(row["mode"]), METHODS.index(row["method"])
    return row["test_set"], *places, is_aided(row), bool(row.get("rescore"))


def _main_test_set(rows: list[Row]) -> str:
    counts = Counter(row["test_set"] for row in rows)
    return min(counts, key=lambda name: (-counts[name], name))


def _checked(row: Row, path: Path) -> Row:
    """
    Raises:
      ValueError: the row lacks what every result of `decode` has.
    """
    if row.get("mode") not in MODES or row.get("method") not in METHODS or not {"test_set", "wer", "cer"} <= row.keys():
        raise ValueError(f"{path} is damaged (it is no result of decode): remove it and run its stage again")
    return row


def _read_object(path: Path) -> Row | None:
    return _read_json(path, dict) if path.is_file() else None


def _read_json(path: Path, kind: type) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged ({error}): remove it and run its stage again") from error
    if not isinstance(values, kind):
        raise ValueError(f"{path} is damaged (it holds no {kind.__name__}): remove it and run its stage again")
    return values


def _read_lines(path: Path) -> list[Row]:
    """The objects of a .jsonl file; a last line cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("}")]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): remove the line and run the report again") from error
