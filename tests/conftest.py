"""What many tests read: one tiny corpus taken through stages 0 to 2, and tiny models with recordings."""

import pytest

from cascade.bin.compute_features import compute_features
from cascade.bin.prepare_data import prepare
from cascade.bin.train_tokens import train_tokens
from tests.synthetic import small_config, write_corpus
from tests.tiny_run import make_manifest, make_model_dir


@pytest.fixture(scope="session")
def exp(tmp_path_factory):
    """A folder with manifests, data, fbank and tokens of `small_config`."""
    root = tmp_path_factory.mktemp("exp")
    config = small_config()
    prepare(write_corpus(root), root / "data", config)
    compute_features(root / "data", root / "fbank", config, num_jobs=1)
    train_tokens(root / "data", root / "tokens", config)
    return root


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A folder with the models student and teacher (an LSTM predictor), test.jsonl and its recordings."""
    folder = tmp_path_factory.mktemp("run")
    make_model_dir(folder / "student")
    make_model_dir(folder / "teacher", predictor="lstm")
    make_manifest(folder)
    return folder
