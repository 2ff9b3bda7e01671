"""Transcripts before they become tokens: one normal form for training and scoring, and what its words are.

Words are what white space separates. In scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer,
Burmese) every character, with the marks that follow it, is a word of its own, so that a word error rate means something
there too: it is what others call the mixed error rate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache

from cascade.config.options import TokenConfig

WORD_MARK = "\u2581"
"""Stands before the first character of a word in a token."""
INVISIBLE = {
    code: None
    for code in (*range(0xA0), 0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x2070), 0xFEFF)
    if unicodedata.category(chr(code)) in ("Cc", "Cf") and not chr(code).isspace()
}
"""Control characters, soft hyphen, zero width space, marks of direction, word joiner, byte order mark: nobody hears
them. For translate. The two joiners inside words of Persian and Indian scripts are spelling and stay."""
_SPOKEN = frozenset("%‰&@#§")
"""Punctuation by its Unicode category, but read aloud."""
_IN_WORDS = {"'": "'", "\u2019": "'", "\u02bc": "'", "\u00b7": "\u00b7", "\u05f3": "\u05f3", "\u05f4": "\u05f4"}
"""Part of a word between two letters (l'été, don\u2019t, col·lecció), and how it is written."""
_IN_NUMBERS = frozenset(".,:/")
_HALF_WIDTH_MARKS = "\uff9e\uff9f"
"""Voiced marks after half-width kana, by their category letters."""
_UNSPACED = re.compile(
    "[\u0e01-\u0e4e\u0e81-\u0ecf\u1000-\u103f\u1050-\u108f\u1780-\u17d3\u3001-\u301f\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff0f\uff1a-\uff20\uff66-\uff9d\U00020000-\U0003ffff]"
)


def normalize_text(
    text: str, case: str = "keep", normal_form: str = "nfc", strip_punctuation: bool = False, keep_spaces: bool = False
) -> str:
    """The form in which text is tokenised, and in which references are scored. Applying it twice changes nothing more.

    Invisible characters go, runs of white space (and the word mark) become one space.

    Args:
      case: keep | lower | upper.
      normal_form: nfc | nfkc.
      strip_punctuation: punctuation becomes a space, except the apostrophe inside a word, `. , : /` inside a number and
        what is read aloud (%, &, @, #, §). Digits, currency and other symbols stay.
      keep_spaces: also those between two characters of a script without spaces; otherwise they mean nothing and go.
    """
    form = normal_form.upper()
    text = unicodedata.normalize(form, text.translate(INVISIBLE))
    if case != "keep":
        text = unicodedata.normalize(form, text.lower() if case == "lower" else text.upper())
    if strip_punctuation:
        text = _without_punctuation(text)
    text = " ".join(text.replace(WORD_MARK, " ").split())
    return text if keep_spaces else unicodedata.normalize(form, drop_idle_spaces(text))


def normalizer(config: TokenConfig) -> Callable[[str], str]:
    """`normalize_text` with the options of a config."""

    def normalize(text: str) -> str:
        return normalize_text(
            text, config.case, config.normal_form, config.strip_punctuation, keep_spaces=config.kind == "word"
        )

    return normalize


def drop_idle_spaces(text: str) -> str:
    """Take out the spaces between two characters of scripts that are written without any."""
    words = text.split(" ")
    return "".join(
        word if place == 0 or _touching(words[place - 1][-1:], word[:1]) else f" {word}"
        for place, word in enumerate(words)
    )


def join_texts(texts: Iterable[str]) -> str:
    """Texts one after the other, with a space between two where their script has spaces."""
    return drop_idle_spaces(" ".join(text for text in texts if text))


def split_words(text: str) -> list[str]:
    """The words of a text, as the word error rate counts them."""
    words: list[str] = []
    for part in text.split():
        previous = ""
        for character in part:
            if begins_word(previous, character):
                words.append(character)
            else:
                words[-1] += character
            previous = character
    return words


def begins_word(previous: str, character: str) -> bool:
    """Tell whether a word begins between two neighbours without a space; `previous` is empty at the beginning."""
    if not previous:
        return True
    if character.isascii() and previous.isascii():
        return False
    if unicodedata.category(character)[0] == "M" or character in _HALF_WIDTH_MARKS:
        return False
    return is_unspaced(character) or is_unspaced(previous)


def is_unspaced(character: str) -> bool:
    """Tell whether a character belongs to a script that is written without spaces between words."""
    return _UNSPACED.match(character) is not None


def _touching(left: str, right: str) -> bool:
    return bool(left and right) and is_unspaced(left) and is_unspaced(right)


def _without_punctuation(text: str) -> str:
    kept = []
    for place, character in enumerate(text):
        if not _is_punctuation(character):
            kept.append(character)
            continue
        before, after = (_kind(text[i]) if 0 <= i < len(text) else "" for i in (place - 1, place + 1))
        if character in _IN_WORDS and before in ("L", "M") and after == "L":
            kept.append(_IN_WORDS[character])
        else:
            kept.append(character if character in _IN_NUMBERS and before == after == "N" else " ")
    return "".join(kept)


def _kind(character: str) -> str:
    """The first letter of the Unicode category; P for U+02BC, by which it is a letter."""
    return "P" if character in _IN_WORDS else unicodedata.category(character)[0]


@lru_cache(maxsize=4096)
def _is_punctuation(character: str) -> bool:
    return character in _IN_WORDS or (unicodedata.category(character)[0] == "P" and character not in _SPOKEN)
