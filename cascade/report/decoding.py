"""Files of one decoding: hyps.jsonl, nbest.jsonl, wer.txt and result.json, a row of results.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cascade.config.options import ENCODER_FRAME_MS
from cascade.measure.calibration import expected_calibration_error
from cascade.measure.wer import Score, oracle, score, write_score
from cascade.provenance import command_line, git_commit
from cascade.search.hypothesis import Hypothesis
from cascade.search.methods import DecodingOptions
from cascade.text.tokens import Tokenizer


def hypothesis_fields(hypothesis: Hypothesis, tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields of one hypothesis in hyps.jsonl and nbest.jsonl; times in seconds."""
    return {
        "hyp": tokenizer.decode(hypothesis.tokens),
        "tokens": [tokenizer.id_to_symbol(token) for token in hypothesis.tokens],
        "timestamps": [round(frame * ENCODER_FRAME_MS / 1000, 2) for frame in hypothesis.timestamps],
        "log_probs": [round(log_prob, 4) for log_prob in hypothesis.token_log_probs],
        "log_prob": round(hypothesis.log_prob, 4),
        "external_score": round(hypothesis.external_score, 4),
    }


def utterance_lines(
    ids: list[str], texts: list[str], n_best: list[list[Hypothesis]], tokenizer: Tokenizer, speakers: dict[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The objects of hyps.jsonl and nbest.jsonl for one batch; the reference in the form in which it is scored."""
    for name, text, hypotheses in zip(ids, texts, n_best, strict=True):
        utterance = {"id": name, "ref": tokenizer.normalize(text)}
        if name in speakers:
            utterance["speaker"] = speakers[name]
        fields = [hypothesis_fields(hypothesis, tokenizer) for hypothesis in hypotheses]
        ranked = [
            {**values, "score": round(hypothesis.score, 6)}
            for values, hypothesis in zip(fields, hypotheses, strict=True)
        ]
        yield {**utterance, **fields[0]}, {**utterance, "nbest": ranked}


def oracle_fields(n_best: list[dict[str, Any]], wanted: int | None) -> tuple[dict[str, Any], list[str]]:
    """The oracle's part of result.json and wer.txt; nothing where --nbest was not given."""
    if wanted is None:
        return {}, []
    best = oracle((line["id"], line["ref"], [values["hyp"] for values in line["nbest"]]) for line in n_best)
    row = {"nbest": wanted, "oracle_wer": None if best.percent is None else round(best.percent, 3)}
    return row, [f"Oracle WER, the best of {wanted}: {best}"]


def calibration_fields(scored: list[tuple[float, bool]], options: DecodingOptions) -> dict[str, float | None]:
    """The calibration error of a row: in force, and without the model's map.

    Args:
      scored: (confidence before the map, right) of each word.
    """
    calibrated = [(float(options.calibration(confidence)), right) for confidence, right in scored]
    errors = {"ece": expected_calibration_error(calibrated), "ece_uncalibrated": expected_calibration_error(scored)}
    return {name: None if error is None else round(error, 4) for name, error in errors.items()}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object per line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def score_fields(options: DecodingOptions) -> dict[str, Any]:
    """Fields of a row of results.json about external scores: names of files, null for what was not used."""
    return {
        "ngram": Path(options.ngram).name if options.lm_scale else None,
        "lm_scale": options.lm_scale or None,
        "lodr_scale": options.lodr_scale or None,
        "hotwords": Path(options.hotwords).name if options.hotwords else None,
        "hotword_scale": options.hotword_scale if options.hotwords else None,
        "rescore": options.rescore,
    }


def result_row(
    options: DecodingOptions, system: dict[str, Any], scored: Score, num_set_aside: int
) -> dict[str, Any]:
    """One row of results.json; what only other programs measure is null until `report` fills it in."""
    words = scored.words
    return {
        **system,
        "mode": options.mode,
        "method": options.method,
        "wer": None if words.percent is None else round(words.percent, 3),
        "cer": None if scored.characters.percent is None else round(scored.characters.percent, 3),
        "num_words": words.reference,
        "num_characters": scored.characters.reference,
        "errors": words.errors,
        "ins": words.insertions,
        "del": words.deletions,
        "sub": words.substitutions,
        "num_utterances": len(scored.utterances),
        "num_set_aside": num_set_aside,
        "chunk_ms": options.chunk_ms,
        "look_ahead_ms": options.look_ahead_ms if options.mode == "look_ahead" else None,
        "left_context_ms": options.left_context_ms,
        "beam": options.beam if options.method == "modified_beam_search" else None,
        "blank_penalty": options.blank_penalty,
        **score_fields(options),
        "chunk_compute_ms_p50": None,
        "chunk_compute_ms_p95": None,
        "chunk_compute_ms_p99": None,
        "rtf": None,
        "commit": git_commit(),
        "command": command_line(),
    }


def write_decoding(
    out: Path, lines: list[tuple[dict[str, Any], dict[str, Any]]], options: DecodingOptions, system: dict[str, Any],
    set_aside: Sequence[tuple[str, str]], nbest: int | None,
) -> Score:
    """Score one decoding and write its folder.

    Args:
      lines: of all utterances, as `utterance_lines` gives them.
      system: what the row says of the model, the test set and the machine.
      set_aside: ids and reasons of utterances that were not decoded.
      nbest: how many hypotheses each utterance was to have; None: one, without nbest.jsonl.
    """
    lines = sorted(lines, key=lambda pair: pair[0]["id"])
    best, n_best = [line for line, _ in lines], [line for _, line in lines]
    scored = score((line["id"], line["ref"], line["hyp"]) for line in best)
    oracle_row, notes = oracle_fields(n_best, nbest)
    row = result_row(options, system, scored, len(set_aside)) | oracle_row
    out.mkdir(parents=True, exist_ok=True)
    for earlier in ("result.json", "nbest.jsonl"):  # the first one says that the folder is whole
        (out / earlier).unlink(missing_ok=True)
    write_lines(out / "hyps.jsonl", best)
    if nbest is not None:
        write_lines(out / "nbest.jsonl", n_best)
    notes += [f"Set aside: {len(set_aside)}" + (" (not in the totals)" if set_aside else "")]
    notes += [f"  {name}: {reason}" for name, reason in set_aside]
    with open(out / "wer.txt", "w", encoding="utf-8") as file:
        write_score(scored, file, notes)
    (out / "result.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    return scored
