"""Files between the stages that somebody has damaged: one sentence that names the file and the place."""

import gzip
import json

import pytest
import torch

from cascade.bin.compute_features import compute_features
from cascade.bin.train_tokens import train_tokens
from cascade.corpus.cuts import read_cuts
from cascade.data.batches import TrainBatches
from cascade.data.storage import read_stats
from cascade.text.tokens import Tokenizer
from tests.synthetic import small_config

GOOD = torch.ones(20)
STATS = {
    "nan": ({"mean": GOOD * float("nan"), "std": GOOD}, "mean must be finite"),
    "inf": ({"mean": GOOD, "std": GOOD * float("inf")}, "std positive in every mel bin"),
    "zero": ({"mean": GOOD, "std": torch.arange(20.0)}, "std positive in every mel bin"),
    "negative": ({"mean": GOOD, "std": -GOOD}, "std positive in every mel bin"),
    "bins": ({"mean": torch.ones(40), "std": torch.ones(40)}, "has 40 mel bins, features.num_mel_bins=20"),
    "shape": ({"mean": torch.ones(1, 20), "std": GOOD}, r"one per mel bin, got \(1, 20\) and \(20,\)"),
    "scalars": ({"mean": torch.tensor(1.0), "std": torch.tensor(1.0)}, "one per mel bin"),
    "integers": ({"mean": GOOD.long(), "std": GOOD}, "must be real numbers"),
    "lists": ({"mean": [1.0] * 20, "std": [1.0] * 20}, "does not hold the tensors mean and std"),
    "no std": ({"mean": GOOD}, "does not hold the tensors mean and std"),
    "no dict": (GOOD, "does not hold the tensors mean and std"),
}


@pytest.mark.parametrize("name", STATS)
def test_wrong_statistics_are_named(tmp_path, name):
    values, message = STATS[name]
    torch.save(values, tmp_path / "stats.pt")
    with pytest.raises(ValueError, match=rf"stats\.pt.*{message}.*: run stage 1"):
        read_stats(tmp_path / "stats.pt", 20)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 no zip"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "stats.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"stats\.pt is damaged .*: run stage 1"):
        read_stats(tmp_path / "stats.pt")


def change(place, value):
    """A function that puts `value` (DELETED: takes it out) at a place such as "features.num_frames" of a cut's line."""

    def apply(line):
        values = json.loads(line)
        *folders, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        inside = values
        for part in folders:
            inside = inside[part]
        if value is DELETED:
            del inside[last]
        else:
            inside[last] = value
        return json.dumps(values).encode()

    return apply


DELETED = object()
LINES = {
    "not JSON": (lambda line: line[:50], "not JSON"),
    "not UTF-8": (lambda line: b'{"id": "\xff"}', "not JSON"),
    "nested": (lambda line: b"[" * 100_000, "not JSON"),
    "a list": (lambda line: b"[1]", "no lhotse cut"),
    "a recording": (change("type", "Recording"), "no lhotse cut"),
    "no type": (change("type", DELETED), "no lhotse cut"),
    **{f"no {name}": (change(name, DELETED), "no lhotse cut") for name in ("id", "start", "duration", "channel")},
    "id": (change("id", 3), "id must be a string"),
    "empty id": (change("id", ""), "id must be a string"),
    "start": (change("start", "0"), "start must be a number"),
    "negative start": (change("start", -1.0), "start must be a number of seconds, 0 or more, got -1.0"),
    "duration": (change("duration", "long"), "duration must be a positive number of seconds"),
    "negative duration": (change("duration", -0.5), "duration must be a positive number of seconds, got -0.5"),
    "no length": (change("duration", 0), "duration must be a positive number"),
    "endless": (change("duration", float("inf")), "duration must be a positive number"),
    "no number": (change("duration", float("nan")), "duration must be a positive number"),
    "supervisions": (change("supervisions", "RED"), "no lhotse cut"),
    "text": (change("supervisions.0.text", 5), "text of a supervision must be a string, got 5"),
    "supervision": (change("supervisions.0.id", DELETED), "no lhotse cut"),
    "custom": (change("custom", [1]), "no lhotse cut|custom must be an object"),
    "speed": (change("custom.speed", 0), "custom speed must be a positive number, got 0"),
    "no speed": (change("custom.speed", DELETED), "custom speed must be a positive number, got None"),
    "rate": (change("recording.sampling_rate", "16k"), "no lhotse cut|sampling_rate of the recording"),
    "negative rate": (change("recording.sampling_rate", -16000), "sampling_rate of the recording must be a whole"),
    "no source": (change("recording.sources", []), "no lhotse cut|sources of the recording"),
    "frames": (change("features.num_frames", "100"), "num_frames of the features must be a whole positive number"),
    "negative frames": (change("features.num_frames", -4), "num_frames of the features must be a whole positive"),
    "bins": (change("features.num_features", 20.5), "num_features of the features must be a whole positive"),
    "storage": (change("features.storage_path", None), "storage_path of the features must be a string"),
    "no key": (change("features.storage_key", DELETED), "no lhotse cut"),
}


@pytest.fixture
def damaged(exp, tmp_path):
    """Copies the cuts of stage 1 with the second line changed."""

    def write(damage):
        lines = gzip.decompress((exp / "fbank" / "train_cuts.jsonl.gz").read_bytes()).splitlines()
        lines[1] = damage(lines[1])
        path = tmp_path / "train_cuts.jsonl.gz"
        path.write_bytes(gzip.compress(b"\n".join(lines)))
        return path

    return write


@pytest.mark.parametrize("name", LINES)
def test_a_wrong_cut_is_named_with_its_line(exp, damaged, name):
    damage, message = LINES[name]
    path = damaged(damage)
    cuts = read_cuts(path)
    next(cuts)
    with pytest.raises(ValueError, match=rf"train_cuts\.jsonl\.gz line 2: .*({message})") as caught:
        next(cuts)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="line 2"):
        TrainBatches(path, Tokenizer.load(exp / "tokens"), small_config(), stats=read_stats(exp / "fbank" / "stats.pt"))


def test_the_utterance_of_a_wrong_cut_is_named(damaged):
    with pytest.raises(ValueError, match="line 2: cut train0: duration must be"):
        list(read_cuts(damaged(change("duration", -1))))


@pytest.mark.parametrize("damage", [
    lambda content: content[: len(content) // 2], lambda content: content[:60] + b"damage" + content[66:],
    lambda content: b"no gzip",
])
def test_truncated_or_damaged_cuts_are_named_by_every_stage(exp, tmp_path, damage):
    path = tmp_path / "train_cuts.jsonl.gz"
    path.write_bytes(damage((exp / "data" / "train_cuts.jsonl.gz").read_bytes()))
    for call in (
        lambda: list(read_cuts(path)), lambda: compute_features(tmp_path, tmp_path / "out", small_config(), 1),
        lambda: train_tokens(tmp_path, tmp_path / "tokens", small_config()),
    ):
        with pytest.raises(ValueError, match=r"train_cuts\.jsonl\.gz (is truncated or damaged after )?line \d"):
            call()


def test_cuts_of_nothing_are_named(tmp_path):
    (tmp_path / "train_cuts.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"train_cuts\.jsonl\.gz holds no utterance"):
        compute_features(tmp_path, tmp_path / "out", small_config(), 1)
