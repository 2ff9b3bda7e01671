from tests.training.conftest import corpus, train  # noqa: F401
