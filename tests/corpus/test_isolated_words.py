"""A table of isolated words, telephone speech of 0.15 to 0.6 s: nothing that is long enough for its tokens is lost."""

import sys
from pathlib import Path

import pytest
import soundfile

from cascade.bin import compute_features, prepare_data, train_tokens
from cascade.config.load import load_config
from cascade.config.options import DataConfig
from cascade.corpus.cuts import read_cuts
from cascade.corpus.manifests import write_manifest
from cascade.corpus.quarantine import read_quarantine
from cascade.corpus.tables import read_table, utterances_of
from cascade.data.batches import TrainBatches
from cascade.text.tokens import Tokenizer
from tests.synthetic import small_config, tone, write_lines

RECIPES = sorted((Path(__file__).resolve().parents[2] / "egs").glob("*/conf/data.yaml"))
TSV = next(path for path in RECIPES if path.parents[1].name == "tsv")
WORDS = {"a": 0.15, "no": 0.2, "one": 0.25, "four": 0.4, "seven": 0.5, "fourteen": 0.6}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    rows = ["path\ttext\tspeaker"]
    for number, (word, seconds) in enumerate(list(WORDS.items()) * 10):
        soundfile.write(folder / f"{number}.wav", tone(seconds, 8000, number), 8000)
        rows.append(f"{number}.wav\t{word}\ts{number // 6}")
    (folder / "data.tsv").write_text("\n".join(rows) + "\n")
    for split, utterances in utterances_of(read_table(folder / "data.tsv"), 42).items():
        write_manifest(folder / "m" / f"{split}.jsonl", utterances)
    return folder / "m"


def call(monkeypatch, program, *words):
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, words)])
    program.main()


@pytest.mark.parametrize("rate", [8000, 16000])
def test_every_word_that_is_long_enough_is_used(manifests, tmp_path, monkeypatch, rate):
    config = ["--config", TSV, f"features.sampling_rate={rate}"]
    data, fbank, tokens = tmp_path / "data", tmp_path / "fbank", tmp_path / "tokens"
    call(monkeypatch, prepare_data, "--manifest-dir", manifests, "--out", data, *config)
    call(monkeypatch, compute_features, "--data", data, "--out", fbank, "--num-jobs", 1, *config)
    call(monkeypatch, train_tokens, "--data", data, "--out", tokens, *config)
    assert read_quarantine(data / "quarantine.jsonl") == []
    used = {path.name: len(list(read_cuts(path))) for path in fbank.glob("*_cuts.jsonl.gz")}
    assert used["train_cuts.jsonl.gz"] == 3 * 48 and sum(used.values()) == 3 * 48 + 12
    config = load_config([TSV], [f"features.sampling_rate={rate}", "augment.noise_share=0"])
    batches = TrainBatches(fbank / "train_cuts.jsonl.gz", Tokenizer.load(tokens), config)
    heard = {name.partition("_sp")[0] for batch in batches for name in batch.ids}
    assert len(heard) == 48 and not batches.left_out
    assert all(bool(batch.features.isfinite().all()) for batch in batches)


@pytest.mark.parametrize(("option", "sentence"), [
    ("data.min_duration=0.3", "use the {count} shorter ones with a lower data.min_duration=0.3, or let that many go"),
    ("data.max_duration=0.3", "use the {count} longer ones with a higher data.max_duration=0.3, or let that many go"),
])
def test_too_much_set_aside_names_the_options_that_keep_it(manifests, tmp_path, monkeypatch, option, sentence):
    words = ["--manifest-dir", manifests, "--out", tmp_path, "--config", TSV, option]
    with pytest.raises(ValueError, match="had to be set aside") as caught:
        call(monkeypatch, prepare_data, *words)
    said = str(caught.value)
    split = said.split(": ")[0]
    count = sum(problem.split == split for problem in read_quarantine(tmp_path / "quarantine.jsonl"))
    assert sentence.format(count=count) in said
    share = said.rpartition("data.max_quarantine_share=")[2]
    call(monkeypatch, prepare_data, *words, f"data.max_quarantine_share={share}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parents[1].name)
def test_no_recipe_sets_short_utterances_aside(path):
    assert load_config([path]).data.min_duration == 0


def test_copies_that_are_too_fast_for_their_tokens_are_left_out_and_the_others_used(tmp_path):
    """One encoder frame is 40 ms: 0.037 s has one at speed 0.9 and 1.0, none at 2.0."""
    lines = []
    for name, seconds, text in (("short", 0.037, "RED"), ("wordy", 0.3, "RED " * 7), ("long", 1.0, "RED")):
        soundfile.write(tmp_path / f"{name}.wav", tone(seconds), 16000)
        lines.append({"id": name, "path": str(tmp_path / f"{name}.wav"), "text": text})
    for split in ("train", "dev"):
        write_lines(tmp_path / "m" / f"{split}.jsonl", lines)
    config = small_config(data=DataConfig(speed_factors=(0.9, 1.0, 2.0), max_quarantine_share=0.0))
    prepare_data.prepare(tmp_path / "m", tmp_path / "data", config)
    compute_features.compute_features(tmp_path / "data", tmp_path / "fbank", config, num_jobs=1)
    tokenizer = train_tokens.train_tokens(tmp_path / "data", tmp_path / "tokens", config)
    batches = TrainBatches(tmp_path / "fbank" / "train_cuts.jsonl.gz", tokenizer, config)
    assert {utterance.id for utterance in batches.utterances} == {
        "short_sp0.9", "short", "wordy_sp0.9", "wordy", "long_sp0.9", "long", "long_sp2.0"
    }
