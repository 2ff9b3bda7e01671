"""The runner of ablations on the tiny corpus; programs run in this process."""

import csv
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from cascade.config.options import ConfigError
from cascade.report.seeds import seeds_section
from tests.training.conftest import OPTIONS, corpus, run  # noqa: F401
from tools import run_arms

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arms(tmp_path, corpus, monkeypatch):  # noqa: F811
    """arms(*words, YAML): run the tool; the list of programs that it called."""
    called = []

    def call(program, *words):
        called.append(program)
        run(program, *words)

    monkeypatch.setattr(run_arms, "call", call)

    def start(text, *words):
        (tmp_path / "arms.yaml").write_text(text)
        (tmp_path / "tiny.yaml").write_text("")
        monkeypatch.setattr("sys.argv", ["run_arms", *map(str, (
            "--arms", tmp_path / "arms.yaml", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--manifest",
            corpus / "fbank" / "test_cuts.jsonl.gz", "--exp-dir", tmp_path / "exp", "--out", tmp_path / "runs.csv",
            "--seeds", 3, *words))])
        called.clear()
        run_arms.main()
        return list(called)

    return start


TINY = [option for option in OPTIONS if not option.startswith("tokens.")]
TINY = f"base: {{config: [tiny.yaml], options: {[*TINY, 'training.num_epochs=1', 'training.average_last=1']}}}\n"


def test_arms_are_trained_once_and_their_rows_written_once(arms, tmp_path):
    text = TINY + (
        "tuned: {like: base, init_from: base, epoch: 1, options: [training.learning_rate=1e-4]}\n"
        "recombined: {like: base, alignment: base, options: [augment.recombine_share=0.5]}\n"
        "student: {like: base, teacher: base, model: small, note: taught, options: [distillation.weight=2]}\n"
    )
    assert arms(text, "--only", "tuned") == ["train", "train", "decode", "decode"]  # base first
    (tmp_path / "exp" / "base-seed3" / "decode" / "test" / "full-modified_beam_search").mkdir(parents=True)
    earlier = {"mode": "full", "method": "modified_beam_search", "wer": 1.0}  # of another set, say
    (tmp_path / "exp" / "base-seed3" / "decode" / "test" / "full-modified_beam_search" / "result.json").write_text(
        json.dumps(earlier))
    assert arms(text) == ["decode", "decode", "align", "train", "decode", "decode", "train", "decode", "decode"]
    assert arms(text, "--compare", "base:student", "--only", "base", "student") == ["compare"]
    (comparison,) = json.loads((tmp_path / "comparisons.json").read_text())
    assert (comparison["a"], comparison["b"], comparison["seeds"]) == ("base", "student", [3])
    assert len(comparison["files"]) == 6
    kept = tmp_path / "hyps" / "student-seed3-streaming-greedy_search.jsonl"
    assert comparison["files"][1] == str(kept)
    assert [set(json.loads(line)) for line in kept.open()] == 2 * [{"id", "ref", "hyp", "speaker"}]
    section = seeds_section(tmp_path)
    assert "| student    | taught |" in section and "| student against base |" in section
    rows = list(csv.DictReader(open(tmp_path / "runs.csv", newline="")))
    assert [(row["arm"], row["model"], row["seed"]) for row in rows] == [
        ("tuned", "teacher", "3"), ("base", "teacher", "3"), ("recombined", "teacher", "3"), ("student", "small", "3")
    ]
    lines = (tmp_path / "exp" / "tuned-seed3" / "decode" / "test" / "full-greedy_search" / "hyps.jsonl").read_text()
    assert [json.loads(line)["speaker"] for line in lines.splitlines()] == ["0", "1"]
    assert len({row["dev_loss"] for row in rows}) == 4
    for row in rows:
        assert float(row["dev_loss"]) > 0 and float(row["dev_cer"]) > 0 and int(row["steps"]) > 0
        assert float(row["wer_full_greedy"]) > 0 and row["wer_full_beam"] == "" and row["test_set"] == "test"


def test_a_finished_model_with_other_options_or_tokens_is_not_taken_for_the_arm(arms, tmp_path, corpus):  # noqa: F811
    tuned = "tuned: {like: base, init_from: base, options: [training.num_epochs=2]}\n"
    arms(TINY, "--only", "base")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "base-seed4").symlink_to(tmp_path / "exp" / "base-seed3")  # a recipe's seed is its own
    linked = ("--seeds", "4", "--exp-dir", tmp_path / "linked")
    assert arms(TINY + tuned, "--only", "tuned", *linked) == ["train", "decode", "decode"]
    for option, message in (
        ("model.joiner_dim=14", r"exp/base-seed3 holds .* not arm base \(model.joiner_dim: 12, now 14\): move"),
        ("training.num_epochs=3", "training.num_epochs: 1, now 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            arms(TINY.replace("]}", f", {option}]}}") + tuned, "--only", "tuned", "--out", tmp_path / "more.csv")
    shutil.copytree(corpus / "tokens", tmp_path / "tokens")
    with open(tmp_path / "tokens" / "tokens.txt", "a") as file:
        file.write("NEW 99\n")
    with pytest.raises(ConfigError, match="other tokens"):
        arms(TINY + tuned, "--only", "tuned", "--tokens", tmp_path / "tokens", "--out", tmp_path / "more.csv")


@pytest.mark.parametrize(("text", "words", "message"), [
    ("base: {}", (), "base must be an arm with config or like"),
    ("base: {config: [tiny.yaml], optoins: []}", (), "base must be an arm with config or like"),
    ("a: {like: b}\nb: {like: a}", (), "arm a needs itself: a -> b -> a"),
    ("a: {config: [tiny.yaml], teacher: b}", (), "a -> b must be an arm"),
    ("a: {config: [tiny.yaml]}", ("--only", "b"), "has no arm b"),
    ("a: {config: [tiny.yaml], options: [training.epochs=3]}", (), "training.epochs"),
    ("a: {config: [tiny.yaml], options: [tokens.kind=char]}", (), "arm a has tokens of its own"),
    (TINY, ("--compare", "base:other"), "two arms of this run as A:B, got base:other"),
    (TINY, ("--compare", "base"), "two arms of this run as A:B, got base"),
    ("- a", (), "must map names to arms"),
    ("a: {like: [a]}", (), "a: like must be a text"),
    ("a: {config: tiny.yaml}", (), "a: config must be a list of texts"),
    ("a: {config: [tiny.yaml], options: training.num_epochs=1}", (), "a: options must be a list of texts"),
    ("a: {config: [tiny.yaml], options: null}", (), "a: options must be a list of texts"),
    ("a: {config: [tiny.yaml], options: [1]}", (), "a: options must be a list of texts"),
    (TINY, ("--out", __file__), "test_run_arms.py is another kind of table"),
])
def test_a_wrong_file_is_said_before_anything_is_trained(text, words, message, arms):
    with pytest.raises(ConfigError, match=message):
        arms(text, *words)


@pytest.mark.parametrize("recipe", ["an4", "commands", "librispeech"])
def test_the_arms_of_a_recipe_have_options_that_exist(recipe):
    experiment = run_arms.Experiment(Namespace(arms=ROOT / "egs" / recipe / "arms.yaml", text=ROOT))
    for name in experiment.arms:
        experiment.check(name)
