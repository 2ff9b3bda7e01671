"""Sentences drawn from a small grammar, for corpora that are synthesised.

A grammar is text: `<rule> = ALTERNATIVE | ALTERNATIVE ...` until the next rule begins; an alternative has words,
`<rules>` and `[optional parts]`, drawn half of the time; "4*" before an alternative makes it four times as likely; a
line that begins with # is a comment.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

_RULE = re.compile(r"^<(\w+)>\s*=", re.MULTILINE)
_WEIGHT = re.compile(r"\s*(\d+)\*")
_PART = re.compile(r"\[[^][]*\]|<\w+>|[^\s<>[\]|]+")


class Grammar:
    """The rules of a grammar file.

    Raises:
      ValueError: a rule that is defined twice, empty, or used and not defined; characters that mean nothing.
    """

    def __init__(self, path: str | Path) -> None:
        text = "\n".join(
            line for line in Path(path).read_text(encoding="utf-8").splitlines() if not line.startswith("#")
        )
        names, bodies = _RULE.findall(text), _RULE.split(text)[2::2]
        twice = {name for name in names if names.count(name) > 1}
        if twice or not names:
            raise ValueError(f"{path}: " + (f"<{min(twice)}> is defined twice" if twice else "no rule in it"))
        self._rules: dict[str, list[str]] = {}
        self._shares: dict[str, np.ndarray] = {}
        for name, body in zip(names, bodies, strict=True):
            alternatives, weights = [], []
            for alternative in body.split("|"):
                weight = _WEIGHT.match(alternative)
                weights.append(int(weight[1]) if weight else 1)
                alternatives.append(alternative[weight.end() if weight else 0 :].strip())
                unknown = set(re.findall(r"<(\w+)>", alternative)) - set(names)
                rest = _PART.sub("", alternatives[-1]).strip()
                if unknown or rest or not alternatives[-1]:
                    what = f"<{min(unknown)}> is not defined" if unknown else f"{rest or 'an empty alternative'} ?"
                    raise ValueError(f"{path}: <{name}>: {what}")
            self._rules[name] = alternatives
            self._shares[name] = np.cumsum(weights) / sum(weights)

    def words(self) -> list[str]:
        """Words that sentences can have, sorted."""
        alternatives = " ".join(alternative for rule in self._rules.values() for alternative in rule)
        return sorted({word for word in _PART.findall(re.sub(r"[][]", " ", alternatives)) if word[0] != "<"})

    def draw(self, generator: np.random.Generator, rule: str = "sentence") -> str:
        """One random sentence."""
        index = int(np.searchsorted(self._shares[rule], generator.random(), side="right"))
        return " ".join(self._expand(self._rules[rule][index], generator))

    def _expand(self, alternative: str, generator: np.random.Generator) -> list[str]:
        words = []
        for part in _PART.findall(alternative):
            if part.startswith("<"):
                words.append(self.draw(generator, part[1:-1]))
            elif not part.startswith("["):
                words.append(part)
            elif generator.random() < 0.5:
                words += self._expand(part[1:-1], generator)
        return words
