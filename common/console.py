"""Text on a terminal: nothing in it steers the terminal, shows a secret or fails to be encoded."""

from __future__ import annotations

import os
import re
import sys
from datetime import timedelta

_PLAIN_NAME = re.compile(r"[\w.:/@+-]{1,80}", re.ASCII)
_SECRET = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# A shorter value is a switch or a number, and would be found everywhere.
_SHORTEST_SECRET = 8
_LONGEST_NAME = 60
_LONGEST_TIME = 1e9  # seconds


def printable(text: str) -> str:
    """Return the text without what would steer a terminal, and without secrets."""
    return visible(hide_secrets(text))


def one_line(text: str) -> str:
    """Return the name of a file or a setting with its line ends shown as signs, so that it cannot forge a line."""
    return text.replace("\n", "␊")


def name_of(value: object) -> str:
    """Return an id as an error names it: a plain one as it is, any other quoted, in ASCII and not too long."""
    text = str(value)
    if _PLAIN_NAME.fullmatch(text):
        return text
    return ascii(text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}…")


def hide_secrets(text: str) -> str:
    """Return the text with the values of our environment's tokens, keys and passwords replaced by their names."""
    for name, value in secrets().items():
        text = text.replace(value, f"<{name}>")
    return text


def secrets() -> dict[str, str]:
    """Return the environment's variables that hold something secret, by their names (HF_TOKEN, WANDB_API_KEY, …)."""
    return {
        name: value for name, value in os.environ.items() if len(value) >= _SHORTEST_SECRET and _SECRET.search(name)
    }


# What moves a terminal's cursor, rings, recolours, turns the writing round or cannot be encoded.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return the text with its control characters as visible signs: ESC becomes ␛, others \\x9b or \\u202e.

    Line ends and tabs stay.
    """
    return _UNSAFE.sub(lambda match: _picture(ord(match[0])), text)


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    return str(timedelta(seconds=round(min(seconds, _LONGEST_TIME))))


def make_output_safe() -> None:
    """Let standard output and error write escapes for characters that their encoding lacks (ASCII, GBK, cp1252)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test may have put another kind of stream in its place
            stream.reconfigure(errors="backslashreplace")
