"""Reading ARPA files of any make, back-off models in arrays, and the scorers on them."""

import gzip
import math
from io import BytesIO

import numpy as np
import pytest

from cascade.search import ngram, row_cache
from cascade.search.ngram import read_arpa, read_ngram
from cascade.search.scorer import NgramScorer
from cascade.text.tokens import UNKNOWN_ID

SYMBOLS = ["<blk>", "<unk>", "a", "b", "c", "d", "x"]
END, BEGIN = len(SYMBOLS), len(SYMBOLS) + 1
# As SRILM prunes: "b c" is not there, though it ends "a b c"; "c" has a weight and nothing after it.
SRILM = r"""written by hand

\data\
ngram 1=8
ngram 2=6
ngram 3=3

\1-grams:
-1.1	</s>
-99	<s>	-0.31
-0.9	a	-0.42
-0.8	b	-0.13
-1.3	c	-0.77
-2.5	<unk>	-0.05
-1.7	x	-0.2
-0.6	d

\2-grams:
-0.35	<s> a	-0.21
-0.55	a b	-0.17
-0.65	a x	-0.27
-0.45	b a
-0.95	b </s>
-0.25	<unk> a	-0.11

\3-grams:
-0.15	<s> a b
-0.05	a b c
-0.50	a b </s>

\end\
"""


@pytest.fixture(params=["numpy", "numba"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(ngram, "compiled", lambda *_: None)


@pytest.fixture
def write(tmp_path):
    def write(text, name="lm.arpa"):
        data = text.encode() if isinstance(text, str) else text
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    return write


def dictionary_of(text):
    """n-gram -> (log10 probability, log10 back-off weight)."""
    entries = {}
    for line in text.splitlines():
        fields = line.split()
        if fields and fields[0][0] == "-" or fields[:1] == ["0"]:
            order = next(k for k in (3, 2, 1) if len(fields) > k and f"\\{k}-grams" in text.split(line)[0])
            weight = float(fields[order + 1]) if len(fields) > order + 1 else 0.0
            entries[tuple(fields[1 : order + 1])] = float(fields[0]), weight
    return entries


def reference(entries, word, context):
    """log10 p(word | context) as the ARPA format defines it."""
    if (*context, word) in entries:
        return entries[*context, word][0]
    return entries.get(tuple(context), (0, 0))[1] + reference(entries, word, context[1:])


def natural(model, state):
    return np.append(model.scores(state), model.final(state)[:, None], axis=1)[0]


def test_every_context_backs_off_as_the_format_defines(write):
    model, entries = read_arpa(write(SRILM), SYMBOLS), dictionary_of(SRILM)
    assert len(entries) == 17
    words = {1: "<unk>", 2: "a", 3: "b", 4: "c", 5: "d", 6: "x", END: "</s>", BEGIN: "<s>"}
    generator = np.random.default_rng(0)
    for length in (0, 1, 2, 3, 5) * 20:
        tokens = generator.integers(1, 7, length)
        state, context = np.array([model.start]), ["<s>"]
        for token in tokens:
            state = model.advance(state, np.array([token]))
            context.append(words[token])
        expected = [reference(entries, words[token], context[-2:]) * math.log(10) for token in (1, 2, 3, 4, 5, 6, END)]
        np.testing.assert_allclose(natural(model, state)[1:], expected, rtol=1e-6)
        assert model.scores(state)[0, 0] == 0.0


def test_rows_do_not_depend_on_the_batch_or_on_a_full_cache(write, monkeypatch):
    monkeypatch.setattr(row_cache, "CACHE_BYTES", 0)  # 64 rows
    lines = [f"-1.{i:03}\tw{i}\t-0.{i:03}" for i in range(200)]
    lines += ["", r"\2-grams:"] + [f"-0.{i:03}\tw{i} w{i * 7 % 200}" for i in range(1, 200)]
    text = "\n".join([r"\data" "\\", "ngram 1=200", "ngram 2=199", "", r"\1-grams:", *lines, "", r"\end" "\\", ""])
    model = read_arpa(write(text), ["<blk>", "<unk>", *(f"w{i}" for i in range(200))])
    states = model.advance(np.zeros(200, np.int64), np.arange(2, 202))
    assert len(set(states.tolist())) > 190
    whole = model.scores(states).copy()  # more than the cache holds
    generator = np.random.default_rng(0)
    for size in (1, 3, 60, 30, 64, 7):
        rows = generator.integers(0, 200, size)
        np.testing.assert_array_equal(model.scores(states[rows]), whole[rows])
    assert whole[1, 2 + 7] == pytest.approx(-0.001 * math.log(10))
    assert whole[1, 2 + 8] == pytest.approx((-0.001 - 1.008) * math.log(10))


def test_kernels_give_the_bits_of_plain_numpy(write):
    model, generator = read_arpa(write(SRILM), SYMBOLS), np.random.default_rng(1)
    states = [np.full(40, model.start)]
    for _ in range(20):
        tokens = generator.integers(0, 7, 40)
        states.append(model.advance(states[-1], tokens, UNKNOWN_ID))
        np.testing.assert_array_equal(states[-1][tokens <= UNKNOWN_ID], states[-2][tokens <= UNKNOWN_ID])
    states = np.concatenate(states)
    tokens, found = generator.integers(1, 7, len(states)), []
    for kernels in (model.kernels, None):
        model.kernels = kernels
        found.append([model.scores(states), model.scores(states, -0.3), model.final(states)])
        found[-1].append(model.advance(states, tokens))
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)
        assert first.dtype == second.dtype and len(np.unique(first, axis=0)) > 2


def test_large_models_do_not_overflow(write):
    size = 70_000  # node numbers times tokens need more than 32 bits
    last = [f"w{i}" for i in range(size - 4, size)]
    lines = [f"-5\tw{i}\t-0.5" for i in range(size)] + ["", r"\2-grams:"]
    lines += [f"-1\t{a} {b}\t-0.25" for a in last for b in last] + ["", r"\3-grams:"]
    lines += [f"-0.125\t{' '.join(last[:3])}", f"-0.0625\t{' '.join(last[1:])}"]
    counts = [f"ngram 1={size}", "ngram 2=16", "ngram 3=2", "", r"\1-grams:"]
    text = "\n".join([r"\data" "\\", *counts, *lines, "", r"\end" "\\", ""])
    model = read_arpa(write(text), ["<blk>", "<unk>", *(f"w{i}" for i in range(size))])
    tokens, state = range(size - 2, size + 2), np.zeros(1, np.int32)
    for token, log10_prob in zip(tokens, (-5, -1, -0.125, -0.0625), strict=True):
        assert model.scores(state)[0, token] == pytest.approx(log10_prob * math.log(10), rel=1e-6)
        state = model.advance(state, np.array([token], np.int32))
    assert model.scores(state)[0, 2] == pytest.approx((-0.25 - 0.5 - 5) * math.log(10), rel=1e-6)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\t", " "),  # kaldi's tools write spaces
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("<unk>", "<UNK>"),
    lambda text: "\n".join(reversed(text[: text.index("\n\n\\2-")].split("\n")[-8:])).join(
        [text[: text.index("-1.1")], text[text.index("\n\n\\2-") :]]
    ),  # another order of lines
    lambda text: text.replace("-0.6\td", "-0.6\td\t0").replace("\\3-grams:\n", "\n\\3-grams:\n"),
], ids=["spaces", "crlf", "UNK", "order", "weights"])
def test_files_of_other_makes_give_the_same_model(write, change):
    text = change(SRILM)
    assert text != SRILM
    first, second = read_arpa(write(SRILM), SYMBOLS), read_arpa(write(text, "other.arpa.gz"), SYMBOLS)
    states = np.array([[first.start], [second.start]])
    for token in (2, 3, 4, 2, 3, 1, 2, 5, 5):
        np.testing.assert_allclose(natural(first, states[0]), natural(second, states[1]), rtol=1e-6)
        states = [model.advance(state, np.array([token])) for model, state in zip((first, second), states, strict=True)]


def test_tokens_that_the_file_lacks_are_as_likely_as_its_unknown_word(write, caplog):
    model = read_arpa(write(SRILM), [*SYMBOLS, "e", "f"])
    assert "lm.arpa lacks 2 of the model's 9 tokens (e, f): they count as unknown words in it" in caplog.text
    scores = model.scores(np.array([model.start]))[0]
    assert scores[7] == scores[8] == scores[1] == pytest.approx((-2.5 - 0.31) * math.log(10))
    state = model.advance(np.array([model.start]), np.array([7]))  # nothing is known after it
    assert model.scores(state)[0, 2] == pytest.approx(-0.9 * math.log(10))
    text = SRILM.replace("-2.5\t<unk>\t-0.05", "-2.5\ty\t-0.05").replace("<unk> a", "y a")
    scores = read_arpa(write(text), [*SYMBOLS, "y", "e"]).scores(np.zeros(1, np.int64))[0]
    assert scores[8] == scores[1] == pytest.approx(ngram.MISSING * math.log(10))


DAMAGE = {
    "empty": (lambda text: "", "line 0: the file has no line \\data\\"),
    "no ARPA": (lambda text: "hello\nworld\n", "line 2: the file has no line \\data\\"),
    "no counts": (lambda text: text.replace("ngram 1=8\nngram 2=6\nngram 3=3\n", ""), "line 5: expected 'ngram 1="),
    "counts": (lambda text: text.replace("ngram 2=6\n", ""), "line 5: expected 'ngram 2=', got 'ngram 3=3'"),
    "too few": (lambda text: text.replace("-0.9\ta\t-0.42\n", ""), "line 16: expected a probability, 1 words"),
    "too many": (lambda text: text.replace("ngram 2=6", "ngram 2=5"), "line 24: expected \\3-grams:, got '-0.25"),
    "huge": (lambda text: text.replace("ngram 3=3", "ngram 3=99999999999999"), "line 30: expected a probability, 3"),
    "number": (lambda text: text.replace("-0.95\tb", "-0.q\tb"), "line 23: '-0.q' is no number"),
    "sign": (lambda text: text.replace("-0.95\tb", "--0.95\tb"), "line 23: '--0.95' is no number"),
    "nan": (lambda text: text.replace("-0.17", "nan"), "line 20: 'nan' is no number"),
    "positive": (lambda text: text.replace("-0.45\tb", "0.45\tb"), "line 22: a log10 probability above 0"),
    "words": (lambda text: text.replace("-0.15\t<s> a b", "-0.15\t<s> a"), "line 27: expected a probability, 3 words"),
    "cut": (lambda text: text[: text.index("-0.05\ta b c")], "line 27: the file ends after 1 of 3 n-grams of order 3"),
    "no end": (lambda text: text.replace("\\end\\", ""), "line 31: expected \\end\\ after 3 n-grams of order 3"),
    "twice": (lambda text: text.replace("b a\n", "a b\n"), "line 22: an n-gram for the second time"),
    "unigram twice": (lambda text: text.replace("-0.8\tb", "-0.8\ta"), "line 12: an n-gram for the second time"),
    "context": (lambda text: text.replace("a b c", "c b a"), "line 28: the context of this n-gram is no n-gram"),
    "other tokens": (lambda text: text.replace("\ta", "\tA"), "line 11: 'A' is no token of the model: train"),
    "another token": (lambda text: text.replace("a b c", "a B c"), "line 28: 'B' is no token of the model"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence_with_file_and_line(write, name):
    change, message = DAMAGE[name]
    with pytest.raises(ValueError) as error:
        read_arpa(write(change(SRILM)), SYMBOLS)
    assert "lm.arpa" in str(error.value) and message in str(error.value)


def test_a_file_cut_in_its_packing_is_named(write):
    path = write(SRILM, "lm.arpa.gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"lm\.arpa\.gz is truncated or damaged after line \d+"):
        read_arpa(path, SYMBOLS)


def test_arrays_are_the_model_of_the_arpa_file_and_know_their_tokens(write, tmp_path):
    first, path = read_arpa(write(SRILM), SYMBOLS), tmp_path / "lm.npz"
    first.save(path, SYMBOLS)
    second, states = read_ngram(path, SYMBOLS), np.array([first.start])
    for token in (2, 3, 4, 2, 3, 1, 2, 5, 5):
        np.testing.assert_array_equal(natural(first, states), natural(second, states))
        after = [model.advance(states, np.array([token])) for model in (first, second)]
        np.testing.assert_array_equal(*after)
        states = after[0]
    with pytest.raises(ValueError, match=r"lm\.npz is of other tokens than the model's: train the n-gram"):
        read_ngram(path, [*SYMBOLS[:-1], "y"])
    whole, single = path.read_bytes(), BytesIO()
    np.save(single, np.zeros(3))
    with np.load(path) as file:
        arrays = dict(file)
    changed = [{"keys": arrays["keys"][:-1]}, {"links": arrays["links"][:-1]}, {"next": arrays["next"] + 1000}]
    packed = [BytesIO() for _ in changed]
    for change, file in zip(changed, packed, strict=True):
        np.savez(file, **arrays | change)
    for damaged in (whole[:-40], b"nothing", b"", single.getvalue(), *(file.getvalue() for file in packed)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"lm\.npz is damaged or no n-gram model .*: make it again"):
            read_ngram(path, SYMBOLS)


@pytest.mark.parametrize("weight", [0.4, -0.2])
def test_scorer_adds_the_weighted_model_and_keeps_its_state_at_blanks(write, weight):
    model = read_arpa(write(SRILM), SYMBOLS)
    scorer = NgramScorer(model, weight)
    assert scorer.blank_weight == weight
    state = scorer.initial(2)
    np.testing.assert_allclose(scorer.score(state), weight * model.scores(np.array([model.start] * 2)), rtol=1e-6)
    state = scorer.advance(state, np.array([1, 0, 0, 1]), np.array([2, 0, 1, 3]))
    assert state[1] == state[2] == model.start
    after_a, after_b = model.advance(np.array([model.start] * 2), np.array([2, 3]))
    assert (state[0], state[3]) == (after_a, after_b)
    np.testing.assert_allclose(scorer.final(state), weight * model.final(state), rtol=1e-6)
    assert len(scorer.initial(0)) == len(scorer.advance(state[:0], np.zeros(0, int), np.zeros(0, int))) == 0
