"""The judge prompt: pieces joined equal Jinja's own rendering, and templates that touch the texts are refused."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from common.battle import Battle
from common.errors import ArenaError
from common.experiment import Labels
from data_prep.prompt import JudgePrompt

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


def test_jinja_inside_a_vote_is_never_rendered(judge_prompt):
    message = judge_prompt.message(Battle("1", ("{{ 7 * 7 }}{% for x in y %}",), ("\ue0000:a\ue001",), ("b",)))
    assert "{{ 7 * 7 }}{% for x in y %}" in message and "49" not in message
    assert "\ue0000:a\ue001" in message


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("{% for t in turns %}{{ t.prompt }}{{ t.a }}{% endfor %}", "places 2 texts instead of 3"),
        ("{% for t in turns %}{{ t.prompt }}{{ t.a }}{{ t.b }}{{ t.b }}{% endfor %}", "places 4 texts instead of 3"),
        ("{% for t in turns %}{{ t.prompt | upper }}{{ t.a }}{{ t.b }}{% endfor %}", "instead of|changes or tests"),
        ("{% for t in turns %}{{ t.prompt | trim }}{{ t.a }}{{ t.b }}{% endfor %}", "changes or tests"),
        (
            "{% for t in turns %}{{ t.prompt }}{{ t.a }}{{ t.b }}{% if t.a == t.b %}!{% endif %}{% endfor %}",
            "changes or",
        ),
        ("{% for t in turns %}{{ t.promt }}{{ t.a }}{{ t.b }}{% endfor %}", "promt"),
        ("{% for t in turns %}{{ t.prompt }", "line 1"),
        ("{% for t in turns %}{{ t.prompt }}{{ t.a }}{{ t.b }}{% endfor %}{{ missing }}", "'missing' is undefined"),
        ("{{ turns[0].__class__.__mro__ }}", "does more than place texts"),
        ("no text at all", "places 0 texts"),
    ],
)
def test_templates_that_would_lose_or_change_texts_are_refused(source, fault):
    with pytest.raises(ArenaError, match=fault) as caught:
        JudgePrompt(source, Labels(), where="my_prompt.j2")
    assert str(caught.value).startswith("my_prompt.j2") and "remedy: place {{ turn.prompt }}" in str(caught.value)


def test_a_missing_template_is_named(tmp_path):
    with pytest.raises(ArenaError, match=r"none\.j2.*cannot be read"):
        JudgePrompt.load(tmp_path / "none.j2", Labels())
