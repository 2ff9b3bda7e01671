"""The largest batch that fits, on devices of pretended sizes."""

import contextlib
import io

import pytest
import torch

from cascade.training import max_batch
from cascade.training.step import Stepper
from tests.training.conftest import OPTIONS, run


def find(corpus, *words, check=True):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        done = run("max_batch", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--threads", 1, *OPTIONS,
                   *words, check=check)
    return done, shown.getvalue()


@pytest.fixture
def device(monkeypatch):
    """device(frames): no more padded frames than these fit."""
    def install(most):
        real = Stepper.attempt

        def attempt(self, batch, *arguments, **options):
            if batch.features.shape[0] * batch.features.shape[1] > most:
                return None
            return real(self, batch, *arguments, **options)

        monkeypatch.setattr(Stepper, "attempt", attempt)

    return install


def test_the_number_that_is_printed_is_no_more_than_what_was_tried(corpus, monkeypatch):
    for tried, printed in ((12.78, "12.7"), (0.96, "0.9"), (200.0, "200"), (3600000.97, "3600000.9")):
        trial = max_batch.Trial(tried, True, 1.0)
        monkeypatch.setattr("cascade.bin.max_batch.largest_batch", lambda trainer, trial=trial: trial)
        assert find(corpus)[1] == f"data.batch_duration={printed}\n"


def test_the_largest_batch_fits_and_a_twentieth_more_does_not(corpus, device, monkeypatch):
    monkeypatch.setattr(max_batch, "available_bytes", lambda device: float("inf"))
    device(430)
    done, shown = find(corpus)
    tried = [line.split("INFO")[1] for line in done.stderr.splitlines() if "s of audio" in line]
    assert tried[-1] and shown.startswith("data.batch_duration=")
    sizes = {"fits": [], "too large": []}
    for line in tried:
        sizes["fits" if line.endswith("fits") else "too large"].append(float(line.split()[0]))
    assert max(sizes["fits"]) >= min(sizes["too large"]) / max_batch.PRECISION - 0.2  # printed digits
    assert max(sizes["fits"]) - 0.11 <= float(shown.partition("=")[2]) <= max(sizes["fits"])


def test_a_corpus_that_fits_as_a_whole_is_the_largest_batch(corpus, monkeypatch):
    monkeypatch.setattr(max_batch, "available_bytes", lambda device: float("inf"))
    done, _ = find(corpus)
    assert "too large" not in done.stderr


def test_on_a_cpu_what_would_not_fit_is_not_tried(corpus, monkeypatch):
    peaks = iter(range(100, 10_000, 100))
    monkeypatch.setattr(max_batch, "available_bytes", lambda device: 500.0)
    monkeypatch.setattr(max_batch, "peak_bytes", lambda device: float(next(peaks)))
    real, tried = max_batch._try, []
    monkeypatch.setattr(max_batch, "_try", lambda *trial: tried.append(trial) or real(*trial))
    done, _ = find(corpus)
    sizes = [line for line in done.stderr.splitlines() if "s of audio" in line]
    assert "too large" in done.stderr and 0 < len(tried) < len(sizes)


def test_a_device_without_room_for_one_utterance_is_told(corpus, device, monkeypatch):
    monkeypatch.setattr(max_batch, "available_bytes", lambda device: float("inf"))
    device(10)
    done, _ = find(corpus, check=False)
    assert done.returncode == 1 and "the longest utterance alone (1.1 s) does not fit" in done.stderr


def test_memory_that_is_there_is_found():
    cpu = torch.device("cpu")
    assert max_batch.available_bytes(cpu) > max_batch.peak_bytes(cpu) > 1e7
