"""Untrusted texts, made safe for a chat template and a judge prompt without changing what a reader sees."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from common.battle import Battle

# What stands for a null or empty text, so that the judge sees that there was none.
EMPTY = "(empty)"
# LLaMA-Factory replaces these in any text: multimodal placeholders raise, the braces are filled in.
_PLACEHOLDERS = ("<image>", "<video>", "<audio>", "{{idx}}", "{{content}}")
# A zero-width space behind the first character: no longer a special token, and still readable.
BREAK = "\u200b"
# Everything at which some reader or tokenizer begins a new line, and the space that may open or close one.
_ENDS = "\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"
_SPACE = "[ \t\u00a0]"


class Lines(NamedTuple):
    """The fixed lines of a prompt: `whole` ones, and `begun` ones, which a text or the answer goes on with."""

    whole: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()


class Neutralizer:
    """Breaks up what a tokenizer would read as a special token, a template as a placeholder, a judge as a section."""

    def __init__(self, special_strings: Iterable[str], lines: Lines | None = None):
        """`lines` are the prompt's own: one that occurs in a text would look like the prompt's structure."""
        strings = {s for s in (*special_strings, *_PLACEHOLDERS) if len(s) > 1}
        first = "".join(sorted({re.escape(s[0]) for s in strings}))
        longest_first = sorted(strings, key=lambda s: (-len(s), s))
        # The look-ahead on the first character keeps the search fast in ordinary text.
        self._pattern = re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})")
        self._line = _line_pattern(lines or Lines())

    def __call__(self, text: str) -> str:
        """Return the text with every such string and line broken up, and EMPTY for an empty one."""
        if not text:
            return EMPTY
        previous = None
        while previous != text:  # until breaking one string up has built no other
            previous, text = text, self._pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
        if self._line is not None:
            text = self._line.sub(lambda match: match[0] + BREAK, "\n" + text)[1:]
        return text

    def battle(self, battle: Battle) -> Battle:
        """Return the battle with each of its texts so treated."""
        fields = ("prompts", "responses_a", "responses_b")
        return replace(battle, **{name: tuple(map(self, getattr(battle, name))) for name in fields})


def _line_pattern(lines: Lines) -> re.Pattern[str] | None:
    """Match a line's end before it, its indent and its first character, where the line is one of the prompt's own."""
    # A rule (---) or a bracket is no section: ordinary texts are full of them.
    whole, begun = ([_any_spelling(line) for line in group if sum(map(str.isalnum, line)) > 2] for group in lines)
    kinds = [f"(?:{'|'.join(whole)}){_SPACE}*:?{_SPACE}*(?:$|[{_ENDS}])"] if whole else []
    kinds += [f"(?:{'|'.join(begun)})"] if begun else []
    return re.compile(rf"[{_ENDS}]{_SPACE}*(?=(?i:{'|'.join(kinds)}))\S") if kinds else None


def _any_spelling(line: str) -> str:
    """Match a line in any case, with any space between its words and at any level of heading."""
    words = line.split()
    heading = bool(words) and set(words[0]) == {"#"}
    spelled = f"{_SPACE}+".join(map(re.escape, words[heading:]))
    return rf"\#{{1,6}}{_SPACE}*{spelled}" if heading else spelled
