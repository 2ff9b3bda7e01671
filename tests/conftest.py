"""One tiny corpus taken through stages 0 to 2, shared by the tests that only read it."""

import pytest

from cascade.bin.compute_features import compute_features
from cascade.bin.prepare_data import prepare
from cascade.bin.train_tokens import train_tokens
from tests.synthetic import small_config, write_corpus


@pytest.fixture(scope="session")
def exp(tmp_path_factory):
    """A folder with manifests, data, fbank and tokens of `small_config`."""
    root = tmp_path_factory.mktemp("exp")
    config = small_config()
    prepare(write_corpus(root), root / "data", config)
    compute_features(root / "data", root / "fbank", config, num_jobs=1)
    train_tokens(root / "data", root / "tokens", config)
    return root
