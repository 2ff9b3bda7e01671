import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.config.options import ConfigError, TokenConfig
from cascade.text.normal import normalize_text
from cascade.text.tokens import Tokenizer, train_tokenizer

TEXTS = ["turn the light on", "turn the radio off", "call zoë", "play music in the kitchen", "größer 12 你好"] * 3
KINDS = {
    "bpe": TokenConfig(kind="bpe", vocab_size=50),
    "bpe_bytes": TokenConfig(kind="bpe", vocab_size=310, byte_fallback=True),
    "char": TokenConfig(kind="char", vocab_size=100),
    "char_bytes": TokenConfig(kind="char", vocab_size=500, byte_fallback=True),
    "word": TokenConfig(kind="word", vocab_size=100),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    return {name: train_tokenizer(TEXTS, config, root / name) for name, config in KINDS.items()}, root


@pytest.mark.parametrize("name", KINDS)
def test_training_text_survives_encode_and_decode(tokenizers, name):
    tokenizer = tokenizers[0][name]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_id not in ids and tokenizer.blank_id not in ids
        assert tokenizer.unknown_characters(text) == set()


@pytest.mark.parametrize("name", ["bpe_bytes", "char_bytes"])
def test_any_text_survives_with_byte_fallback(tokenizers, name):
    tokenizer = tokenizers[0][name]

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.text(max_size=12))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalize(text)
        assert tokenizer.unknown_characters(text) == set()

    check()
    assert tokenizer.decode(tokenizer.encode("<0x41> <blk> <unk> ñ")) == "<0x41> <blk> <unk> ñ"


@pytest.mark.parametrize("name", ["bpe_bytes", "char_bytes"])
def test_a_character_that_is_not_whole_yet_is_left_out_while_more_may_come(tokenizers, name):
    tokenizer = tokenizers[0][name]
    text = "naïve 漢字 😀 x"  # characters of one to four bytes, none of them in the training text but x
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    for count in range(len(ids) + 1):
        partial = tokenizer.decode(ids[:count], complete=False)
        assert text.startswith(partial) and "\ufffd" not in partial
        whole = tokenizer.decode(ids[:count])
        assert whole.rstrip("\ufffd").rstrip() == partial, "at the end, a broken character shows, once"
        assert whole.count("\ufffd") <= 1


def test_characters_name_the_tokens_they_are_made_of(tokenizers):
    tokenizer = tokenizers[0]["char_bytes"]
    ids = [0, *tokenizer.encode("n漢n")]
    ids.insert(4, 0)  # a blank between the bytes of one character
    assert tokenizer.characters(ids) == [
        ("\u2581", 1, 1), ("n", 2, 2), ("漢", 3, 6), ("n", 7, 7),
    ]


def test_bytes_that_are_no_text_neither_raise_nor_hide(tokenizers):
    tokenizer = tokenizers[0]["char_bytes"]
    byte = {tokenizer.id_to_symbol(index): index for index in range(tokenizer.vocab_size)}
    for names, text in (
        (("<0xE4>", "n", "<0xBD>"), "\ufffdn\ufffd"), (("<0xE4>", "<0xE4>", "<0xBD>", "<0xA0>"), "\ufffd你"),
        (("<0xFF>", "<0x07>", "<0x1B>", "n"), "\ufffdn"), (("n", "<0xE2>", "<0x96>", "<0x81>", "n"), "n n"),
    ):
        assert tokenizer.decode([byte[name] for name in names]) == text


@pytest.mark.parametrize("name", KINDS)
def test_blank_is_zero_and_symbols_joined_as_sherpa_onnx_does_give_the_text(tokenizers, name):
    tokenizer = tokenizers[0][name]
    assert tokenizer.blank_id == 0 and tokenizer.id_to_symbol(0) == "<blk>"
    assert tokenizer.id_to_symbol(tokenizer.unk_id) == "<unk>"
    for text in TEXTS:
        symbols = [tokenizer.id_to_symbol(index) for index in tokenizer.encode(text)]
        assert "".join(symbols).replace("\u2581", " ").strip() == text


@pytest.mark.parametrize("name", KINDS)
def test_loaded_tokenizer_equals_trained_one(tokenizers, name):
    trained, root = tokenizers[0][name], tokenizers[1]
    loaded = Tokenizer.load(root / name)
    assert loaded.vocab_size == trained.vocab_size
    assert all(loaded.encode(text) == trained.encode(text) for text in TEXTS)
    lines = (root / name / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{loaded.id_to_symbol(index)} {index}" for index in range(loaded.vocab_size)]
    assert (root / name / "tokens.model").exists() == (KINDS[name].kind != "word")
    assert (root / name / "bpe.vocab").exists() == (KINDS[name].kind == "bpe")


def test_bpe_vocab_lists_piece_and_score(tokenizers):
    tokenizer, root = tokenizers[0]["bpe"], tokenizers[1]
    lines = (root / "bpe" / "bpe.vocab").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [line.split("\t")[0] for line in lines] == [tokenizer.id_to_symbol(i) for i in range(tokenizer.vocab_size)]
    assert all(float(line.split("\t")[1]) <= 0 for line in lines)


def test_bpe_vocab_size_is_what_was_asked_for(tokenizers):
    assert tokenizers[0]["bpe"].vocab_size == 50


@pytest.mark.parametrize("name, text, lacking", [
    ("bpe", "turn ñ", {"ñ"}), ("char", "XY turn", {"X", "Y"}), ("word", "turn the tide", {"tide"}),
])
def test_unknown_characters_are_named_and_encoded_as_unk(tokenizers, name, text, lacking):
    tokenizer = tokenizers[0][name]
    assert tokenizer.unknown_characters(text) == lacking
    assert tokenizer.unk_id in tokenizer.encode(text)
    assert "\u2047" in tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)).startswith("turn") == (name != "char")


def test_training_twice_gives_the_same_tokens(tokenizers, tmp_path):
    for name, config in KINDS.items():
        again = train_tokenizer(TEXTS, config, tmp_path / name)
        assert (tmp_path / name / "tokens.txt").read_bytes() == (tokenizers[1] / name / "tokens.txt").read_bytes()
        assert again.vocab_size == tokenizers[0][name].vocab_size


def test_another_kind_in_the_same_folder_leaves_no_stale_file_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    train_tokenizer(TEXTS, KINDS["bpe"], tmp_path)
    train_tokenizer(TEXTS, KINDS["word"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "tokens.txt", "tokenizer.json"}
    assert Tokenizer.load(tmp_path).kind == "word"


def test_words_beyond_the_vocabulary_size_are_the_rarest(tmp_path):
    tokenizer = train_tokenizer(["a a a b b c"], TokenConfig(kind="word", vocab_size=4), tmp_path)
    assert tokenizer.vocab_size == 4
    assert tokenizer.unknown_characters("a b c") == {"c"}


@pytest.mark.parametrize("case, text", [("keep", "Zoë Straße"), ("lower", "zoë straße"), ("upper", "ZOË STRASSE")])
def test_case_applies_to_encoding_and_references_alike(tmp_path, case, text):
    tokenizer = train_tokenizer(["Zoë Straße"], TokenConfig(kind="char", vocab_size=40, case=case), tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.normalize("Zoe\u0308  Straße\n") == normalize_text("Zoë Straße", case) == text
    assert loaded.decode(loaded.encode("Zoë Straße")) == text == tokenizer.decode(tokenizer.encode("Zoe\u0308 Straße"))


def test_the_form_of_the_text_is_kept_with_the_tokens(tmp_path):
    config = TokenConfig(kind="char", vocab_size=40, case="lower", normal_form="nfkc", strip_punctuation=True)
    train_tokenizer(["Zoë, ist das Ｑ1?"], config, tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.normalize("ZOË… IST: DAS „Q１“") == "zoë ist das q1"
    assert loaded.decode(loaded.encode("Zoë ist das Q1!")) == "zoë ist das q1"
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": about["kind"], "case": about["case"]}))
    assert Tokenizer.load(tmp_path).normalize("A, Ｂ") == "a, ｂ", "folders made before these options existed"


@pytest.mark.parametrize("config, message", [
    (TokenConfig(kind="bpe", vocab_size=5000), "tokens.vocab_size must be at most"),
    (TokenConfig(kind="bpe", vocab_size=5), "tokens.vocab_size is too small"),
    (TokenConfig(kind="char", vocab_size=100, byte_fallback=True), "byte_fallback needs tokens.vocab_size"),
])
def test_a_vocabulary_size_that_does_not_fit_is_a_wrong_option(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(TEXTS, config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", "  "], KINDS["word"], tmp_path)


def test_a_broken_folder_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json not found"):
        Tokenizer.load(tmp_path)
    train_tokenizer(TEXTS, KINDS["char"], tmp_path)
    (tmp_path / "tokens.model").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="tokens.model not found"):
        Tokenizer.load(tmp_path)
    (tmp_path / "away").rename(tmp_path / "tokens.model")
    lines = (tmp_path / "tokens.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "tokens.txt").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="not of one tokenizer"):
        Tokenizer.load(tmp_path).encode("one")
    (tmp_path / "tokens.txt").write_text("".join(lines[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "char"}))
    with pytest.raises(ValueError, match="must hold kind and case"):
        Tokenizer.load(tmp_path)
