"""n-gram models from text: counts, modified Kneser-Ney, pruning, ARPA files and the program."""

import gzip
import itertools
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cascade.config.options import ConfigError, TokenConfig
from cascade.search.ngram import read_arpa
from cascade.text import ngram_training
from cascade.text.ngram_training import count_ngrams, discounts, token_blocks, train_ngram, write_arpa
from cascade.text.tokens import train_tokenizer

VOCABULARY = [f"w{index}" for index in range(12)]
GUTENBERG = Path(__file__).parents[3] / "shared" / "corpora" / "gutenberg_text" / "gutenberg.txt.xz"


def zipf_sentences(num_sentences, seed=0):
    """Sentences of 1 to 8 words in which a word depends on the one before it."""
    generator = np.random.default_rng(seed)
    rank = 1.0 / np.arange(1, len(VOCABULARY) + 1) ** 1.5
    sentences = []
    for _ in range(num_sentences):
        words = [0]
        for _ in range(generator.integers(1, 9)):
            words.append(generator.choice(len(VOCABULARY), p=np.roll(rank / rank.sum(), words[-1])))
        sentences.append(" ".join(VOCABULARY[word] for word in words[1:]))
    return sentences


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    return train_tokenizer([" ".join(VOCABULARY)] * 2, TokenConfig(kind="word", vocab_size=20), folder / "tokens")


def write_text(folder, sentences):
    path = folder / "text.txt"
    path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return path


def read_back(orders, tokenizer, path):
    write_arpa(orders, tokenizer, path)
    return read_arpa(path, [tokenizer.id_to_symbol(token) for token in range(tokenizer.vocab_size)])


def state_after(model, tokens):
    state = np.array([model.start])
    for token in tokens:
        state = model.advance(state, np.array([token]))
    return state


def distribution(model, tokens):
    """(V + 1,) probabilities after <s> and `tokens`; the last is </s>, the blank's is 0."""
    state = state_after(model, tokens)
    log_probs = np.append(model.scores(state)[0], model.final(state)).astype(np.float64)
    return np.where(np.arange(len(log_probs)) > 0, np.exp(log_probs), 0.0)


def perplexity(model, tokenizer, sentences):
    """Per token, </s> included; all sentences go on side by side."""
    encoded = sorted(map(tokenizer.encode, sentences), key=len, reverse=True)
    total, state = 0.0, np.full(len(encoded), model.start)
    for place in range(len(encoded[0]) + 1):
        ended = [place == len(ids) for ids in encoded[: len(state)]]
        total += model.final(state)[ended].sum()
        state = state[~np.array(ended)]
        tokens = np.array([ids[place] for ids in encoded[: len(state)]], np.int64)
        total += model.scores(state)[np.arange(len(state)), tokens].sum()
        state = model.advance(state, tokens)
    return math.exp(-total / sum(len(ids) + 1 for ids in encoded))


def reference_kneser_ney(sentences, order, num_events):
    """p(token, context) from the formulas, in dictionaries; `sentences` are lists of ids."""
    text = [["<s>", *sentence, "</s>"] for sentence in sentences]
    raw = [Counter() for _ in range(order + 1)]
    for sentence in text:
        for k in range(1, order + 1):
            raw[k].update(tuple(sentence[i : i + k]) for i in range(len(sentence) - k + 1))
    del raw[1][("<s>",)]
    counts = [Counter() for _ in range(order + 1)]
    counts[order] = raw[order]
    for k in range(1, order):
        preceded = Counter(ngram[1:] for ngram in raw[k + 1])
        counts[k] = Counter({ngram: raw[k][ngram] if ngram[0] == "<s>" else preceded[ngram] for ngram in raw[k]})
    by_context = [defaultdict(dict) for _ in range(order + 1)]
    taken = [None]
    for k in range(1, order + 1):
        for ngram, count in counts[k].items():
            by_context[k][ngram[:-1]][ngram[-1]] = count
        n = [sum(count == j for count in counts[k].values()) for j in range(5)]
        taken.append([0.0, 0.5, 1.0, 1.5])
        if 0 not in n[1:]:
            y = n[1] / (n[1] + 2 * n[2])
            sound = [0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
            taken[k] = sound if min(sound[1:]) > 0 and all(d <= j for j, d in enumerate(sound)) else taken[k]

    @cache
    def prob(token, context):
        k = len(context) + 1
        shorter = prob(token, context[1:]) if context else 1.0 / num_events
        seen = by_context[k].get(context)
        if not seen:
            return shorter
        total = sum(seen.values())
        count = seen.get(token, 0)
        weight = sum(taken[k][min(count, 3)] for count in seen.values()) / total
        return (count - taken[k][min(count, 3)]) / total + weight * shorter

    return lambda token, history: prob(token, tuple(history)[-(order - 1) :] if order > 1 else ())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("num_sentences", [3, 400])  # few give fall-back discounts
def test_model_equals_the_formulas_of_modified_kneser_ney(tmp_path, word_tokenizer, order, num_sentences):
    sentences = zipf_sentences(num_sentences)
    orders = train_ngram([write_text(tmp_path, sentences)], word_tokenizer, order)
    model = read_back(orders, word_tokenizer, tmp_path / "lm.arpa")
    num_tokens = word_tokenizer.vocab_size
    ids = [word_tokenizer.encode(sentence) for sentence in sentences]
    expected = reference_kneser_ney(ids, order, num_tokens)
    generator = np.random.default_rng(1)
    contexts = [ids[0][:length] for length in range(4)] + generator.integers(2, num_tokens, (20, 4)).tolist()
    for context in contexts:
        probs = distribution(model, context)
        wanted = [expected(token, ["<s>", *context]) for token in [*range(1, num_tokens), "</s>"]]
        np.testing.assert_allclose(probs[1:], wanted, rtol=1e-5)


def test_discounts_come_from_counts_of_counts():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 6, 5])
    share = 40 / (40 + 2 * 20)
    wanted = [0.0, 1 - 2 * share * 20 / 40, 2 - 3 * share * 10 / 20, 3 - 4 * share * 6 / 10]
    np.testing.assert_allclose(discounts(counts), wanted)
    assert discounts(np.repeat([1, 2, 3], [40, 20, 10])).tolist() == [0.0, 0.5, 1.0, 1.5]  # no n-gram seen four times
    assert discounts(np.repeat([1, 2, 3, 4], [40, 1, 50, 1])).tolist() == [0.0, 0.5, 1.0, 1.5]  # D_2 below 0


@pytest.mark.parametrize("prune", [[0], [0, 0, 1], [0, 1, 2, 4], [0, 50]])
def test_probabilities_sum_to_1_after_any_context(tmp_path, word_tokenizer, prune):
    orders = train_ngram([write_text(tmp_path, zipf_sentences(300))], word_tokenizer, 4, prune)
    assert orders[4].kept.all() == (prune == [0])
    model = read_back(orders, word_tokenizer, tmp_path / "lm.arpa.gz")
    generator = np.random.default_rng(2)
    for length in (0, 1, 2, 3, 5) * 5:
        context = generator.integers(1, word_tokenizer.vocab_size, length)
        assert distribution(model, context).sum() == pytest.approx(1.0, abs=2e-5), context


def test_pruning_takes_out_rare_n_grams_and_gives_their_share_to_shorter_contexts(tmp_path, word_tokenizer):
    text = write_text(tmp_path, zipf_sentences(300))
    full, pruned = train_ngram([text], word_tokenizer, 3), train_ngram([text], word_tokenizer, 3, [0, 1, 2])
    for before, after, most in zip(full[1:], pruned[1:], [-1, 1, 2], strict=True):
        assert (after.kept == (before.text_counts > most)).all() and before.kept.all()
        np.testing.assert_array_equal(before.probs, after.probs)
    model, whole = (read_back(orders, word_tokenizer, tmp_path / "lm.arpa") for orders in (pruned, full))
    probs, before = distribution(model, [2, 3]), distribution(whole, [2, 3])
    kept = np.isin(np.arange(len(probs)), pruned[3].keys[pruned[3].kept & (pruned[3].keys % 256 == 3 * 16 + 2)] // 256)
    assert 0 < kept.sum() < len(kept) - 1
    np.testing.assert_allclose(probs[kept], before[kept], rtol=1e-5)
    shorter = distribution(model, [1, 3])  # nothing begins with <unk>: what follows w1 alone
    ratio = probs[1:][~kept[1:]] / shorter[1:][~kept[1:]]
    np.testing.assert_allclose(ratio, (1 - before[kept].sum()) / (1 - shorter[kept].sum()), rtol=1e-4)


def test_merged_blocks_equal_one_count_in_memory(tmp_path, word_tokenizer):
    sentences = [[14, *word_tokenizer.encode(sentence), 13] for sentence in zipf_sentences(200)]
    base = 15
    blocks = [np.concatenate(sentences[start : start + 7]) for start in range(0, 200, 7)]
    keys, counts = count_ngrams(iter(blocks), 3, base)
    whole = Counter()
    for sentence in sentences:
        padded = [0, 0, *sentence]
        whole.update(padded[i + 2] * base**2 + padded[i + 1] * base + padded[i] for i in range(len(sentence)))
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == whole
    assert (np.diff(keys) > 0).all()


def test_words_encoded_once_equal_sentences_encoded_whole(tmp_path, monkeypatch):
    texts = ["turn the light on", "call zoë", "größer 12 你好", "thé   light"] * 3
    monkeypatch.setattr(ngram_training, "WORDS_PER_BLOCK", 5)
    monkeypatch.setattr(ngram_training, "CACHED_WORDS", 6)
    for name, config in {
        "bpe": TokenConfig(vocab_size=45, case="lower"), "char": TokenConfig(kind="char"),
        "bytes": TokenConfig(vocab_size=310, byte_fallback=True), "word": TokenConfig(kind="word"),
    }.items():
        tokenizer = train_tokenizer(texts, config, tmp_path / name)
        unseen = [*texts, "", "Turn\tß ßé  xßx", "\u2581the\u2581light", "你 好 世界 on"]
        size = tokenizer.vocab_size
        wanted = [token for text in unseen if text for token in (size + 1, *tokenizer.encode(text), size)]
        blocks = list(token_blocks([write_text(tmp_path, unseen)], tokenizer))
        assert len(blocks) > 2 and np.concatenate(blocks).tolist() == wanted, name


def test_same_text_gives_the_same_bytes_however_it_is_packed(tmp_path, word_tokenizer, monkeypatch):
    plain = write_text(tmp_path, zipf_sentences(50))
    (tmp_path / "text.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "text.xz").write_bytes(lzma.compress(plain.read_bytes()))
    for name in ("text.txt", "text.gz", "text.xz"):
        write_arpa(train_ngram([tmp_path / name], word_tokenizer, 3), word_tokenizer, tmp_path / f"{name}.arpa.gz")
        monkeypatch.setattr(ngram_training, "WORDS_PER_BLOCK", 17)
    models = [(tmp_path / f"{name}.arpa.gz").read_bytes() for name in ("text.txt", "text.gz", "text.xz")]
    assert models[0] == models[1] == models[2]
    assert gzip.decompress(models[0]).startswith(b"\\data\\\nngram 1=15\nngram 2=")


@pytest.mark.skipif(not GUTENBERG.is_file(), reason="needs the Gutenberg text")
def test_perplexity_of_held_out_books_falls_with_the_order_and_little_pruning_costs_little(tmp_path):
    with lzma.open(GUTENBERG, "rt") as file:
        lines = [line.strip() for line in itertools.islice(file, 6_000)]
    held_out, train = lines[::50], [line for place, line in enumerate(lines) if place % 50]
    tokenizer = train_tokenizer(train[:1000], TokenConfig(vocab_size=60), tmp_path / "tokens")
    text = write_text(tmp_path, train)
    results = []
    for order, prune in ((1, [0]), (2, [0]), (3, [0]), (4, [0]), (4, [0, 0, 0, 1])):
        orders = train_ngram([text], tokenizer, order, prune)
        results.append(perplexity(read_back(orders, tokenizer, tmp_path / "lm.arpa"), tokenizer, held_out))
    assert results[0] > 1.5 * results[1] > 2 * results[2] > 2.2 * results[3], results
    assert orders[4].kept.mean() < 0.6 and results[4] < 1.02 * results[3], results


def test_orders_longer_than_every_sentence_are_left_out_of_the_file(tmp_path, word_tokenizer):
    orders = train_ngram([write_text(tmp_path, ["w1", "w2"])], word_tokenizer, 5)
    model = read_back(orders, word_tokenizer, tmp_path / "lm.arpa")
    assert "\\3-grams:" in (tmp_path / "lm.arpa").read_text() and "\\4-" not in (tmp_path / "lm.arpa").read_text()
    assert distribution(model, [3]).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"order": 0}, r"order must be 1 to 15 with 14 tokens, got 0"),
    ({"order": 16}, r"order must be 1 to 15 with 14 tokens, got 16"),
    ({"prune": [1]}, "begin with 0 and must not fall, got 1"),
    ({"prune": [0, 2, 1]}, "begin with 0 and must not fall, got 0 2 1"),
])
def test_options_that_no_model_can_have_are_named(tmp_path, word_tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        train_ngram([write_text(tmp_path, ["w1"])], word_tokenizer, **{"order": 2, **options})


def run_program(*arguments):
    command = [sys.executable, "-m", "cascade.bin.train_ngram", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_program_names_the_text_that_it_cannot_read_and_writes_nothing(tmp_path, word_tokenizer):
    tokens, out = tmp_path.parent, tmp_path / "out" / "lm.arpa"
    tokens = tmp_path / "tokens"
    train_tokenizer([" ".join(VOCABULARY)], TokenConfig(kind="word"), tokens)
    (tmp_path / "latin.txt").write_bytes("w1 w2\nw1 caf\xe9\n".encode("latin-1"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"w1 w2\n" * 1000)[:-20])
    (tmp_path / "no.xz").write_bytes(b"w1 w2\n")
    (tmp_path / "empty.txt").write_bytes(b" \n\n")
    line = '{"id": "a", "path": "a.wav", "text": "w1"}\n'
    (tmp_path / "twice.jsonl").write_text(line + line)
    for name, message in {
        "latin.txt": "latin.txt line 2 is not UTF-8", "cut.gz": "cut.gz is truncated or damaged",
        "no.xz": "no.xz is truncated or damaged", "empty.txt": "no text to train", "none.txt": "none.txt",
        "twice.jsonl": "twice.jsonl line 2, first seen in line 1",
    }.items():
        process = run_program("--text", tmp_path / name, "--tokens", tokens, "--order", 3, "--out", out)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 1 and message in errors and "Traceback" not in errors, errors
        assert not out.exists()


def test_program_checks_what_it_reads_and_writes_last_before_it_counts(tmp_path):
    tokens, text = tmp_path / "tokens", write_text(tmp_path, ["w1 w2"])
    train_tokenizer([" ".join(VOCABULARY)], TokenConfig(kind="word"), tokens)
    (tmp_path / "folder.arpa").mkdir()
    for out, held_out, code, message in (
        ("lm.arpa.xz", [], 2, "--out must be a file that ends in .arpa, .arpa.gz or .npz, got"),
        ("folder.arpa", [], 2, "--out must be a file"), ("lm.arpa", ["--held-out", text], 1, "text.txt"),
    ):
        process = run_program("--text", text, "--tokens", tokens, "--order", 2, "--out", tmp_path / out, *held_out)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == code and message in errors and "Traceback" not in errors, errors
        assert "sentences" not in errors and not (tmp_path / out).is_file()


def test_program_that_is_stopped_leaves_nothing_behind(tmp_path):
    train_tokenizer([" ".join(VOCABULARY)], TokenConfig(kind="word"), tmp_path / "tokens")
    os.mkfifo(tmp_path / "text")
    out = tmp_path / "out" / "lm.arpa"
    process = run_program("--text", tmp_path / "text", "--tokens", tmp_path / "tokens", "--order", 3, "--out", out)
    file = None
    while file is None and process.poll() is None:
        with suppress(OSError):  # until the program reads
            file = os.open(tmp_path / "text", os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    assert file is not None, process.stderr.read()
    os.write(file, b"w1 w2\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 75
    os.close(file)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert "Traceback" not in process.stderr.read()
