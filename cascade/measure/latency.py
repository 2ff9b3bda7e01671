"""Latency of trained models on speech: when words come in every mode, and what the steps cost to compute."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from cascade.config.options import FRAME_SHIFT_MS
from cascade.measure.alignment import align_batch
from cascade.measure.compute import Spoken, TimedModel, time_mode
from cascade.measure.delay import (
    SpokenWord,
    algorithmic_delay,
    flicker,
    measure_delays,
    summary,
    usable_words,
    watch_streams,
)
from cascade.search.methods import STREAMING_MODES, DecodingOptions
from cascade.stream.words import words_of

FEWEST_UTTERANCES = 50
"""Utterances that the timing of chunks hears at least."""
_TIMED_SHARE = 8
"""The steps of one utterance in so many are timed in every mode."""
_ALIGNED_AT_ONCE = 10
Alignments = Mapping[str, Sequence[SpokenWord]]
"""The words of utterances by id."""


def own_alignment(timed: TimedModel, speech: Sequence[Spoken], options: DecodingOptions) -> Alignments:
    """The Viterbi alignment of every utterance that has one and no unknown token."""
    tokenizer, alignments = timed.tokenizer, {}
    tokens = {spoken.id: tokenizer.encode(" ".join(spoken.text)) for spoken in speech}
    known = [spoken for spoken in speech if tokens[spoken.id] and tokenizer.unk_id not in tokens[spoken.id]]
    for begin in range(0, len(known), _ALIGNED_AT_ONCE):
        batch = known[begin : begin + _ALIGNED_AT_ONCE]
        features = pad_sequence([spoken.features for spoken in batch], batch_first=True)
        lens = torch.tensor([spoken.features.shape[0] for spoken in batch])
        sequences = [tokens[spoken.id] for spoken in batch]
        aligned = align_batch(timed.model, features, lens, sequences, options, timed.config.loss.rnnt_type)
        for spoken, hypothesis in zip(batch, aligned, strict=True):
            if hypothesis is not None:
                duration = spoken.features.shape[0] * FRAME_SHIFT_MS / 1000
                alignments[spoken.id] = words_of(hypothesis, tokenizer, duration=duration)
    return alignments


def true_ends(
    timed: TimedModel, speech: Sequence[Spoken], given: Alignments, options: DecodingOptions
) -> tuple[dict[str, list[float]], bool]:
    """The ends of the words of every utterance that has an alignment; False: the model's own alignment, not a given."""

    def usable(alignments: Alignments) -> dict[str, list[float]]:
        pairs = ((spoken, alignments[spoken.id]) for spoken in speech if spoken.id in alignments)
        ends = {spoken.id: usable_words(words, spoken.text, timed.tokenizer) for spoken, words in pairs}
        return {name: values for name, values in ends.items() if values}

    if ends := usable(given):
        return ends, True
    return usable(own_alignment(timed, speech, options)), False


def options_by_mode(timed: TimedModel, contexts: Mapping[str, int]) -> dict[str, DecodingOptions]:
    modes = STREAMING_MODES
    return {mode: DecodingOptions(mode=mode, blank_penalty=timed.blank_penalty, **contexts) for mode in modes}


def delay_summary(
    timed: TimedModel, given: Alignments, num_utterances: int, source: str, contexts: Mapping[str, int]
) -> dict[str, Any] | None:
    """The delays of one model for latency.json; None where no utterance has an alignment. See `measure_latency`."""
    start, options = time.perf_counter(), options_by_mode(timed, contexts)
    count = min(num_utterances, len(timed.speech))
    chosen = [timed.speech[len(timed.speech) * place // count] for place in range(count)]
    ends, is_given = true_ends(timed, chosen, given, options["full"])
    if not ends:
        logging.warning("%s: no utterance has an alignment, delays are left out", timed.name)
        return None
    speech = [spoken for spoken in chosen if spoken.id in ends]
    texts, features = [spoken.text for spoken in speech], [spoken.features for spoken in speech]
    streams = {mode: watch_streams(timed.model, timed.tokenizer, options[mode], features) for mode in STREAMING_MODES}
    modes = {}
    for mode, watched in streams.items():
        last_frames = [first_pass.last_frame for first_pass in streams["streaming" if mode == "full" else mode]]
        delays = measure_delays(watched, texts, [ends[spoken.id] for spoken in speech], options[mode], last_frames)
        modes[mode] = algorithmic_delay(options[mode]) | delays.row()
    logging.info("%s: delays of %d utterances in %.1f s", timed.name, len(speech), time.perf_counter() - start)
    durations = [watched.duration for watched in streams["full"]]
    silences = [duration - ends[spoken.id][-1] for duration, spoken in zip(durations, speech, strict=True)]
    return {
        "reference": source if is_given else "model-relative",
        "num_utterances": len(speech),
        "num_left_out": len(chosen) - len(speech),
        "audio_seconds": round(sum(durations), 2),
        "num_reference_words": sum(map(len, texts)),
        **summary("silence_at_end_ms", [1000 * silence for silence in silences]),
        **flicker(streams["two_pass"]),
        "modes": modes,
    }


def measure_latency(
    models: Sequence[TimedModel], given: Alignments, source: str, num_utterances: int, contexts: dict[str, int]
) -> list[dict[str, Any] | None]:
    """The delays and, timed in turns, the compute of trained models, mode by mode; None without any alignment.

    Args:
      given: where the words of the references are, by id of the utterance; `source` names it.
      num_utterances: of each model's speech, evenly spaced.
      contexts: chunk_ms, look_ahead_ms and left_context_ms of DecodingOptions.
    """
    summaries = []
    timed_by_mode: dict[str, list] = {mode: [] for mode in STREAMING_MODES}
    for timed in models:
        summaries.append(delay_summary(timed, given, num_utterances, source, contexts))
        speech = timed.speech[:: _TIMED_SHARE if len(timed.speech) >= FEWEST_UTTERANCES else 1]
        features = [spoken.features for spoken in speech]
        for mode, mode_options in options_by_mode(timed, contexts).items():
            timed_by_mode[mode].append((timed.model, timed.tokenizer, mode_options, features))
    for mode in STREAMING_MODES:
        for times, delays in zip(time_mode(timed_by_mode[mode]), summaries, strict=True):
            if delays:
                delays["modes"][mode] |= times.row()
    return summaries
