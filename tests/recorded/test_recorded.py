"""Models and exported files that earlier versions wrote load, and say what they said."""

import json
from difflib import SequenceMatcher

import pytest

from tests.recorded.record import EXPORTED, FOLDER, said

VERSIONS = sorted(path.parent for path in FOLDER.glob("*/said.json"))


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_recorded_models_say_what_they_said(folder):
    recorded, now = json.loads((folder / "said.json").read_text()), dict(said(folder))
    assert now.keys() == recorded.keys() - {"commit"} and f"{EXPORTED} full greedy_search" in now
    for name, words in now.items():
        old, new = recorded[name].split(), words.split()
        same = sum(block.size for block in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks())
        assert len(old) > 20 and same >= 0.95 * max(len(old), len(new)), f"{name}: {words}"  # rounding may flip a tie
