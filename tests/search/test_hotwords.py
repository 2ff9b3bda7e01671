import math
from functools import cache

import numpy as np
import pytest

from cascade.models.torch_engine import TorchEngine
from cascade.search.beam import ModifiedBeamSearch
from cascade.search.greedy import GreedySearch
from cascade.search.hotwords import Hotwords, build_automaton, encode_phrases, read_hotwords
from tests.search.toy_models import ToyTransducer, random_encoder_out

SYMBOLS = ["<blk>", "<unk>", "▁a", "▁b", "▁c", "a", "b", "字"]
LETTERS = dict(zip("ABCabx", range(2, 8), strict=True))
"""A letter for each token: capitals begin a word."""


class Pieces:
    """A tokenizer whose texts are strings of LETTERS."""

    kind, vocab_size = "bpe", len(SYMBOLS)

    def encode(self, text):
        return [LETTERS.get(letter, 1) for letter in text.strip()]

    def normalize(self, text):
        return text

    def unknown_characters(self, text):
        return set(text) - set(LETTERS)

    def id_to_symbol(self, token):
        return SYMBOLS[token]


def worth(length):
    return sum(1 + math.log(depth) for depth in range(1, length + 1))


def goes_on(text, place):
    """Whether the word at this place goes on from the token before it."""
    return place < len(text) and text[place] in "ab" and text[place - 1] != "x"


def brute_force(text, boosts):
    """What a text has got, and what it is worth if it ends here; phrases and text are strings of letters."""

    def starts_phrase(part):
        return any(phrase.startswith(part) for phrase in boosts)

    def begin_of_longest_end(end):
        return next(begin for begin in range(end + 1) if begin == end or starts_phrase(text[begin:end]))

    @cache
    def cover(begin, end):
        """The largest sum over whole phrases that do not overlap."""
        if end <= begin:
            return 0.0
        ending = (
            cover(begin, first) + boosts[text[first:end]] * worth(end - first)
            for first in range(begin, end)
            if text[first:end] in boosts and not goes_on(text, end)
        )
        return max(cover(begin, end - 1), *ending, 0.0)

    begins = [begin_of_longest_end(end) for end in range(len(text) + 1)]
    kept = sum(cover(begins[end], end) - cover(begins[end + 1], end) for end in range(len(text)))
    begin, end = begins[-1], len(text)
    boost = {first: max((boosts[phrase] for phrase in boosts if phrase.startswith(text[first:])), default=0)
             for first in range(begin, end)}  # fmt: skip
    begun = [
        cover(begin, first) + boost[first] * worth(end - first)
        for first in range(begin, end)
        if starts_phrase(text[first:])
    ]
    return kept + max(cover(begin, end), *begun, 0.0), kept + cover(begin, end), cover(0, end)


def crosses(text, boosts):
    """Whether two phrases in the text overlap crosswise."""
    spans = [
        (begin, end) for begin in range(len(text)) for end in range(begin + 1, len(text) + 1)
        if text[begin:end] in boosts and not goes_on(text, end)
    ]  # fmt: skip
    return any(a < c < b < d for a, b in spans for c, d in spans)


def path_of(scorer, text, state=None):
    """The sum of scores along a text, and the state at its end."""
    state, total = scorer.initial(1) if state is None else np.array([state]), 0.0
    for token in Pieces().encode(text):
        total += float(scorer.score(state)[0, token])
        state = scorer.advance(state, np.array([0]), np.array([token]))
    return total, state


def random_list(generator, most=6):
    size = generator.integers(1, most + 1)
    phrases = {"".join(generator.choice(list(LETTERS), generator.integers(1, 6))) for _ in range(size)}
    return {phrase: float(generator.choice([0.5, 1.0, 3.0])) for phrase in sorted(phrases)}


def lines_of(boosts):
    return [f"{phrase} :{boost}" for phrase, boost in boosts.items()]


def test_every_path_gets_what_a_brute_force_scorer_gives():
    generator, crossed, nested = np.random.default_rng(0), 0, 0
    for _ in range(150):
        boosts = random_list(generator)
        scorer = Hotwords(Pieces(), lines_of(boosts))
        for _ in range(5):
            text = "".join(generator.choice(list(LETTERS), generator.integers(0, 14)))
            if generator.random() < 0.7:
                text = "".join(generator.choice([*boosts, *LETTERS]) for _ in range(4))
            granted, ended, whole = brute_force(text, boosts)
            total, state = path_of(scorer, text)
            assert total == pytest.approx(granted, abs=1e-4), (boosts, text)
            assert total + scorer.final(state)[0] == pytest.approx(ended, abs=1e-4), (boosts, text)
            if crosses(text, boosts):
                crossed += 1
            else:  # then it is what the text is worth, whatever an automaton does
                assert ended == pytest.approx(whole)
                nested += ended > 0
    assert crossed > 5 and nested > 150


def total_of(phrases, text):
    scorer = Hotwords(Pieces(), phrases, scale=1.0)
    total, state = path_of(scorer, text)
    return total + float(scorer.final(state)[0])


def test_a_phrase_that_begins_a_longer_one_keeps_what_it_is_worth():
    for text, length in (("AB", 2), ("ABC", 2), ("ABCA", 4), ("ABCB", 2), ("A", 0), ("BA", 0)):
        assert total_of(["AB", "ABCA"], text) == pytest.approx(worth(length)), text


def test_a_phrase_inside_a_longer_one_counts_where_the_longer_one_breaks_off():
    for text, expected in (("ABC", worth(3)), ("ABA", worth(1)), ("B", worth(1)), ("ABAB", 2 * worth(1))):
        assert total_of(["ABC", "B"], text) == pytest.approx(expected), text


def test_a_phrase_is_whole_words():
    assert total_of(["A"], "Ab") == total_of(["A"], "Aba") == 0.0
    assert total_of(["A"], "AbA") == pytest.approx(worth(1))
    assert total_of(["Ab", "A"], "Ab") == pytest.approx(worth(2))
    assert total_of(["x"], "xxAxb") == pytest.approx(3 * worth(1))  # in a script without spaces each is a word


def test_the_bonus_of_a_token_grows_with_its_depth_and_is_taken_back():
    scorer = Hotwords(Pieces(), ["ABC"], scale=2.0)
    assert path_of(scorer, "A")[0] == pytest.approx(2.0)
    assert path_of(scorer, "AB")[0] == pytest.approx(2.0 * (2 + math.log(2)))
    assert path_of(scorer, "ABB")[0] == pytest.approx(0.0, abs=1e-6)
    assert path_of(scorer, "ABA")[0] == pytest.approx(2.0)  # begins anew
    assert total_of(["ABC :3", "ABC"], "ABC") == pytest.approx(3 * worth(3))


def test_blanks_and_unknown_tokens_leave_the_state():
    scorer = Hotwords(Pieces(), ["AB"])
    _, state = path_of(scorer, "A")
    np.testing.assert_array_equal(scorer.advance(state, np.zeros(2, np.int64), np.array([0, 1])), [*state, *state])


def test_lists_of_single_streams_are_told_apart_and_forgotten():
    scorer, generator = Hotwords(Pieces(), ["AB :3"]), np.random.default_rng(1)
    held = {}
    for _ in range(60):
        if len(held) > 4:
            scorer.release(start := list(held)[generator.integers(len(held))])
            del held[start]
        boosts = random_list(generator)
        start = scorer.hold(lines_of(boosts))
        assert start not in held and start != scorer.start
        held[start] = {**boosts, "AB": max(3.0, boosts.get("AB", 0.0))}
        text = "".join(generator.choice(list(LETTERS), 12))
        for start, boosts in held.items():
            assert path_of(scorer, text, start)[0] == pytest.approx(brute_force(text, boosts)[0], abs=1e-4)
    assert len(scorer._nodes.parents) < 400  # room is used again
    assert path_of(scorer, "AB")[0] == pytest.approx(3 * worth(2))


def test_a_list_that_comes_again_is_not_built_again_nor_changed_by_what_stands_before_it():
    tokenizer, lists = Pieces(), (["AbbbbbA", "bB"], ["Cx"], ["AbbbbbA", "bB"])
    built = build_automaton.cache_info().misses
    hotwords = Hotwords(tokenizer, ["AB"])
    first, _, again = (hotwords.hold(phrases) for phrases in lists)
    assert build_automaton.cache_info().misses == built + 3  # with the list of all streams
    for name in ("ended", "open", "granted"):
        values = getattr(hotwords._nodes, name)
        np.testing.assert_array_equal(values[first:][:10], values[again:][:10])


def test_a_phrase_in_a_script_without_spaces_needs_none_before_it(tmp_path):
    from cascade.config.options import TokenConfig
    from cascade.text.tokens import train_tokenizer

    texts = ["我想你好吗", "你好", "吗我你", "hello 你好", "hello"]
    for options in ({"kind": "char", "vocab_size": 30}, {"kind": "bpe", "vocab_size": 270, "byte_fallback": True}):
        tokenizer = train_tokenizer(texts, TokenConfig(**options), tmp_path / options["kind"])
        at_start, inside = encode_phrases(tokenizer, ["你好"], 1.0)
        assert tokenizer.decode(at_start.tokens) == tokenizer.decode(inside.tokens) == "你好"
        scorer = Hotwords(tokenizer, ["你好"])
        for text in texts:
            state, total = scorer.initial(1), 0.0
            for token in tokenizer.encode(text):
                total += float(scorer.score(state)[0, token])
                state = scorer.advance(state, np.array([0]), np.array([token]))
            total += float(scorer.final(state)[0])
            assert (total > 0) == ("你好" in text), (options, text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("AqB", "hotword 'AqB' has what the model's tokens cannot say: q"),
        ("A :b", "hotword 'A :b': after ' :' stands its boost, a positive number"),
        ("A :-1", "a positive number"),
        ("A :inf", "a positive number"),
        (" :2", "hotword '' is nothing that a transcript says"),
    ],
)
def test_a_phrase_that_cannot_be_said_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        Hotwords(Pieces(), ["A", line])


def test_a_text_is_no_list_of_its_letters():
    with pytest.raises(ValueError, match="hotwords are a list of phrases, got one text: 'AB'"):
        Hotwords(Pieces(), "AB")


def test_phrases_take_the_form_of_transcripts(tmp_path):
    from cascade.config.options import TokenConfig
    from cascade.text.tokens import train_tokenizer

    config = TokenConfig(kind="bpe", vocab_size=40, case="upper", strip_punctuation=True)
    tokenizer = train_tokenizer(["CAFÉ NEW YORK DON'T", "YORK NEW"], config, tmp_path)
    file = tmp_path / "hotwords.txt"
    file.write_text("\ufeffNew York!\n\n  cafe\u0301 :2.5\r\ndon\u2019t\n", encoding="utf-8")
    encoded = encode_phrases(tokenizer, read_hotwords(file), 1.5)
    assert [(tokenizer.decode(phrase.tokens), phrase.boost) for phrase in encoded] == [
        ("NEW YORK", 1.5), ("CAFÉ", 2.5), ("DON'T", 1.5)
    ]  # fmt: skip
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_hotwords(file)


@pytest.mark.parametrize("backend", ["numpy", "numba", "greedy"])
def test_what_a_search_adds_is_what_its_text_is_worth(backend):
    model = ToyTransducer("stateless", vocab_size=len(SYMBOLS), blank_bias=1.0, seed=3)
    encoder_out, lens = random_encoder_out(3, 30, seed=4).numpy(), np.array([30, 11, 23])
    boosts = {"AB": 1.0, "ABa": 2.0, "Cx": 1.0, "B": 0.5, "aa": 1.0}
    scorer, names = Hotwords(Pieces(), lines_of(boosts)), {token: letter for letter, token in LETTERS.items()}
    if backend == "greedy":
        search = GreedySearch(TorchEngine(model), unk_id=1, scorers=[scorer])
    else:
        search = ModifiedBeamSearch(TorchEngine(model), 6, unk_id=1, scorers=[scorer], backend=backend)
    earned = 0
    for hypotheses in search.decode(encoder_out, lens):
        for hypothesis in hypotheses:
            expected = brute_force("".join(map(names.get, hypothesis.tokens)), boosts)[1]
            assert hypothesis.external_score == pytest.approx(expected, abs=1e-4)
            earned += expected > 0
    assert earned > 1
