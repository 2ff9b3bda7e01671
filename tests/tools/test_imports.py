"""The programs under tools/ start from a clone that is not installed."""

import re
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PROGRAMS = {path.name: text for path in sorted(TOOLS.glob("*.py")) if "__main__" in (text := path.read_text())}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_finds_the_package_before_it_imports_it(name):
    imports = re.search(r"^from (cascade|tools)\b", PROGRAMS[name], re.MULTILINE)
    path = re.search(r"^(sys\.path\.(insert|append)\(|import environment$)", PROGRAMS[name], re.MULTILINE)
    assert imports is None or path is not None and path.start() < imports.start()
