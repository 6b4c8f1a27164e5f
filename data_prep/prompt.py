"""The judge prompt: a Jinja template that places the turns, prepared once per number of turns.

Rendering 60,000 battles through Jinja would be slow and would hide where a text lies in the prompt; so the
template is rendered once with marks in the texts' places, and a battle's prompt is those pieces joined with its
texts. That is only right for a template that places each text once and unchanged, which is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from common.errors import ArenaError
from data_prep.sanitize import Lines

if TYPE_CHECKING:
    from common.battle import Battle
    from common.experiment import Labels

LARGEST = 1 << 16  # characters of a template
_STRUCTURE = frozenset({"Template", "Output", "TemplateData", "For", "If", "CondExpr", "Filter", "Assign"})
_VALUES = frozenset({"Const", "Name", "Getattr", "Getitem", "Slice", "Concat", "Add", "Sub", "Neg"})
_CONDITIONS = frozenset({"Compare", "Operand", "Test", "Not", "And", "Or"})
_ALLOWED = _STRUCTURE | _VALUES | _CONDITIONS
_FILTERS = frozenset({"upper", "lower", "capitalize", "title", "trim", "length", "count", "first", "last", "default"})
# Of these an assigned value could be twice as long as the one before it, and so on.
_GROWING = ("Concat", "Add")


def sandbox() -> Any:
    """Return the Jinja environment of judge prompts: strict about names, no access to Python, no helper functions."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.clear()  # range, lipsum, cycler, …
    return environment


def faults(tree: nodes.Template) -> list[str]:
    """Return what a parsed template must not hold, each with its line; nothing for a template that is safe."""
    return list(dict.fromkeys(_faults(tree, in_loop=False)))


def _faults(node: nodes.Node, in_loop: bool) -> Iterator[str]:
    kind = type(node).__name__
    if kind not in _ALLOWED:
        yield f"line {node.lineno}: {kind} is not allowed"
    elif kind == "Getattr" and node.attr.startswith("_"):
        yield f"line {node.lineno}: the name {node.attr!r} is not allowed"
    elif kind == "Filter" and node.name not in _FILTERS:
        yield f"line {node.lineno}: the filter {node.name!r} is not allowed"
    elif kind == "For" and (in_loop or node.recursive or not _over_turns(node.iter)):
        yield f"line {node.lineno}: only one loop, over `turns`, is allowed"
    elif kind == "Assign" and any(type(each).__name__ in _GROWING for each in _within(node.node)):
        yield f"line {node.lineno}: a value that is set may not be put together from others"
    for child in node.iter_child_nodes():
        yield from _faults(child, in_loop or kind == "For")


def _over_turns(node: nodes.Node) -> bool:
    if type(node).__name__ == "Getitem":  # turns[1:]
        node = node.node
    return type(node).__name__ == "Name" and node.name == "turns"


def _within(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _within(child)


FIELDS = ("prompt", "a", "b")
# Two private-use characters enclose a mark; texts never pass through the marked rendering.
_MARK = re.compile("\ue000(\\d+):(prompt|a|b)\ue001")
_SHOWN = 5
_PROBE_TEXTS = ("  Spaces AROUND \n", "", "x", "<b>&'\"{{ y }}{% z %}", "same", "same")
_REMEDY = (
    "place {{ turn.prompt }}, {{ turn.a }} and {{ turn.b }} once each in `for turn in turns`, without filters or tests"
)


@dataclass(frozen=True)
class Skeleton:
    """A rendered template: `pieces[i]` stands before the text `slots[i]`, the last piece after all of them."""

    pieces: tuple[str, ...]
    slots: tuple[tuple[int, str], ...]

    def fill(self, texts: dict[tuple[int, str], str]) -> str:
        """Return the prompt with every text in its place."""
        parts = [part for piece, slot in zip(self.pieces, self.slots, strict=False) for part in (piece, texts[slot])]
        return "".join([*parts, self.pieces[-1]])


class JudgePrompt:
    """A judge prompt's template, checked, with its skeleton for each number of turns."""

    def __init__(self, source: str, labels: Labels, where: str = "judge prompt"):
        """Compile and check `source`; raises ArenaError that names the template and the line."""
        from jinja2 import TemplateError

        self.source, self.where = source, where
        self._labels = SimpleNamespace(a=labels.a, b=labels.b, tie=labels.tie)
        if len(source) > LARGEST:
            raise ArenaError(f"is longer than {LARGEST:,} characters", where=where, remedy="give a judge prompt")
        environment = sandbox()
        try:
            unsafe = faults(environment.parse(source))
            if not unsafe:
                self._template = environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError, OverflowError) as error:
            line = getattr(error, "lineno", None)
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise ArenaError(
                f"is not a valid Jinja template: {reason}",
                where=f"{where}{f' line {line}' if line else ''}",
                remedy=_REMEDY,
            ) from None
        if unsafe:
            raise ArenaError(
                "does more than place texts:" + "".join(f"\n  - {fault}" for fault in unsafe[:_SHOWN]),
                where=where,
                remedy=_REMEDY,
            )
        self._skeletons: dict[tuple[int, bool], Skeleton] = {}
        for turns in (1, 2, 3):
            self._check_plain(turns, dropped=turns - 1)

    @classmethod
    def load(cls, path: Path, labels: Labels) -> JudgePrompt:
        """Read the template from a file; raises ArenaError if it is missing or not UTF-8."""
        try:
            return cls(path.read_text(encoding="utf-8"), labels, where=str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ArenaError(
                f"the judge prompt cannot be read: {error}",
                where=str(path),
                remedy="mend the key prompt_template",
            ) from None

    def skeleton(self, turns: int, dropped: int) -> Skeleton:
        """Return the pieces for a battle of `turns` kept turns, `dropped` older ones left out."""
        key = (turns, bool(dropped))
        if key not in self._skeletons:
            self._skeletons[key] = self._make_skeleton(turns, bool(dropped))
        return self._skeletons[key]

    @cached_property
    def lines(self) -> Lines:
        """The template's own lines, by which the judge tells its sections apart."""
        whole, begun = {}, {}  # dicts keep the order
        for turns, dropped in ((1, 0), (2, 1), (3, 0)):
            for number, piece in enumerate(self.skeleton(turns, dropped).pieces):
                *full, last = piece.split("\n") if number == 0 else ["", *piece.split("\n")[1:]]
                whole.update(dict.fromkeys(line.strip() for line in full))
                begun[last.strip()] = None
        return Lines(tuple(line for line in whole if line and line not in begun), tuple(filter(None, begun)))

    def message(self, battle: Battle, dropped: int = 0) -> str:
        """Return the user message for a battle whose texts are already fitted."""
        return self.skeleton(battle.turns, dropped).fill(texts_of(battle))

    def _render(self, turns: list[SimpleNamespace], dropped: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(turns=turns, dropped=int(dropped), labels=self._labels)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ArenaError(f"cannot be rendered: {error}", where=self.where, remedy=_REMEDY) from None
        except RecursionError:
            raise ArenaError("cannot be rendered: nested too deeply", where=self.where, remedy=_REMEDY) from None

    def _make_skeleton(self, turns: int, dropped: bool) -> Skeleton:
        marked = [SimpleNamespace(**{f: f"\ue000{i}:{f}\ue001" for f in FIELDS}) for i in range(turns)]
        parts = _MARK.split(self._render(marked, dropped))
        slots = tuple((int(i), field) for i, field in zip(parts[1::3], parts[2::3], strict=True))
        if sorted(slots) != sorted((i, f) for i in range(turns) for f in FIELDS):
            raise ArenaError(
                f"with {turns} turn(s) it places {len(slots)} texts instead of {3 * turns}, each once",
                where=self.where,
                remedy=_REMEDY,
            )
        return Skeleton(tuple(parts[0::3]), slots)

    def _check_plain(self, turns: int, dropped: int) -> None:
        for shift in range(len(_PROBE_TEXTS)):
            texts = {
                (i, f): _PROBE_TEXTS[(shift + 3 * i + k) % len(_PROBE_TEXTS)]
                for i in range(turns)
                for k, f in enumerate(FIELDS)
            }
            plain = [SimpleNamespace(**{f: texts[i, f] for f in FIELDS}) for i in range(turns)]
            if self._render(plain, bool(dropped)) != self.skeleton(turns, dropped).fill(texts):
                raise ArenaError("changes or tests the texts that it places", where=self.where, remedy=_REMEDY)


def texts_of(battle: Battle) -> dict[tuple[int, str], str]:
    """Return a battle's texts by (turn, field)."""
    columns = (battle.prompts, battle.responses_a, battle.responses_b)
    return {(i, f): text for f, column in zip(FIELDS, columns, strict=True) for i, text in enumerate(column)}
