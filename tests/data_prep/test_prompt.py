"""The judge prompt: pieces joined equal Jinja's own rendering, and templates that touch the texts are refused."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from common.battle import Battle
from common.experiment import Labels

TEXTS = st.tuples(*[st.text(max_size=40)] * 3)


@given(turns=st.lists(TEXTS, min_size=1, max_size=4), dropped=st.integers(0, 2))
def test_joined_pieces_equal_jinja(judge_prompt, turns, dropped):
    jinja = Environment(trim_blocks=True, lstrip_blocks=True).from_string(judge_prompt.source)
    plain = [SimpleNamespace(prompt=p, a=a, b=b) for p, a, b in turns]
    expected = jinja.render(turns=plain, dropped=int(bool(dropped)), labels=Labels())
    prompts, a, b = zip(*turns, strict=True)
    assert judge_prompt.message(Battle("1", prompts, a, b), dropped) == expected


def test_the_exact_text_of_the_committed_prompt(judge_prompt):
    assert judge_prompt.message(Battle("1", ("Hi?",), ("Yes.",), ("No.",))) == (
        "Two assistants, A and B, answered the same user. Decide which answer people prefer.\n\n"
        "### User\nHi?\n\n### Assistant A\nYes.\n\n### Assistant B\nNo.\n\n"
        "### Question\nWhich assistant do people prefer? Reply with A for assistant A, B for assistant B, "
        "or C for a tie.\nVerdict:"
    )
