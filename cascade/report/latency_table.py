"""The tables of `latency` on standard output."""

from __future__ import annotations

from typing import Any

import numpy as np


def print_compute(rows: list[dict[str, Any]]) -> None:
    """One line per model on stdout; the last column is p50 as a share of the first model's."""
    header = f"{'model':<20}{'params M':>9}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'RTF':>8}"
    print(header + f"{'memory MB':>11}{'symbols/s':>11}{'p50 ratio':>11}")
    for row in rows:
        ratio = row["chunk_compute_ms_p50"] / rows[0]["chunk_compute_ms_p50"]
        print(
            f"{row['model']:<20}{row['num_params'] / 1e6:>9.2f}{row['chunk_compute_ms_p50']:>9.2f}"
            f"{row['chunk_compute_ms_p95']:>9.2f}{row['chunk_compute_ms_p99']:>9.2f}{row['rtf']:>8.4f}"
            f"{row.get('peak_memory_mb') or np.nan:>11.1f}{row['symbols_per_second']:>11.1f}{ratio:>11.3f}"
        )


def print_delays(rows: list[dict[str, Any]]) -> None:
    """One line per model and mode on stdout: medians and 90th percentiles in ms."""
    if not rows:
        return
    columns = ("emission_delay_ms", "word_delay_ms", "final_delay_ms", "endpoint_delay_ms")
    titles = "".join(f"{name.removesuffix('_ms').replace('_', ' '):>18}" for name in columns)
    print(f"\n{'p50 / p90 in ms':<34}{titles}{'+ compute':>11}")
    for row in rows:
        for mode, delays in row["delays"]["modes"].items():
            cells = "".join(f"{_cell(delays, name):>18}" for name in columns)
            print(f"{row['model']:<20}{mode:<14}{cells}{delays['final_compute_ms_p50'] or np.nan:>11.2f}")
    for row in rows:
        delays = row["delays"]
        print(
            f"{row['model']}: {delays['num_utterances']} utterances ({delays['reference']}), two_pass changes "
            f"{delays['num_changed_words']} of {delays['num_words']} words, {delays['flicker_per_minute']} a minute"
        )


def _cell(delays: dict[str, Any], name: str) -> str:
    return "-" if delays[f"{name}_p50"] is None else f"{delays[f'{name}_p50']:.0f} / {delays[f'{name}_p90']:.0f}"
