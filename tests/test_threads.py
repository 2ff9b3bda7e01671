"""One limit for all libraries that compute."""

import subprocess
import sys

import pytest

CODE = """
{before}
from cascade.threads import limit_threads
limit_threads({count})
import numpy, torch
numpy.ones((9, 9)) @ numpy.ones((9, 9)); torch.ones(9, 9) @ torch.ones(9, 9)
from threadpoolctl import threadpool_info
pools = {{pool["user_api"]: pool["num_threads"] for pool in threadpool_info()}}
print(torch.get_num_threads(), pools["blas"], pools["openmp"])
"""


@pytest.mark.parametrize("before", ["", "import numpy, torch"], ids=["loaded later", "loaded before"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_limit_holds_for_torch_and_for_numpy(count, before, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "3")
    code = CODE.format(count=count, before=before)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [str(count)] * 3
