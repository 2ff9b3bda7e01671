"""What the int8 copies of exported graphs cost: words and tokens on a test set, a file at a time and together.

A file that makes more errors than `allowed_errors` in any pass that runs it stays float32. That rule is the limit for
quantised graphs; differences in numbers say little about words and have none.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cascade.config.options import SUBSAMPLING, Config
from cascade.corpus.cuts import split_name
from cascade.data.batches import Batch
from cascade.data.decode_batches import decode_batches
from cascade.export.sessions import (
    FULL,
    JOINER,
    LOOK_AHEAD,
    NONCAUSAL,
    STREAMING,
    NoncausalSession,
    OnlineSession,
    int8_name,
    onnx_session,
    run_session,
)
from cascade.export.wrappers import Geometry
from cascade.log import progress
from cascade.measure.wer import ErrorCounts, align, count_errors
from cascade.models.torch_engine import TorchEngine
from cascade.models.transducer import CascadedTransducer
from cascade.search.greedy import GreedySearch
from cascade.text.normal import split_words
from cascade.text.tokens import Tokenizer

LIMIT_PERCENT = 2.0
"""Relative loss of WER that is allowed."""
TOGETHER = "both encoders"
"""The two files that our own runtime runs, both in int8."""
_BATCH_SECONDS = 100.0
_SILENCE = float(np.log(np.finfo(np.float32).eps))
"""A feature of digital silence."""
Case = tuple[str, str]
"""What is in int8, a file's name, TOGETHER or nothing; and the pass."""


def compare_tokens(expected: Sequence[int], tokens: Sequence[int]) -> dict[str, int]:
    """"all": tokens of both, aligned; "equal": those that are the same."""
    pairs = align(expected, tokens)
    return {"all": len(pairs), "equal": sum(left == right for left, right in pairs)}


def allowed_errors(errors: int, limit_percent: float) -> int:
    """The largest number of word errors that is no loss: the limit, rounded up to a whole error."""
    return math.ceil(errors * (1 + limit_percent / 100) - 1e-9)


@dataclass
class _Counts:
    errors: ErrorCounts = field(default_factory=ErrorCounts)
    tokens: Counter[str] = field(default_factory=Counter)
    """Tokens of float32 and insertions of int8 ("all"), and how many of float32's int8 says too ("equal")."""


class LossMeter:
    """Runs float32 and int8 files of a folder over a test set, greedy search behind them.

    Args:
      files: names of the float32 files that have an int8 copy.
    """

    def __init__(
        self, folder: Path, files: Sequence[str], model: CascadedTransducer, tokenizer: Tokenizer, geometry: Geometry,
        blank_penalty: float,
    ) -> None:  # fmt: skip
        self._folder, self._files, self._tokenizer, self._geometry = folder, files, tokenizer, geometry
        self._engine = TorchEngine(model)
        self._search = GreedySearch(self._engine, blank_penalty, tokenizer.unk_id)
        self._open = lru_cache(lambda kind, name, int8: kind(folder / (int8_name(name) if int8 else name)))
        self._counts: dict[Case, _Counts] = defaultdict(_Counts)

    def hear(self, batch: Batch) -> None:
        """Decode a batch by everything that is compared, and count."""
        features, lens = self._whole_blocks(batch)
        said = {}
        for case, frames in self._encode(features, lens).items():
            project = self._open(_projection, JOINER, True) if case[0] == JOINER else self._engine.project
            said[case] = [each[0].tokens for each in self._search.decode(project(frames), lens)]
        for (part, mode), hypotheses in said.items():
            counts = self._counts[part, mode]
            for text, tokens, expected in zip(batch.texts, hypotheses, said["", mode], strict=True):
                words = split_words(text), split_words(self._tokenizer.decode(tokens))
                counts.errors += count_errors(align(*words))
                counts.tokens.update(compare_tokens(expected, tokens))

    def rows(self, limit_percent: float) -> list[dict[str, Any]]:
        """One per file and pass: what it loses, and whether that is within the limit."""
        rows = []
        for (part, mode), counts in self._counts.items():
            if not part:
                continue
            before = self._counts["", mode].errors
            rows.append({
                "part": part, "mode": mode, "num_words": before.reference,
                "wer_float32": _rounded(before.percent), "wer": _rounded(counts.errors.percent),
                "errors_float32": before.errors, "errors": counts.errors.errors,
                "del_float32": before.deletions, "del": counts.errors.deletions,
                "equal_tokens_percent": _rounded(100 * counts.tokens["equal"] / max(1, counts.tokens["all"])),
                "within_limit": counts.errors.errors <= allowed_errors(before.errors, limit_percent),
            })  # fmt: skip
        return rows

    def _whole_blocks(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """(N, T, F) features with silence behind them, T whole blocks; (N,) encoder frames up to the last block of
        each, which every pass hears alike."""
        block = self._geometry.block_frames
        lens = -(-batch.feature_lens.numpy() // (SUBSAMPLING * block)) * block
        features = np.full((len(lens), SUBSAMPLING * int(lens.max()), batch.features.shape[2]), _SILENCE, np.float32)
        for row, frames, length in zip(features, batch.features.numpy(), batch.feature_lens.tolist(), strict=True):
            row[:length] = frames[:length]
        return features, lens

    def _encode(self, features: np.ndarray, lens: np.ndarray) -> dict[Case, np.ndarray]:
        """(N, T, C) encoder output of every case; what is padding in it means nothing."""
        frames: dict[Case, np.ndarray] = {}
        for int8 in (False, True):
            causal = _online(self._open(OnlineSession, STREAMING, int8), features)
            parts = {"": (False, False), STREAMING: (True, False), NONCAUSAL: (False, True), TOGETHER: (True, True)}
            for part, (causal_int8, noncausal_int8) in parts.items():
                if causal_int8 != int8:
                    continue
                session = self._open(NoncausalSession, NONCAUSAL, noncausal_int8)
                if part != NONCAUSAL:
                    frames[part, "streaming"] = causal
                frames[part, "look_ahead"] = _in_blocks(session, causal, self._geometry.block_frames)
                frames[part, "full"] = session.whole(causal, lens)
        for mode in ("streaming", "look_ahead", "full"):
            frames[JOINER, mode] = frames["", mode]
        if LOOK_AHEAD in self._files:
            frames[LOOK_AHEAD, "look_ahead"] = _online(self._open(OnlineSession, LOOK_AHEAD, True), features)
            session = self._open(onnx_session, FULL, True)
            frames[FULL, "full"] = run_session(session, features, SUBSAMPLING * lens)[0][:, : features.shape[1] // 4]
        return frames


def _online(session: OnlineSession, features: np.ndarray) -> np.ndarray:
    state, outputs = session.initial_state(len(features)), []
    for start in range(0, features.shape[1], session.step_frames):
        out, state = session.step(features[:, start : start + session.step_frames], state)
        outputs.append(out)
    return np.concatenate(outputs, axis=1)


def _in_blocks(session: NoncausalSession, causal: np.ndarray, block: int) -> np.ndarray:
    state, outputs, lens = session.initial_state(len(causal)), [], np.full(len(causal), block)
    for start in range(0, causal.shape[1], block):
        out, state = session.step(causal[:, start : start + block], lens, state)
        outputs.append(out)
    return np.concatenate(outputs, axis=1)


def _projection(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The joiner's part that reads encoder output alone, (N, T, C) -> (N, T, D): a graph of its own."""
    import onnx

    proto = onnx.load(str(path))
    graph = proto.graph
    place, node = next((i, node) for i, node in enumerate(graph.node) if graph.input[1].name in node.input)
    name = next(name for name in node.input if name != graph.input[1].name)
    del graph.node[place:], graph.input[1]
    used = {name for node in graph.node for name in node.input}
    weights = [weight for weight in graph.initializer if weight.name in used]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, f"{folder}/projection.onnx")
        session = onnx_session(Path(folder) / "projection.onnx")

    def project(frames: np.ndarray) -> np.ndarray:
        out = run_session(session, frames.reshape(-1, frames.shape[2]))[0]
        return out.reshape(*frames.shape[:2], -1)

    return project


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def measure_loss(meter: LossMeter, manifest: Path, config: Config, limit_percent: float) -> dict[str, Any]:
    """Hear the whole test set; the part of export.json that says what int8 costs and which files stay float32.

    Returns:
      test_set, limit_percent, rows (`LossMeter.rows`) and float32: name -> why that file stays as it is.
    """
    for batch in progress(decode_batches(manifest, config, _BATCH_SECONDS), "int8"):
        meter.hear(batch)
    rows = meter.rows(limit_percent)
    if not rows:
        raise ValueError(f"{manifest} holds no utterance that can be decoded")
    float32: dict[str, str] = {}
    for row in rows:
        logging.info(
            "int8 %-23s %-11s WER %s %%, float32 %s %%; %d deletions, float32 %d; %.2f %% equal tokens",
            row["part"], row["mode"], row["wer"], row["wer_float32"], row["del"], row["del_float32"],
            row["equal_tokens_percent"],
        )
        name = NONCAUSAL if row["part"] == TOGETHER else row["part"]  # streaming alone was good: it stays int8
        if not row["within_limit"] and not (row["part"] == TOGETHER and {STREAMING, NONCAUSAL} & set(float32)):
            float32.setdefault(
                name, f"{row['errors']} word errors in pass {row['mode']}, float32 makes {row['errors_float32']}, "
                f"{limit_percent:g} % more are allowed" + (f" ({TOGETHER} in int8)" if name != row["part"] else ""),
            )  # fmt: skip
    return {
        "test_set": split_name(manifest), "limit_percent": limit_percent,
        "float32": float32, "rows": rows,
    }  # fmt: skip
