"""The section of several seeds, from the files that tools/run_arms.py leaves."""

import csv
import json

import pytest

from cascade.report.seeds import seeds_section

MODES = ("streaming", "look_ahead", "full")


def run(arm, seed, wer, beam=True):
    row = {"arm": arm, "note": f"the {arm}", "seed": seed, "num_params": 1_380_000, "steps": 2500, "dev_loss": 1.5}
    row |= {"dev_cer": 6.0, "test_set": "test", "commit": "abc1234"}
    return row | {f"wer_{mode}_{short}": wer if beam or short == "greedy" else ""
                  for mode in MODES for short in ("greedy", "beam")}  # fmt: skip


def write_runs(folder, *rows):
    with open(folder / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_means_and_ranges_are_those_of_the_runs(tmp_path):
    write_runs(tmp_path, run("g", 1, 5.0), run("e", 1, 8.0), run("g", 2, 6.0), run("g", 3, 8.5))
    section = seeds_section(tmp_path)
    (line,) = [line for line in section.splitlines() if line.startswith("| g ")]
    assert line.count("6.50 (5.00 to 8.50)") == 3 and "| the g | " in line and "|     3 |" in line
    assert "| 8.00 |" in " ".join(section.split()) and "beam search" in section


def test_without_beam_search_the_numbers_are_the_greedy_ones(tmp_path):
    write_runs(tmp_path, run("g", 1, 5.0, beam=False))
    assert "greedy search" in seeds_section(tmp_path)


def test_intervals_name_both_arms(tmp_path):
    interval = {"low": -1.5, "high": 0.25, "relative_low": -20.0, "relative_high": 3.0}
    row = {"a": "b", "b": "g", "seeds": [1, 2], "wer_a": 6.0, "wer_b": 5.4, "difference": -0.6, "relative": -10.0}
    (tmp_path / "comparisons.json").write_text(json.dumps([row | {"over_utterances": interval, "over_speakers": None}]))
    cells = [cell.strip() for cell in seeds_section(tmp_path).splitlines()[-1].split("|")[1:-1]]
    assert cells == ["g against b", "2", "6.00", "5.40", "-0.60 [-1.50, +0.25]", "-", "-10.0 [-20.0, +3.0]"]


def test_a_folder_without_these_files_has_no_section(tmp_path):
    assert seeds_section(tmp_path) == ""


@pytest.mark.parametrize(
    "name, text", [("runs.csv", "arm,seed\na,1\n"), ("runs.csv", ""), ("comparisons.json", "[{}]")]
)
def test_a_damaged_file_is_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        seeds_section(tmp_path)
