"""Words to token ids and back: SentencePiece BPE pieces, characters, or whole words.

Every kind has the blank `<blk>` as id 0 and `<unk>`; a token that begins a word carries the mark U+2581, so that
joining the symbols and turning the marks into spaces gives the text (as sherpa-onnx does with tokens.txt).

A tokenizer's folder holds tokens.txt ("symbol id" per line), tokenizer.json (kind and the form of the text), for bpe
and char tokens.model (SentencePiece), for bpe also bpe.vocab (piece<TAB>score, which sherpa-onnx needs for hotwords).
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.config.options import ConfigError, TokenConfig
from cascade.text.normal import INVISIBLE, WORD_MARK, drop_idle_spaces, normalize_text, normalizer

if TYPE_CHECKING:  # decoding does without it
    from sentencepiece import SentencePieceProcessor

BLANK, UNKNOWN = "<blk>", "<unk>"
BLANK_ID, UNKNOWN_ID = 0, 1
UNKNOWN_SURFACE = "\u2047"  # what <unk> decodes to


Character = tuple[str, int, int]
"""One decoded character, and the places in the ids of the first and the last token that it is made of."""


class Tokenizer:
    """Encodes text to ids and decodes ids to text; `Tokenizer.load(dir)` reads one, `train_tokenizer` makes one."""

    blank_id = BLANK_ID
    unk_id = UNKNOWN_ID

    def __init__(
        self, kind: str, case: str, symbols: list[str], model_file: Path | None = None, normal_form: str = "nfc",
        strip_punctuation: bool = False,
    ) -> None:
        self.kind = kind
        self.case = case
        self.normal_form = normal_form
        self.strip_punctuation = strip_punctuation
        self._symbols = symbols
        self._ids = {symbol: index for index, symbol in enumerate(symbols)}
        self._model_file = model_file
        matches = (re.fullmatch("<0x([0-9A-F]{2})>", symbol) for symbol in (symbols if model_file else ()))
        self._bytes = {index: bytes.fromhex(match[1]) for index, match in enumerate(matches) if match}

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a folder that `train_tokenizer` wrote.

        Raises:
          ValueError: a file is missing or not what it should be; whether tokens.model fits is seen with the first text.
        """
        directory = Path(directory)
        for name in ("tokenizer.json", "tokens.txt"):
            if not (directory / name).is_file():
                raise ValueError(f"{directory / name} not found: train the tokenizer or copy its whole folder")
        try:
            metadata = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
            kind, case = metadata["kind"], metadata["case"]
            form = {name: metadata[name] for name in ("normal_form", "strip_punctuation") if name in metadata}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{directory / 'tokenizer.json'} must hold kind and case ({error})") from error
        symbols = _read_symbols(directory / "tokens.txt")
        model_file = None if kind == "word" else directory / "tokens.model"
        if model_file is not None and not model_file.is_file():
            raise ValueError(f"{model_file} not found: kind {kind} needs it; copy the tokenizer's whole folder")
        return cls(kind, case, symbols, model_file, **form)

    @cached_property
    def _processor(self) -> SentencePieceProcessor | None:
        """Encoder of text into tokens, loaded when text comes; None: words are tokens.

        Raises:
          ImportError: sentencepiece is missing.
          ValueError: its model is not of this tokenizer.
        """
        if self._model_file is None:
            return None
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(
                f"turning text into {self.kind} tokens needs the package sentencepiece: pip install sentencepiece"
            ) from error
        pieces, num_symbols = SentencePieceProcessor(model_file=str(self._model_file)), len(self._symbols)
        if len(pieces) != num_symbols:
            raise ValueError(
                f"{self._model_file} has {len(pieces)} pieces, tokens.txt {num_symbols}: not of one tokenizer"
            )
        return pieces

    @property
    def vocab_size(self) -> int:
        """Number of tokens V, blank and <unk> included."""
        return len(self._symbols)

    def normalize(self, text: str) -> str:
        """`text` as it is tokenised and scored."""
        return normalize_text(
            text, self.case, self.normal_form, self.strip_punctuation, keep_spaces=self.kind == "word"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; what the vocabulary lacks becomes unk_id."""
        text = self.normalize(text)
        if self._processor is not None:
            return self._processor.encode(text)
        return [self._ids.get(WORD_MARK + word, UNKNOWN_ID) for word in text.split()]

    def unknown_characters(self, text: str) -> set[str]:
        """The characters of `text` (for kind word: the words) that would become <unk>."""
        text = self.normalize(text)
        if self._processor is None:
            return {word for word in text.split() if WORD_MARK + word not in self._ids}
        if UNKNOWN_ID not in self._processor.encode(text):
            return set()
        return {character for character in set(text) if UNKNOWN_ID in self._processor.encode(character)}

    def decode(self, ids: Iterable[int], complete: bool = True) -> str:
        """Text of token ids; blanks are left out, <unk> shows as \u2047, bytes that are no UTF-8 show as U+FFFD.

        Args:
          complete: False while more ids may come: the bytes of a last character that is not whole yet are left out.
        """
        text = "".join([piece[0] for piece in self.characters(ids, complete)]).replace(WORD_MARK, " ")
        text = " ".join(text.split())
        return text if self.kind == "word" else drop_idle_spaces(text)

    def characters(self, ids: Iterable[int], complete: bool = True) -> list[Character]:
        """Characters of which `decode` makes its text, word marks included, with the tokens they come from."""
        characters: list[Character] = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        started: int | None = None  # the place of the first byte of a character that is not whole yet

        def take(data: bytes, place: int, final: bool) -> None:
            nonlocal started
            started = place if started is None else started
            text = decoder.decode(data, final)
            shown = (character for character in text if ord(character) not in INVISIBLE)
            characters.extend((character, started, place) for character in shown)
            if not decoder.getstate()[0]:
                started = None
            elif text:
                started = place

        last = -1
        for place, index in enumerate(ids):
            if index == BLANK_ID:
                continue
            if index in self._bytes:
                take(self._bytes[index], place, False)
                last = place
                continue
            if started is not None:
                take(b"", last, True)
            symbol = self._symbols[index]
            if index == UNKNOWN_ID:
                symbol = f"{WORD_MARK}{UNKNOWN_SURFACE}" if self._model_file is None else UNKNOWN_SURFACE
            characters += [(character, place, place) for character in symbol]
        if started is not None and complete:
            take(b"", last, True)
        return characters

    def id_to_symbol(self, index: int) -> str:
        return self._symbols[index]


def train_tokenizer(texts: Iterable[str], config: TokenConfig, out_dir: str | Path) -> Tokenizer:
    """Train a tokenizer on transcripts and write its files to `out_dir`, tokenizer.json last: with it, it is whole.

    Raises:
      ConfigError: tokens.vocab_size does not fit the text.
      ValueError: no text.
    """
    texts = [text for text in map(normalizer(config), texts) if text]
    if not texts:
        raise ValueError("no text to train the tokenizer on: check the transcripts of the train split")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".training-", dir=out_dir) as folder:
        temporary = Path(folder)
        if config.kind == "word":
            symbols = _count_words(texts, config.vocab_size)
        else:
            symbols = _train_sentencepiece(texts, config, temporary)
        lines = [f"{symbol} {index}\n" for index, symbol in enumerate(symbols)]
        (temporary / "tokens.txt").write_text("".join(lines), encoding="utf-8")
        metadata = {
            "kind": config.kind, "case": config.case, "normal_form": config.normal_form,
            "strip_punctuation": config.strip_punctuation, "vocab_size": len(symbols),
        }
        (temporary / "tokenizer.json").write_text(json.dumps(metadata) + "\n", encoding="utf-8")
        for name in ("tokenizer.json", "tokens.model", "bpe.vocab"):
            (out_dir / name).unlink(missing_ok=True)  # of an earlier tokenizer, perhaps of another kind
        for name in ("tokens.txt", "tokens.model", "bpe.vocab", "tokenizer.json"):
            if (temporary / name).is_file():
                (temporary / name).replace(out_dir / name)
    return Tokenizer.load(out_dir)


def _count_words(texts: list[str], vocab_size: int) -> list[str]:
    """The most frequent words, ties in alphabetical order, so that the ids depend on the text alone."""
    counts = Counter(word for text in texts for word in text.split())
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 2]
    return [BLANK, UNKNOWN] + [WORD_MARK + word for word in words]


def _train_sentencepiece(texts: list[str], config: TokenConfig, directory: Path) -> list[str]:
    """Write tokens.model (and bpe.vocab) into `directory`, return the symbols in the order of their ids."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    if config.byte_fallback and config.vocab_size < 256 + 4:
        raise ConfigError(f"tokens.byte_fallback needs tokens.vocab_size of at least 260, got {config.vocab_size}")
    longest = max(len(text.encode("utf-8")) for text in texts)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(directory / "tokens"), model_type=config.kind,
            vocab_size=config.vocab_size, hard_vocab_limit=config.kind == "bpe", byte_fallback=config.byte_fallback,
            character_coverage=1.0, normalization_rule_name="identity", max_sentence_length=max(longest, 4192),
            pad_id=BLANK_ID, pad_piece=BLANK, unk_id=UNKNOWN_ID, unk_piece=UNKNOWN, bos_id=-1, eos_id=-1,
            num_threads=1, minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        detail = " ".join(str(error).split())
        limit = re.search(r"value <= (\d+)", detail)
        if limit:
            raise ConfigError(
                f"tokens.vocab_size must be at most {limit[1]} for this text, got {config.vocab_size}"
            ) from error
        if "required_chars" in detail or "smaller than required" in detail or "Vocabulary size" in detail:
            raise ConfigError(
                f"tokens.vocab_size is too small for the characters of this text, got {config.vocab_size}: raise it"
            ) from error
        raise ValueError(f"SentencePiece could not train: {detail}") from error
    processor = SentencePieceProcessor(model_file=str(directory / "tokens.model"))
    vocab_file = directory / "tokens.vocab"
    if config.kind == "bpe":
        vocab_file.rename(directory / "bpe.vocab")
    else:
        vocab_file.unlink()
    return [processor.id_to_piece(index) for index in range(len(processor))]


def _read_symbols(path: Path) -> list[str]:
    symbols: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        symbol, _, index = line.rpartition(" ")
        if index != str(len(symbols)) or not symbol:
            raise ValueError(f"{path} line {number}: expected 'symbol {len(symbols)}', got {line!r}")
        symbols.append(symbol)
    if symbols[:2] != [BLANK, UNKNOWN]:
        raise ValueError(f"{path} must begin with {BLANK} and {UNKNOWN}, got {symbols[:2]}")
    return symbols
