"""Numbers that options of programs cannot be: one sentence that names the option, before anything is read."""

import importlib

import pytest

from cascade.config.options import ConfigError

TRAINING = "--data no-folder --tokens no-folder"


@pytest.mark.parametrize(("program", "words", "message"), [
    ("train", f"{TRAINING} --exp-dir no-model --threads 0", "--threads must be at least 1, got 0"),
    ("max_batch", f"{TRAINING} --threads -1", "--threads must be at least 1, got -1"),
    ("compress", "--teacher egs/an4/conf/teacher.yaml --vocab-size -5", "--vocab-size must be at least 3, got -5"),
    ("compress", "--teacher egs/an4/conf/teacher.yaml --target nan", "--target must lie between 0 and 1, got nan"),
    ("average", "--exp-dir no-folder --epoch 3 --avg 4", r"--avg must lie between 1 and --epoch \(3\), got 4"),
])
def test_a_number_that_an_option_cannot_be_is_named(program, words, message, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, *words.split()])
    with pytest.raises(ConfigError, match=message):
        importlib.import_module(f"cascade.bin.{program}").main()
