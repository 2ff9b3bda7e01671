"""How to decode: the pass, its contexts, the search."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from cascade.config.options import ENCODER_FRAME_MS, MODES, Config, ConfigError, DecodingConfig, Mode
from cascade.search.beam import ModifiedBeamSearch
from cascade.search.greedy import GreedySearch
from cascade.search.hotwords import Hotwords, read_hotwords
from cascade.search.hypothesis import Calibration
from cascade.search.ngram import NgramModel, read_ngram
from cascade.search.rows import Networks
from cascade.search.scorer import NgramScorer, Rescoring, Scorer
from cascade.text.tokens import Tokenizer

STREAMING_MODES = (*MODES, "two_pass")
"""Modes of a stream; two_pass shows the streaming pass, then the look-ahead pass, and ends with the full one."""
METHODS = ("greedy_search", "modified_beam_search")
DEFAULT_CHUNK_MS = 320
DEFAULT_LOOK_AHEAD_MS = 640
DEFAULT_LEFT_CHUNKS = 16


@dataclass(frozen=True)
class DecodingOptions(DecodingConfig):
    """One way to decode: what a model's decoding section has, and the pass, its contexts and the search.

    Raises:
      ConfigError: an unknown mode or method; a context that is not a positive multiple of 40 ms, a look-ahead that is
        not a multiple of the chunk, a beam below 1, a penalty that is not finite.
    """

    mode: Mode | Literal["two_pass"] = "full"
    """streaming | look_ahead | full; two_pass for streams only."""
    method: str = "greedy_search"
    """greedy_search | modified_beam_search."""
    beam: int = 4
    """Hypotheses of modified_beam_search."""
    chunk_ms: int = DEFAULT_CHUNK_MS
    """The causal chunk, in every mode."""
    look_ahead_ms: int = DEFAULT_LOOK_AHEAD_MS
    """The block of modes look_ahead and two_pass."""
    left_context_ms: int = DEFAULT_CHUNK_MS * DEFAULT_LEFT_CHUNKS
    """What a chunk or block sees before its start."""
    rescore: bool = field(default=False, kw_only=True)
    """The language models do not enter the search: they rank the N-best of each segment when it ends."""

    @property
    def calibration(self) -> Calibration:
        return Calibration(self.confidence_slope, self.confidence_offset)

    @classmethod
    def for_model(cls, config: Config, **options: Any) -> DecodingOptions:
        """Options for a model: what is None or not given of its decoding section is as `config.decoding` has it.

        Without a language model there is no LODR either: lm_scale=0 switches both off.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if given.get("lm_scale") == 0:
            given.setdefault("lodr_scale", 0.0)
        chosen = cls(**dataclasses.asdict(config.decoding) | given)
        for file, scale in (("ngram", "lm_scale"), ("lodr", "lodr_scale")):
            if file in given and scale not in given and not getattr(chosen, scale):
                option = "--" + scale.replace("_", "-")
                raise ConfigError(f"--{file} {given[file]} needs {option}: cascade.bin.tune_scales finds it on dev")
        return chosen

    def __post_init__(self) -> None:
        for option, value, choices in (("mode", self.mode, STREAMING_MODES), ("method", self.method, METHODS)):
            if value not in choices:
                raise ConfigError(f"--{option} must be one of {' | '.join(choices)}, got {value!r}")
        for each in dataclasses.fields(self):
            value, option = getattr(self, each.name), "--" + each.name.replace("_", "-")
            if each.type in ("int", int) and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise ConfigError(f"{option} must be a whole number, got {value!r}")
            if each.type in ("float", float) and (not isinstance(value, Real) or isinstance(value, bool)):
                raise ConfigError(f"{option} must be a number, got {value!r}")
        for name in ("chunk_ms", "look_ahead_ms", "left_context_ms"):
            value = getattr(self, name)
            if value <= 0 or value % ENCODER_FRAME_MS:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} must be a positive multiple of {ENCODER_FRAME_MS} ms, got {value}")
        if self.mode in ("look_ahead", "two_pass") and self.look_ahead_ms % self.chunk_ms:
            raise ConfigError(
                f"--look-ahead-ms must be a multiple of --chunk-ms ({self.chunk_ms}), got {self.look_ahead_ms}"
            )
        if self.beam < 1:
            raise ConfigError(f"--beam must be at least 1, got {self.beam}")
        if not math.isfinite(self.blank_penalty):
            raise ConfigError(f"--blank-penalty must be a finite number, got {self.blank_penalty}")
        if self.rescore and self.method != "modified_beam_search":
            raise ConfigError("--rescore needs --method modified_beam_search: greedy search has one hypothesis")
        for name in ("lm_scale", "lodr_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} must be a finite number of at least 0, got {getattr(self, name)}")
        if not 0 < self.hotword_scale < math.inf:
            raise ConfigError(f"--hotword-scale must be a finite number above 0, got {self.hotword_scale}")


def default_left_context_ms(config: Config, chunk_ms: int) -> int:
    """The longest finite left context the model was trained with, for this chunk; 16 chunks if it knows only 'all'."""
    finite = [chunks for chunks in config.context.left_chunks if chunks > 0]
    return chunk_ms * max(finite, default=DEFAULT_LEFT_CHUNKS)


def build_scorers(
    options: DecodingOptions, tokenizer: Tokenizer, read: Callable[..., NgramModel] = read_ngram
) -> list[Scorer | Rescoring]:
    """The scores from outside that the options name; several searches of one thread may share them.

    Args:
      read: as `read_ngram`; one that remembers saves time where only scales change.
    Raises:
      ConfigError: a file without a scale or a scale without its file; LODR or rescoring without a language model; LODR
        of a scale that makes blanks likely the less likely they are.
      FileNotFoundError, ValueError: a file that is missing, no n-gram model, or of other tokens; a phrase that the
        model's tokens cannot say.
    """
    for name, scale in (("ngram", "lm_scale"), ("lodr", "lodr_scale")):
        if getattr(options, scale) and getattr(options, name) is None:
            raise ConfigError(f"--{scale.replace('_', '-')} {getattr(options, scale):g} needs --{name} FILE")
    if options.lodr_scale and not options.lm_scale:
        raise ConfigError(f"--lodr-scale {options.lodr_scale:g} needs --lm-scale: LODR corrects a language model")
    if not options.rescore and options.lodr_scale >= 1 + options.lm_scale:  # the blank's factor is 1 + a - b
        raise ConfigError(
            f"--lodr-scale must be less than 1 + --lm-scale ({1 + options.lm_scale:g}), got {options.lodr_scale:g}"
        )
    if options.rescore and not options.lm_scale:
        raise ConfigError("--rescore needs --ngram FILE and --lm-scale: it ranks the hypotheses by them")
    symbols = tuple(tokenizer.id_to_symbol(token) for token in range(tokenizer.vocab_size))
    scorers = []
    for name, weight in (("ngram", options.lm_scale), ("lodr", -options.lodr_scale)):
        path = getattr(options, name)
        if weight and not Path(path).is_file():
            raise FileNotFoundError(f"--{name} {path} not found")
        if weight:
            scorers.append(NgramScorer(read(path, symbols), weight))
    if options.rescore:
        scorers = [Rescoring(scorer) for scorer in scorers]
    if options.hotwords is not None:
        if not Path(options.hotwords).is_file():
            raise FileNotFoundError(f"--hotwords {options.hotwords} not found")
        try:
            phrases = read_hotwords(options.hotwords)
            if not phrases:
                logging.getLogger(__name__).warning("--hotwords %s holds no phrase", options.hotwords)
            scorers.append(Hotwords(tokenizer, phrases, options.hotword_scale))
        except ValueError as error:
            raise ValueError(f"{options.hotwords}: {error}") from error
    return scorers


def build_search(
    networks: Networks, options: DecodingOptions, unk_id: int | None, scorers: Sequence[Scorer | Rescoring] = ()
) -> GreedySearch | ModifiedBeamSearch:
    """The search that `options.method` names."""
    if options.method == "greedy_search":
        return GreedySearch(networks, options.blank_penalty, unk_id, scorers)
    return ModifiedBeamSearch(networks, options.beam, options.blank_penalty, unk_id, scorers)
