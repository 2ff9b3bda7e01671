import pytest

from cascade.config.options import ConfigError
from tools import bench_search


def test_less_than_one_repeat_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_search", "--repeats", "0"])
    with pytest.raises(ConfigError, match="--repeats must be at least 1, got 0"):
        bench_search.main()
