"""Utterances that are set aside, and why: EXP/data/quarantine.jsonl, one {"id", "split", "path", "reason"} per line.

A reason reads "kind: detail"; `kind` is what the counts are made of. Stage 0 writes the file; stage 2, when the
tokenizer exists, replaces its own kinds (TOKEN_KINDS) in it, so that a rerun of either stage repeats nothing.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from cascade.audio.fbank import num_feature_frames
from cascade.config.options import SUBSAMPLING, DataConfig
from cascade.files import replacing
from cascade.text.tokens import Tokenizer

MALFORMED, DUPLICATE, EMPTY_TEXT = "malformed line", "duplicate id", "empty text"
UNREADABLE, DURATION = "unreadable audio", "wrong duration"
TOO_MANY_TOKENS, UNKNOWN_CHARACTERS = "too many tokens", "unknown characters"
TOKEN_KINDS = (TOO_MANY_TOKENS, UNKNOWN_CHARACTERS)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One utterance (or manifest line) that was set aside."""

    id: str
    split: str
    path: str
    reason: str

    @property
    def kind(self) -> str:
        return self.reason.split(":", 1)[0]


def write_quarantine(path: str | Path, problems: Iterable[Problem]) -> None:
    with replacing(path) as temporary:
        lines = (json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)
        temporary.write_text("".join(lines), encoding="utf-8")


def read_quarantine(path: str | Path) -> list[Problem]:
    """The problems of a quarantine file; none if it does not exist.

    Raises:
      ValueError: a line of it is damaged.
    """
    lines = Path(path).read_bytes().split(b"\n") if Path(path).is_file() else []
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            problems += [Problem(**json.loads(line))] if line else []
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} line {number} is damaged: run stage 0 (prepare_data) again") from error
    return problems


def log_counts(split: str, num_total: int, problems: list[Problem]) -> None:
    """One line per split with the number set aside for each kind of reason."""
    counts = Counter(problem.kind for problem in problems)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())) or "none"
    log.info("%s: %d of %d utterances kept, set aside: %s", split, num_total - len(problems), num_total, kinds)


def check_share(split: str, num_total: int, problems: list[Problem], config: DataConfig, path: str | Path) -> None:
    """Stop when too much of a split is bad.

    Raises:
      ValueError: more than data.max_quarantine_share of the split was set aside, or nothing is left of it.
    """
    share = len(problems) / max(num_total, 1)
    if share > config.max_quarantine_share:
        counts = Counter(problem.kind for problem in problems)
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
        raise ValueError(
            f"{split}: {len(problems)} of {num_total} utterances ({100 * share:.1f} %) had to be set aside ({kinds}), "
            f"more than data.max_quarantine_share={config.max_quarantine_share:g}; {path} names each: mend them"
            f"{_other_options(problems, config)}, or let that many go with "
            f"data.max_quarantine_share={math.ceil(100 * share) / 100:g}"
        )
    if num_total == len(problems):
        raise ValueError(f"{split}: no usable utterance is left; {path} names what was set aside")


def _other_options(problems: list[Problem], config: DataConfig) -> str:
    """The options that keep what was set aside."""
    hints = {
        f"data.min_duration={config.min_duration:g}": "use the {} shorter ones with a lower {}",
        f"data.max_duration={config.max_duration:g}": "use the {} longer ones with a higher {}",
        TOO_MANY_TOKENS: "use the {} with {} by another tokens.kind (bpe, word) or a slower copy in data.speed_factors",
    }
    counts = {named: sum(named in problem.reason for problem in problems) for named in hints}
    return "".join(f", or {hints[named].format(count, named)}" for named, count in counts.items() if count)


def token_problem(
    text: str, num_samples: int, sampling_rate: int, speeds: Iterable[float], tokenizer: Tokenizer
) -> str | None:
    """The reason why a training utterance cannot be used with this tokenizer, or None.

    At most one token per encoder frame can be decoded: the slowest copy must have a frame for each, tokens <= T // 4.
    Faster copies that have too few are left out by training, one by one.

    Args:
      num_samples: samples of the utterance at speed 1.
      speeds: data.speed_factors.
    """
    unknown = tokenizer.unknown_characters(text)
    if unknown:
        return f"{UNKNOWN_CHARACTERS}: the tokenizer lacks {' '.join(sorted(unknown))}"
    slowest = min(speeds)
    num_frames = num_feature_frames(int(num_samples / slowest), sampling_rate) // SUBSAMPLING
    num_tokens = len(tokenizer.encode(text))
    if num_tokens > num_frames:
        return f"{TOO_MANY_TOKENS}: {num_tokens} tokens, {num_frames} encoder frames at speed {slowest:g}"
    return None
