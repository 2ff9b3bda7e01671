"""What starts a run over, what does not, and that nothing of an earlier run is ever lost."""

import dataclasses
import gzip
import json
import shutil

import pytest
import torch

from cascade.checkpoint import FORMAT, epoch_path, load_file, save_file
from cascade.config.load import config_to_dict, load_config
from cascade.config.options import Config, ConfigError
from cascade.config.rules import starts_over
from cascade.training.earlier_run import plan_run
from cascade.training.run_inputs import RunPaths, describe_inputs

INPUTS = {"tokens.txt": "a", "data statistics": "b", "noise": None, "teacher": "c", "init-from": None}
DISTILLED = load_config(
    overrides=["distillation.weight=1", "mwer.nbest=4", "training.num_epochs=4", "training.average_last=2"]
)


def options(config, prefix=""):
    """Every option by its dotted name."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        names += options(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def changed(config, name, value="another"):
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


STARTS_OVER = [name for name in options(DISTILLED) if starts_over(name)]
FREE = [
    name for name in options(DISTILLED)
    if not starts_over(name) and name not in ("training.num_epochs", "training.average_last")
]


@pytest.fixture
def exp_dir(tmp_path):
    """What plan_run looks at of a finished run of four epochs, with all of them kept."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder)
    for path in (*(epoch_path(folder, number) for number in range(1, 5)), folder / "averaged.pt"):
        path.touch()
    return folder


def write_checkpoint(folder, **other):
    values = {"format": FORMAT, "config": config_to_dict(DISTILLED), "state": {"epoch": 5}, "inputs": INPUTS}
    save_file(values | {"model": {}} | other, folder / "checkpoint.pt")


def plan(folder, config=DISTILLED, inputs=INPUTS, force=False):
    found = plan_run(config, folder, inputs, force)
    return found.action, found.lines


def test_another_value_starts_over_unless_its_field_says_that_it_goes_on():
    assert {"seed", "loss.backend", "model.causal.num_layers", "distillation.kind"} <= {*STARTS_OVER}
    assert {"data.num_workers", "tokens.kind", "decoding.blank_penalty"} <= {*FREE}


@pytest.mark.parametrize("name", FREE)
def test_an_option_that_changes_no_number_does_not_start_over(exp_dir, name):
    assert plan(exp_dir, changed(DISTILLED, name)) == ("nothing", ())


@pytest.mark.parametrize("name", STARTS_OVER)
def test_an_option_that_changes_numbers_starts_over_and_is_named(exp_dir, name):
    action, (line,) = plan(exp_dir, changed(DISTILLED, name))
    assert action == "start over" and line.startswith(f"{name}: ") and line.endswith(", now another")


def test_an_option_that_is_newer_than_the_run_counts_as_its_default(exp_dir):
    values = config_to_dict(DISTILLED)
    default = config_to_dict(Config())
    for name in STARTS_OVER:
        *sections, last = name.split(".")
        section, standard = values, default
        for part in sections:
            section, standard = section[part], (standard or {}).get(part)
        if standard and section[last] == standard[last]:
            del section[last]
    assert "learning_rate" not in values["training"] and "d_model" not in values["model"]
    write_checkpoint(exp_dir, config=values)
    assert plan(exp_dir) == ("nothing", ())
    assert plan(exp_dir, changed(DISTILLED, "training.beta2", 0.5)) == (
        "start over", ("training.beta2: 0.98, now 0.5",)
    )


@pytest.mark.parametrize("section", ["distillation", "mwer"])
def test_a_section_that_comes_or_goes_is_one_difference(exp_dir, section):
    without = dataclasses.replace(DISTILLED, **{section: None})
    assert plan(exp_dir, without) == ("start over", (f"{section}: a section, now null",))


@pytest.mark.parametrize(("name", "value", "line"), [
    ("tokens.txt", "x", "tokens.txt: another one than before"),
    ("teacher", "x", "teacher: another one than before"),
    ("noise", "x", "noise: none before"),
    ("teacher", None, "teacher: none now"),
])
def test_a_changed_input_starts_over_and_is_named(exp_dir, name, value, line):
    assert plan(exp_dir, inputs=INPUTS | {name: value}) == ("start over", (line,))
    write_checkpoint(exp_dir, inputs={key: item for key, item in INPUTS.items() if key != name})
    assert plan(exp_dir, inputs=INPUTS | {name: value}) == ("nothing", ())  # a kind of input newer than the run


def test_a_run_that_carries_one_hash_of_everything_is_compared_by_its_config(exp_dir):
    values = load_file(exp_dir / "checkpoint.pt")
    del values["inputs"]
    save_file(values | {"fingerprint": "0" * 64}, exp_dir / "checkpoint.pt")
    assert plan(exp_dir) == ("nothing", ())
    assert plan(exp_dir, changed(DISTILLED, "seed", 1)) == ("start over", ("seed: 42, now 1",))


def test_a_config_that_this_version_cannot_read_starts_over(exp_dir):
    write_checkpoint(exp_dir, config=config_to_dict(DISTILLED) | {"gone": 1})
    action, (line,) = plan(exp_dir)
    assert action == "start over" and line.startswith("config of another version")


def test_more_epochs_go_on_and_fewer_than_are_done_change_nothing(exp_dir):
    def with_epochs(number):
        found = plan_run(changed(DISTILLED, "training.num_epochs", number), exp_dir, INPUTS, False)
        return found.action, found.config.training.num_epochs, " ".join(found.lines)

    action, epochs, text = with_epochs(6)
    assert (action, epochs) == ("go on", 6) and "the learning rate follows the schedule of a run of 6 epochs" in text
    action, epochs, text = with_epochs(3)
    assert (action, epochs) == ("nothing", 4) and "4 epochs are done and stay" in text
    write_checkpoint(exp_dir, state={"epoch": 4})  # three epochs of four are done
    action, epochs, text = with_epochs(2)
    assert (action, epochs) == ("go on", 3) and "3 epochs are done and stay" in text
    action, epochs, text = with_epochs(3)
    assert (action, epochs) == ("go on", 3) and "after a learning rate planned for 4" in text


def test_an_average_of_epochs_that_were_not_kept_is_refused_with_what_is_possible(exp_dir):
    epoch_path(exp_dir, 2).unlink()
    assert plan(exp_dir)[0] == "nothing"
    wider = changed(DISTILLED, "training.average_last", 4)
    with pytest.raises(ConfigError, match=r"average_last=4 needs epoch-2.pt.*at most training.average_last=2"):
        plan(exp_dir, wider)
    with pytest.raises(ConfigError, match=r"at most training.average_last=3 is possible"):
        plan(exp_dir, changed(wider, "training.num_epochs", 5))
    assert plan(exp_dir, changed(wider, "training.num_epochs", 6))[0] == "go on"
    assert plan(exp_dir, changed(DISTILLED, "training.average_last", 1)) == (
        "average", ("training.average_last: 2, now 1",)
    )


def test_a_model_whose_checkpoint_is_gone_is_not_overwritten(exp_dir):
    (exp_dir / "checkpoint.pt").unlink()
    assert plan(exp_dir)[0] == "start over"
    assert plan(exp_dir.parent / "new") == ("begin", ())


def test_weights_of_a_teacher_count_and_nothing_else_of_its_file(corpus, train, tmp_path):
    train(tmp_path / "teacher")
    paths = RunPaths(corpus / "fbank", corpus / "tokens", tmp_path, tmp_path / "teacher", tmp_path / "teacher")
    before = describe_inputs(Config(), paths)
    values = load_file(tmp_path / "teacher" / "averaged.pt")
    values["config"]["training"]["log_every_steps"] = 7
    save_file(values, tmp_path / "teacher" / "averaged.pt")
    assert describe_inputs(Config(), paths) == before
    values["model"]["joiner.output.bias"][0] += 1
    save_file(values, tmp_path / "teacher" / "averaged.pt")
    now = describe_inputs(Config(), paths)
    assert [name for name in now if now[name] != before[name]] == ["teacher", "init-from"]
    assert before["tokenizer kind"] == "word"


@pytest.mark.parametrize(("change", "counts"), [
    (lambda cut: cut["supervisions"][0].update(text="FOUR FOUR"), True),
    (lambda cut: cut["features"].update(num_frames=cut["features"]["num_frames"] - 1), True),
    (lambda cut: cut.update(id="another"), True),
    (lambda cut: cut["features"].update(storage_path="/elsewhere/part-00000.lca"), False),
    (lambda cut: cut["recording"]["sources"][0].update(source="/elsewhere/train.wav"), False),
])
def test_transcripts_and_lengths_of_the_training_cuts_count_and_their_paths_do_not(corpus, tmp_path, change, counts):
    def describe():
        return describe_inputs(Config(), RunPaths(tmp_path, corpus / "tokens", tmp_path / "model"))

    for name in ("stats.pt", "train_cuts.jsonl.gz"):
        shutil.copy(corpus / "fbank" / name, tmp_path)
    before, path = describe(), tmp_path / "train_cuts.jsonl.gz"
    cuts = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    change(cuts[1])
    path.write_bytes(gzip.compress("".join(json.dumps(cut) + "\n" for cut in cuts).encode()))
    now = describe()
    assert [name for name in now if now[name] != before[name]] == ["training utterances"] * counts
    path.write_bytes(gzip.compress(b"[1]\n"))
    with pytest.raises(ValueError, match=r"train_cuts.jsonl.gz line 1: "):
        describe()


def test_harmless_options_leave_a_finished_run_alone(train, tmp_path):
    exp_dir = tmp_path / "model"
    train(exp_dir)
    before = {path.name: path.read_bytes() for path in exp_dir.glob("*.pt")}
    done = train(
        exp_dir, "training.log_every_steps=3", "training.save_every_minutes=1", "training.validate_every_epochs=2",
        "training.keep_epochs=3", "data.max_quarantine_share=0.1", "augment.rir_share=0.1",
    )
    assert "finished already" in done.stderr
    assert before == {path.name: path.read_bytes() for path in exp_dir.glob("*.pt")}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_earlier_run_is_kept(train, tmp_path):
    exp_dir, models = tmp_path / "model", []
    for options in (["seed=1"], ["seed=2"], ["seed=2", "--force"], ["seed=3"]):
        done = train(exp_dir, *options, "training.num_epochs=1", "training.average_last=1")
        models.append((exp_dir / "averaged.pt").read_bytes())
    assert "starting over, it is kept as model.previous-3" in done.stderr and "seed: 2, now 3" in done.stderr
    assert "seed: 2, now 3" in (exp_dir / "train.log").read_text()
    kept = [(tmp_path / f"model.previous-{number}" / "averaged.pt").read_bytes() for number in (1, 2, 3)]
    assert kept == models[:3] and kept[0] != kept[1] == kept[2]


def test_the_folder_of_a_run_may_be_named_by_a_dot(train, tmp_path, monkeypatch):
    exp_dir = tmp_path / "model"
    train(exp_dir, "training.num_epochs=1", "training.average_last=1")
    monkeypatch.chdir(exp_dir)
    done = train(".", "training.num_epochs=1", "training.average_last=1", "seed=1")
    assert "starting over, it is kept as model.previous-1" in done.stderr
    assert (exp_dir / "averaged.pt").is_file() and (tmp_path / "model.previous-1" / "averaged.pt").is_file()


def mean_of(exp_dir, *numbers):
    models = [load_file(epoch_path(exp_dir, number))["model"] for number in numbers]
    return {name: sum(model[name] for model in models) / len(models) for name in models[0]}


def is_close(values, weights):
    return all(torch.allclose(tensor, weights[name], atol=1e-7) for name, tensor in values["model"].items())


def test_more_epochs_train_on_from_the_end_of_a_finished_run(train, tmp_path):
    train(tmp_path)
    epochs = {number: epoch_path(tmp_path, number).read_bytes() for number in (1, 2)}
    short, steps = (tmp_path / "averaged.pt").read_bytes(), summary(tmp_path)["steps"]
    done = train(tmp_path, "training.num_epochs=3")
    assert "training.num_epochs: 2, now 3: from here on the learning rate" in done.stderr
    assert "resuming in epoch 3" in done.stderr and summary(tmp_path)["steps"] == steps * 3 // 2
    assert epochs == {number: epoch_path(tmp_path, number).read_bytes() for number in (1, 2)}
    assert (tmp_path / "averaged-2-epochs.pt").read_bytes() == short
    final = load_file(tmp_path / "averaged.pt")
    assert final["epoch"] == 3 and final["config"]["training"]["num_epochs"] == 3
    assert is_close(final, mean_of(tmp_path, 2, 3))
    assert "finished already" in train(tmp_path, "training.num_epochs=3").stderr
    assert "3 epochs are done and stay" in train(tmp_path).stderr
    assert load_file(tmp_path / "averaged.pt")["epoch"] == 3


def summary(exp_dir):
    return json.loads((exp_dir / "train_summary.json").read_text())


def test_a_longer_run_that_stopped_before_its_average_does_not_pass_for_finished(train, tmp_path, monkeypatch):
    from cascade.training.trainer import Trainer

    train(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda self, *_: (_ for _ in ()).throw(OSError("disk full")))
        assert train(tmp_path, "training.num_epochs=3", check=False).returncode == 1
    assert not (tmp_path / "averaged.pt").is_file()
    train(tmp_path, "training.num_epochs=3")
    assert load_file(tmp_path / "averaged.pt")["epoch"] == 3


def test_another_average_is_made_of_the_kept_epochs_without_training(train, tmp_path):
    train(tmp_path)
    losses, epochs = (tmp_path / "losses.jsonl").read_bytes(), epoch_path(tmp_path, 2).read_bytes()
    done = train(tmp_path, "training.average_last=1")
    assert "training.average_last: 2, now 1" in done.stderr and "the mean of the last 1 of 2 epochs" in done.stderr
    assert is_close(load_file(tmp_path / "averaged.pt"), mean_of(tmp_path, 2))
    assert losses == (tmp_path / "losses.jsonl").read_bytes() and epochs == epoch_path(tmp_path, 2).read_bytes()
    written = (tmp_path / "averaged.pt").stat().st_mtime_ns
    assert "the mean of" not in train(tmp_path, "training.average_last=1").stderr
    assert (tmp_path / "averaged.pt").stat().st_mtime_ns == written
    epoch_path(tmp_path, 1).unlink()
    done = train(tmp_path, check=False)
    assert done.returncode == 2 and "needs epoch-1.pt" in done.stderr
    assert (tmp_path / "averaged.pt").stat().st_mtime_ns == written


def test_a_run_that_is_cut_short_ends_with_the_epochs_that_are_done(train, tmp_path):
    train(tmp_path)
    values = load_file(tmp_path / "checkpoint.pt")
    values["config"]["training"]["num_epochs"] = 9  # as if it had been stopped after two epochs of nine
    save_file(values, tmp_path / "checkpoint.pt")
    for path in (tmp_path / "averaged.pt", tmp_path / "train_summary.json"):
        path.unlink()
    done = train(tmp_path, "training.num_epochs=1", "training.average_last=1")
    assert "2 epochs are done and stay" in done.stderr
    assert summary(tmp_path)["epochs"] == 2 and is_close(load_file(tmp_path / "averaged.pt"), mean_of(tmp_path, 2))
    written = (tmp_path / "averaged.pt").stat().st_mtime_ns
    train(tmp_path, "training.num_epochs=1", "training.average_last=1")
    assert (tmp_path / "averaged.pt").stat().st_mtime_ns == written


def test_a_dry_run_says_what_the_real_run_then_says(train, tmp_path, capsys):
    exp_dir = tmp_path / "model"
    train(exp_dir)
    for words in (["seed=7", "data.num_buckets=1"], ["--force"], ["training.num_epochs=3"], ["data.num_workers=1"]):
        capsys.readouterr()
        train(exp_dir, *words, "--dry-run")
        shown = capsys.readouterr().out
        said = train(exp_dir, *words).stderr.split("parameters:")[0]
        lines = [line.split(f"{exp_dir}: ")[1] for line in said.splitlines() if f"{exp_dir}: " in line]
        assert lines and all(line in shown for line in lines), (lines, shown)


def test_a_damaged_epoch_that_is_not_needed_does_not_stop_a_run(train, tmp_path):
    train(tmp_path / "model", "training.num_epochs=3")
    (tmp_path / "model" / "epoch-1.pt").write_bytes(b"damaged")
    done = train(tmp_path / "model", "training.num_epochs=3", "decoding.blank_penalty=0.25")
    assert "epoch-1.pt is damaged" in done.stderr and "it keeps its decoding section" in done.stderr
    assert load_file(tmp_path / "model" / "averaged.pt")["config"]["decoding"]["blank_penalty"] == 0.25
