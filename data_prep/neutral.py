"""Texts of strangers, made harmless for a chat template without changing what a reader sees."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from data_prep.battle import Battle

# What stands for a null or empty text, so that the judge sees that there was none.
EMPTY = "(empty)"
# LLaMA-Factory replaces these in any text: multimodal placeholders raise, the braces are filled in.
_PLACEHOLDERS = ("<image>", "<video>", "<audio>", "{{idx}}", "{{content}}")
# A zero-width space behind the first character: no longer a special token, and still readable.
_BREAK = "\u200b"


class Neutralizer:
    """Breaks up the strings that a tokenizer would read as special tokens or a template as placeholders."""

    def __init__(self, special_strings: Iterable[str]):
        strings = {s for s in (*special_strings, *_PLACEHOLDERS) if len(s) > 1}
        first = "".join(sorted({re.escape(s[0]) for s in strings}))
        longest_first = sorted(strings, key=lambda s: (-len(s), s))
        # The look-ahead on the first character keeps the search fast in ordinary text.
        self._pattern = re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})")

    def __call__(self, text: str) -> str:
        """Return the text with every such string broken up, and EMPTY for an empty one."""
        if not text:
            return EMPTY
        previous = None
        while previous != text:  # breaking one string up may never build another, but stay certain
            previous, text = text, self._pattern.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)
        return text

    def battle(self, battle: Battle) -> Battle:
        """Return the battle with each of its texts so treated."""
        return replace(
            battle,
            prompts=tuple(map(self, battle.prompts)),
            responses_a=tuple(map(self, battle.responses_a)),
            responses_b=tuple(map(self, battle.responses_b)),
        )


# What moves a terminal's cursor, rings, recolours, turns the writing round or cannot be encoded.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return a text that a terminal prints as it stands: control characters become signs that can be read.

    Line ends and tabs stay; ESC becomes ␛, other controls their pictures or \\x9b, \\u202e.
    """
    return _UNSAFE.sub(lambda match: _picture(ord(match[0])), text)


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
