import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.config.options import TokenConfig
from cascade.text.normal import join_texts, normalize_text, normalizer, split_words


@pytest.mark.parametrize(("text", "expected"), [
    ("„Ja“, sagte sie – um 12:30 Uhr!", "Ja sagte sie um 12:30 Uhr"),
    ("3,5 % von 1.000 € (ca. 35 €).", "3,5 % von 1.000 € ca 35 €"),
    ("l’été, don't; 'quoted' dogs'", "l'été don't quoted dogs"),
    ("E-Mail an a@b: R&D…", "E Mail an a@b R&D"),
    ("你好，世界。", "你好世界"),
    ("¿Qué? ¡Sí!", "Qué Sí"),
    ("...", ""),
])
def test_punctuation_goes_and_what_is_spoken_stays(text, expected):
    assert normalize_text(text, strip_punctuation=True) == expected


def test_nothing_but_space_and_what_is_invisible_is_lost_by_default():
    text = "„Ja“, 12:30 Uhr… 3,5\u00a0% R&D – l’été"
    assert normalize_text(f"\ufeff {text}\u00ad\x07\n") == text.replace("\u00a0", " ")


@pytest.mark.parametrize("mark", [0x061C, 0x200E, 0x200F, 0x202A, 0x202E, 0x2061, 0x2066, 0x2069])
def test_marks_of_direction_are_no_part_of_words_and_joiners_inside_words_are(mark):
    assert normalize_text(f"{chr(mark)}שלום עולם{chr(mark)}") == "שלום עולם"
    assert normalize_text("می\u200cخواهم") == "می\u200cخواهم"


def test_nfkc_makes_full_width_letters_and_digits_plain():
    assert normalize_text("ＡＢＣ １２３ ﬁx", normal_form="nfkc", case="lower") == "abc 123 fix"
    assert normalize_text("ＡＢＣ") == "ＡＢＣ"


def test_spaces_inside_scripts_without_spaces_go_unless_words_are_the_tokens():
    text = "而 对 楼市 in Peking 成交 抑制"
    assert normalizer(TokenConfig(kind="char"))(text) == "而对楼市 in Peking 成交抑制"
    assert normalizer(TokenConfig(kind="word"))(text) == text
    assert normalizer(TokenConfig(kind="char"))("한국어 문장 입니다") == "한국어 문장 입니다"


@pytest.mark.parametrize("options", [
    {}, {"case": "lower", "normal_form": "nfkc", "strip_punctuation": True}, {"strip_punctuation": True},
])
def test_normalising_twice_changes_nothing_more(options):
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.text(st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("a1'’ʼ.,: 你กิか\u3099")
    ), max_size=8))
    def check(text):
        once = normalize_text(text, **options)
        assert normalize_text(once, **options) == once

    check()


@pytest.mark.parametrize(("text", "words"), [
    ("turn the light on", ["turn", "the", "light", "on"]),
    ("你好 世界", ["你", "好", "世", "界"]),
    ("我love你", ["我", "love", "你"]),
    ("カレー", ["カ", "レ", "ー"]),
    ("\uff76\uff9e\uff8a\uff9f", ["\uff76\uff9e", "\uff8a\uff9f"]),
    ("กินข้าว", ["กิ", "น", "ข้", "า", "ว"]),
    ("zoe\u0308 größer", ["zoe\u0308", "größer"]),
    ("한국어 문장", ["한국어", "문장"]),
    ("", []),
])
def test_words_are_between_spaces_or_characters_of_scripts_without_spaces(text, words):
    assert split_words(text) == words


def test_texts_are_joined_with_a_space_where_their_script_has_spaces():
    assert join_texts(["turn it on", "", "please"]) == "turn it on please"
    assert join_texts(["你好", "世界", "ok", "好"]) == "你好世界 ok 好"
