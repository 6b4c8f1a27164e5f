"""A case of the corpus: how a good place is broken, what is then called, and what must be said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bad_inputs.place import Place

PREPARE = ("prepare", "-e", "exam", "--train", "votes.csv")
PREPARE_TEST = (*PREPARE, "--test", "test.csv")
SFT = ("sft", "-e", "exam")
SCORE = ("score", "-e", "exam")
SCORE_INPUT = ("score", "-e", "exam", "--input", "test.csv", "--output", "mine.csv")
COMPARE = ("compare", "-e", "exam")
SHOW = ("show", "9000", "-e", "exam")
SHOW_PAIR = (*SHOW, "--stage", "dpo_reward")


@dataclass(frozen=True)
class Case:
    """`call` is a command's arguments or a function; exit code 0 means that the words stand in the audit."""

    name: str
    breaks: Callable[[Place], object]
    call: tuple[str, ...] | Callable[[], object]
    words: tuple[str, ...]
    code: int = 1
    writes: tuple[str, ...] = ()  # what the call may write before the fault shows


def write(path: str, content: bytes | str) -> Callable[[Place], object]:
    """Return what puts `content` in a file's place."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    return lambda place: Path(path).write_bytes(data)


def change(path: str, how: Callable[[bytes], bytes]) -> Callable[[Place], object]:
    """Return what changes a file's bytes."""
    return lambda place: Path(path).write_bytes(how(Path(path).read_bytes()))


def remove(path: str) -> Callable[[Place], object]:
    """Return what takes a file away."""
    return lambda place: Path(path).unlink()


def cut(share: float) -> Callable[[bytes], bytes]:
    """Return what keeps the first share of some bytes."""
    return lambda data: data[: int(len(data) * share)]
