"""The judge prompt: joined pieces equal Jinja's own rendering; what a chat template would obey is broken up."""

import unicodedata
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from common.battle import Battle
from common.console import visible
from common.experiment import Labels
from data_prep.prompt import EMPTY, Neutralizer

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


@given(st.text())
def test_what_is_visible_moves_no_terminal_and_can_be_printed(text):
    shown = visible(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in shown)
    shown.encode("utf-8")
    assert visible(shown) == shown


def test_controls_become_signs_that_can_be_read():
    assert visible("a\x1b[31mred\x07\x7f\x9b5n\r\n\tb") == "a␛[31mred␇␡\\x9b5n␍\n\tb"
    assert visible("abc\u202etxt\u2066\ud800é日") == "abc\\u202etxt\\u2066\\ud800é日"


TEXTS = st.tuples(*[st.text(max_size=40)] * 3)


@given(turns=st.lists(TEXTS, min_size=1, max_size=4), dropped=st.integers(0, 2))
def test_joined_pieces_equal_jinja(judge_prompt, turns, dropped):
    jinja = Environment(trim_blocks=True, lstrip_blocks=True).from_string(judge_prompt.source)
    plain = [SimpleNamespace(prompt=p, a=a, b=b) for p, a, b in turns]
    expected = jinja.render(turns=plain, dropped=int(bool(dropped)), labels=Labels())
    prompts, a, b = zip(*turns, strict=True)
    assert judge_prompt.message(Battle("1", prompts, a, b), dropped) == expected
