"""RESULTS.md: the tables people read, each number with the command, commit and machine that made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cascade.models.transducer import MODES
from cascade.report.collect import MODELS, Experiment, Row, is_aided, ratio
from cascade.search.methods import METHODS, STREAMING_MODES

_PARTS_FIRST = ("front end", "causal encoder", "non-causal encoder", "predictor", "joiner", "total")


def write_report(experiment: Experiment, title: str, plots: Sequence[tuple[str, str]], seeds: str = "") -> str:
    """The text of RESULTS.md.

    Args:
      title: names the recipe.
      plots: (caption, path relative to RESULTS.md).
      seeds: the section of several seeds, or nothing.
    """
    sections = [f"# Results: {title}"]
    if experiment.missing:
        sections.append(
            "**Incomplete.** The tables show what is there; missing:\n\n" + _bullets(experiment.missing)
        )
    sections += [_against_the_paper(experiment)]
    for test_set in dict.fromkeys(row["test_set"] for row in experiment.rows):
        rates = ("cer", "wer") if _has_character_tokens(experiment) else ("wer",)
        sections += [_rate_table(experiment, test_set, rate) for rate in rates]
    sections += [_aided_table(experiment), seeds]
    latency = [row | {"model": name} for name, row in experiment.latency.items()]
    sections += [_parts_table(experiment), _latency_table(experiment), delay_table(latency), _int8_section(experiment)]
    sections += [f"## {caption}\n\n![{caption}]({path})" for caption, path in plots]
    sections += [_detail_table(experiment), _provenance(experiment)]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table with padded cells; the first `left` columns are flush left, the others right."""
    rows = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _first_rows(experiment: Experiment) -> dict[str, Row]:
    """One row of each model, for what does not depend on mode and method."""
    rows: dict[str, Row] = {}
    for row in experiment.rows:
        rows.setdefault(row["model"], row)
    return {name: rows[name] for name in MODELS if name in rows}


def _pair(experiment: Experiment, key: str, mode: str, digits: int, scale: float = 1.0) -> tuple[str, str]:
    rows = (experiment.find(name, mode, "greedy_search") for name in ("teacher", "student"))
    values = [None if row is None else row.get(key) for row in rows]
    return tuple(number(None if value is None else value * scale, digits) for value in values)


def _against_the_paper(experiment: Experiment) -> str:
    """Ratios student / teacher: those of arXiv 2312.09842 and those measured here."""
    lines = [
        ("Size: parameters for decoding, M", "0.50", "num_params", "full", 3, 1e-6),
        *(
            (f"{rate.upper()}, {mode}, greedy search, %", "about 1", rate, mode, 2, 1.0)
            for rate in (("cer", "wer") if _has_character_tokens(experiment) else ("wer",)) for mode in reversed(MODES)
        ),
        ("Latency: compute per chunk, median ms", "0.70", "chunk_compute_ms_p50", "streaming", 2, 1.0),
        ("Latency: real-time factor, one thread", "0.70", "rtf", "streaming", 4, 1.0),
    ]
    rows = []
    for name, paper, key, mode, digits, scale in lines:
        teacher, student = _pair(experiment, key, mode, digits, scale)
        rows.append([name, paper, teacher, student, number(ratio(experiment, key, mode, "greedy_search"), 3)])
    text = (
        "## Against the paper\n\n"
        "arXiv 2312.09842 reports a student of half the size, no noticeable loss of WER and 30 % less latency. Corpus, "
        "models and length of training here are not the paper's, and a student that starts from its teacher's layers "
        "stands on the training of both. Latency here is compute alone, the part of a user's waiting that a model's "
        f"size changes. Error rates are those on `{experiment.test_set}`.\n\n"
    )
    text += table(["", "paper", "teacher", "student", "student / teacher"], rows)
    if len(experiment.full_size) > 1:
        first, *others = experiment.full_size
        for other in others:
            text += (
                f"\n\nAt full size with random weights, `{other['model']}` ({other['num_params'] / 1e6:.1f} M) has "
                f"{other['num_params'] / first['num_params']:.3f} of the parameters of `{first['model']}` "
                f"({first['num_params'] / 1e6:.1f} M) and "
                f"{other['chunk_compute_ms_p50'] / first['chunk_compute_ms_p50']:.3f} of its median compute per chunk."
            )
    return text


def _has_character_tokens(experiment: Experiment) -> bool:
    """True where the character error rate is a number of its own: with character tokens, and without spaces."""
    return any(row.get("token_kind") == "char" for row in experiment.rows)


def _rate_table(experiment: Experiment, test_set: str, rate: str) -> str:
    """Table of models, modes and methods; rate: wer | cer."""
    short = {"greedy_search": "greedy", "modified_beam_search": "beam"}
    header = ["model", "params M", *(f"{mode} {short[method]}" for mode in MODES for method in METHODS)]
    rows = []
    for name, first in _first_rows(experiment).items():
        decoded = [experiment.find(name, mode, method, test_set) for mode in MODES for method in METHODS]
        cells = [number(None if row is None else row[rate]) for row in decoded]
        rows.append([name, number(first["num_params"] / 1e6, 3), *cells])
    any_row = next(row for row in experiment.rows if row["test_set"] == test_set)
    unit, count = ("words", any_row["num_words"]) if rate == "wer" else ("characters", any_row.get("num_characters"))
    note = f", {count} {unit}, one error is {100 / count:.2f} points" if count else ""
    beams = sorted({row["beam"] for row in experiment.rows if row["beam"] and not is_aided(row)})
    return (
        f"## {'Word' if rate == 'wer' else 'Character'} error rate, %, on `{test_set}`\n\n"
        f"{any_row['num_utterances']} utterances{note}. "
        f"Causal chunk {_all(experiment, 'chunk_ms')} ms, look-ahead block {_all(experiment, 'look_ahead_ms')} ms, "
        f"left context {_all(experiment, 'left_context_ms')} ms"
        + (f", beam {', '.join(map(str, beams))}" if beams else "")
        + ". `student_alone` has the student's shape and no teacher.\n\n"
        + table(header, rows)
    )


def _aided_table(experiment: Experiment) -> str:
    """Rows of searches that a language model or hotwords helped, beside those of the transducer alone."""
    aided = [row for row in experiment.rows if is_aided(row)]
    if not aided:
        return ""
    rows = []
    for row in aided:
        alone = experiment.find(row["model"], row["mode"], row["method"], row["test_set"])
        scales = [number(row.get(key)) for key in ("lm_scale", "lodr_scale")]
        rows.append([
            row["test_set"], row["model"], row["mode"], f"{row['method']}{', rescoring' * bool(row.get('rescore'))}",
            row.get("ngram") or "-", row.get("hotwords") or "-", *scales, str(row["beam"] or "-"),
            number(alone and alone["wer"]), number(row["wer"]),
        ])  # fmt: skip
    header = ["test set", "model", "mode", "search", "language model", "hotwords", "LM scale", "LODR scale", "beam"]
    return (
        "## With scores from outside\n\nWord error rate, %, of the transducer alone and with a language model (less "
        "LODR, a low-order model of the training transcripts) or hotwords.\n\n"
        + table([*header, "alone", "with"], rows, left=6)
    )


def _all(experiment: Experiment, key: str) -> str:
    values = sorted({row[key] for row in experiment.rows if row[key] is not None})
    return ", ".join(map(str, values)) or "-"


def _parts_table(experiment: Experiment) -> str:
    models = _first_rows(experiment)
    parts = [part for part in _PARTS_FIRST if any(part in row["params_by_part"] for row in models.values())]
    rows = []
    for part in parts:
        counts = [row["params_by_part"].get(part) for row in models.values()]
        rows.append([part, *("-" if count is None else f"{count:,}" for count in counts), *_share(models, counts)])
    sizes = [row["size_bytes"] for row in models.values()]
    rows.append(["float32 file, MB", *(number(size / 1e6, 2) for size in sizes), *_share(models, sizes)])
    heads = [row["num_params_training"] for row in models.values()]
    rows.append(["training-only heads", *(f"{count:,}" for count in heads), *_share(models, heads)])
    header = ["part", *models, *(["student / teacher"] if {"student", "teacher"} <= set(models) else [])]
    return (
        "## Parameters by part\n\nWhat decoding needs; a tied matrix counts once, under the joiner.\n\n"
        + table(header, rows)
    )


def _share(models: dict[str, Row], counts: Sequence[int | None]) -> list[str]:
    if not {"student", "teacher"} <= set(models):
        return []
    by_name = dict(zip(models, counts, strict=True))
    teacher, student = by_name["teacher"], by_name["student"]
    return [number(student / teacher, 3) if teacher and student is not None else "-"]


def _latency_table(experiment: Experiment) -> str:
    timed = [experiment.latency[name] for name in MODELS if name in experiment.latency]
    groups = {"Trained models": timed, "Full size, random weights": experiment.full_size}
    blocks = [compute_table(rows, title) for title, rows in groups.items() if rows]
    if not blocks:
        return ""
    return (
        "## Compute per chunk of the streaming pass\n\nCausal encoder and greedy search of one stream, without "
        "features; models of one run are timed in turns, chunk by chunk. Memory is the peak of a fresh process above "
        "what its libraries take.\n\n" + "\n\n".join(blocks)
    )


def compute_table(rows: Sequence[Row], title: str) -> str:
    """Timed models beside each other; ratios are to the first one."""
    first = rows[0]
    cells = [
        [
            row["model"], number(row["num_params"] / 1e6, 2),
            *(number(row[f"chunk_compute_ms_p{percent}"]) for percent in (50, 95, 99)), number(row["rtf"], 4),
            number(row["chunk_compute_ms_p50"] / first["chunk_compute_ms_p50"], 3),
            number(row.get("peak_memory_mb"), 0),
        ]
        for row in rows
    ]
    header = ["model", "params M", "p50 ms", "p95 ms", "p99 ms", "RTF", f"p50 / {first['model']}", "memory MB"]
    return (
        f"{title}: {first['num_chunks']} chunks of {first['chunk_ms']} ms each, left context "
        f"{first['left_context_ms']} ms, {first['threads']} thread{'s' if first['threads'] > 1 else ''}, "
        f"{first['features']} as input, about {first['symbols_per_second']:.1f} symbols a second.\n\n"
        + table(header, cells)
        + ("" if len({row["command"] for row in rows}) == 1 else "\n\nNot timed in one run: the ratios are rough.")
    )


def _int8_section(experiment: Experiment) -> str:
    blocks = []
    for name, metadata in experiment.exports.items():
        if (int8 := metadata.get("int8")) is not None:
            sizes = ", ".join(
                f"{new} {metadata['bytes'][new] / 1e6:.2f} MB ({metadata['bytes'][new] / metadata['bytes'][old]:.2f})"
                for old, new in int8["files"].items()
            )
            blocks += [f"{name}: {sizes or 'no file'}; in brackets the share of float32's size.", int8_table(int8)]
            blocks += [f"{file} stays float32: {reason}." for file, reason in int8["float32"].items()]
    return "## int8\n\n" + "\n\n".join(blocks) if blocks else ""


def int8_table(int8: Row) -> str:
    """Table of the word errors that 8 bits cost, a row per file and pass; `int8` is that part of export.json."""
    if not int8["rows"]:
        return "What they cost in words was not measured."
    rows = [
        [
            row["part"], row["mode"], number(row["wer_float32"]), number(row["wer"]),
            str(row["errors"] - row["errors_float32"]), str(row["del_float32"]), str(row["del"]),
            number(row["equal_tokens_percent"]), "yes" if row["within_limit"] else "NO",
        ]
        for row in int8["rows"]
    ]
    header = ["in int8", "pass", "WER float32", "WER int8", "more errors", "del float32", "del int8"]
    return (
        f"Test set `{int8['test_set']}`, {int8['rows'][0]['num_words']} words, greedy search. A file that makes over "
        f"{int8['limit_percent']:g} % more word errors in a pass (rounded up to a whole error) stays float32. Silence "
        "follows each recording up to a whole block, so float32 may differ by a few words from the results above.\n\n"
        + table([*header, "equal tokens %", "within limit"], rows, left=2)
    )


def delay_table(timed: Sequence[Row]) -> str:
    """Delays of words, per model and mode, and what later passes change; nothing where none were measured."""
    measured = [(row["model"], row["delays"]) for row in timed if row.get("delays")]
    if not measured:
        return ""
    rows, notes = [], []
    for name, delays in measured:
        for mode in STREAMING_MODES:
            values = delays["modes"][mode]
            wait = "the utterance"
            if values["algorithmic_delay_ms_max"] is not None:
                ends = (values[f"algorithmic_delay_ms_{key}"] for key in ("mean", "max"))
                wait = " / ".join(number(value, 0) for value in ends)
            cells = (
                " / ".join(number(values[f"{kind}_delay_ms_{key}"], 0) for key in ("mean", "p50", "p90"))
                for kind in ("emission", "word", "final", "endpoint")
            )
            rows.append([name, mode, wait, *cells, number(values["final_compute_ms_p50"], 1)])
        notes.append(
            f"{name}: {delays['num_utterances']} utterances ({delays['num_left_out']} left out), "
            f"{delays['modes']['streaming']['num_correct_words']} of {delays['num_reference_words']} words correct in "
            f"the first pass; in two_pass, later ones change {delays['num_changed_words']} of {delays['num_words']} "
            f"({number(delays['changed_words_percent'])} %; {delays['changed_by_look_ahead']} by the look-ahead pass, "
            f"{delays['changed_by_full']} by the full one), {number(delays['flicker_per_minute'])} a minute"
        )
    references = sorted({delays["reference"] for _, delays in measured})
    truth = {
        "true": "the corpus says when its words end",
        "model-relative": "model-relative: words end where each model's own full pass, aligned with the reference, "
        "says them",
    }
    delays = measured[0][1]
    header = ["model", "mode", "waits mean / max", "emission", "word on screen", "final text", "at an endpoint"]
    return (
        "## Delays, ms\n\nMean / median / 90th percentile after the true end of a word; "
        + "; ".join(truth.get(name, f"word ends from {name}") for name in references)
        + ". *Waits*: what a moment of audio waits for its chunk or block. *Emission*: the frame that says a correct "
        "word. *Word on screen*: the audio that had come in when the word stood there to stay. *Final text*: of the "
        "whole utterance, after its last word; the full pass has it when the stream is closed, here at the end of "
        f"the recording, {number(delays['silence_at_end_ms_mean'], 0)} ms later on average. *At an endpoint*: "
        "when nobody closes the stream and the silence rule ends the segment. *Compute* comes on top: median of the "
        "last step, one thread.\n\n"
        + table([*header, "compute"], rows, left=2) + "\n\n" + _bullets(notes)
    )


def _detail_table(experiment: Experiment) -> str:
    header = ["model", "mode", "method", "test set", "WER %", "CER %"]
    header += ["language model", "errors", "ins", "del", "sub", "words", "set aside", "ECE %", "uncalibrated"]
    rows = [
        [
            row["model"], row["mode"], row["method"], row["test_set"], number(row["wer"]), number(row["cer"]),
            row.get("ngram") or "-",
            *(str(row.get(key, "-")) for key in ("errors", "ins", "del", "sub", "num_words", "num_set_aside")),
            *(_percent(row.get(name)) for name in ("ece", "ece_uncalibrated")),
        ]
        for row in experiment.rows
    ]
    note = "ECE: expected calibration error of word confidences, with the model's calibration and without it."
    return "## Every decoding\n\n" + table(header, rows, left=4) + f"\n\n{note}"


def _provenance(experiment: Experiment) -> str:
    """The commands, grouped by what they made."""
    lines = []
    for name, summary in experiment.summaries.items():
        title = f"train {name} ({summary.get('train_minutes', '?')} min, seed {summary.get('seed', '?')})"
        lines.append((title, summary))
    lines += [(f"decode {row['model']}", row) for row in experiment.rows]
    lines += [(f"time {name}", row) for name, row in experiment.latency.items()]
    lines += [("time full size", row) for row in experiment.full_size]
    lines += [(f"export {name}", row) for name, row in experiment.exports.items()]
    machines = list(dict.fromkeys(row.get("machine", "unknown machine") for _, row in lines))
    commands: dict[tuple[str, str], list[str]] = {}
    for title, row in lines:
        commands.setdefault((row.get("command", "unknown command"), row.get("commit", "unknown")), []).append(title)
    text = "## Commands\n\nMachine: " + "; ".join(machines) + ".\n"
    for (command, commit), whats in commands.items():
        text += f"\n- {'; '.join(dict.fromkeys(whats))}; commit {commit}\n  `{command}`"
    return text
