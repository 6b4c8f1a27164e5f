"""Strings that a chat template would obey are broken up; everything else stays as it is."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.console import visible
from data_prep.sanitize import EMPTY, Neutralizer

SPECIALS = ("<|im_start|>", "<|im_end|>", "<s>", "[INST]")


@given(st.lists(st.sampled_from([*SPECIALS, "<image>", "{{idx}}", "<", "|", "im_", "end", "text", " "]), max_size=12))
def test_no_special_string_survives_and_the_text_can_still_be_read(parts):
    text = "".join(parts)
    result = Neutralizer(SPECIALS)(text)
    assert not any(s in result for s in (*SPECIALS, "<image>", "{{idx}}"))
    assert result.replace("\u200b", "") == (text or EMPTY)


@given(st.text())
def test_ordinary_text_is_untouched(text):
    neutral = Neutralizer(SPECIALS)
    if text and not any(s in text for s in (*SPECIALS, "<image>", "<video>", "<audio>", "{{idx}}", "{{content}}")):
        assert neutral(text) == text


@pytest.mark.parametrize("text", ["a < b and c > d", "<div>[x]</div>", "if (a <= b) {}", "{ {idx} }"])
def test_code_is_untouched(text):
    assert Neutralizer(SPECIALS)(text) == text


@given(st.text())
def test_what_is_visible_moves_no_terminal_and_can_be_printed(text):
    shown = visible(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in shown)
    shown.encode("utf-8")
    assert visible(shown) == shown


def test_controls_become_signs_that_can_be_read():
    assert visible("a\x1b[31mred\x07\x7f\x9b5n\r\n\tb") == "a␛[31mred␇␡\\x9b5n␍\n\tb"
    assert visible("abc\u202etxt\u2066\ud800é日") == "abc\\u202etxt\\u2066\\ud800é日"
