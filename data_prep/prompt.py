"""The judge prompt: a Jinja template that places the turns, and the texts, made safe to stand in it.

Rendering 60,000 battles through Jinja would be slow and would hide where a text lies in the prompt; so the
template is rendered once with marks in the texts' places, and a battle's prompt is those pieces joined with its
texts. That is only right for a template that places each text once and unchanged, which is checked.

Untrusted texts are made safe for a chat template and a judge prompt without changing what a reader sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.battle import TEXTS, Battle
from common.errors import ArenaError
from common.experiment import Labels
from common.files import is_in_project, read_regular

# What stands for a null or empty text, so that the judge sees that there was none.
EMPTY = "(empty)"
# LLaMA-Factory replaces these in any text: multimodal placeholders raise, the braces are filled in.
_PLACEHOLDERS = ("<image>", "<video>", "<audio>", "{{idx}}", "{{content}}")
# A zero-width space behind the first character: no longer a special token, and still readable.
BREAK = "\u200b"
# Everything at which some reader or tokenizer begins a new line, and the space that may open or close one.
_ENDS = "\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"
_SPACE = "[ \t\u00a0]"
FIELDS = ("prompt", "a", "b")
_LARGEST = 1 << 16  # characters of a template
# What a template may hold: structure, values, conditions. No calls, macros, includes, multiplication.
_ALLOWED = frozenset({
    *("Template", "Output", "TemplateData", "For", "If", "CondExpr", "Filter", "Assign"),
    *("Const", "Name", "Getattr", "Getitem", "Slice", "Concat", "Add", "Sub", "Neg"),
    *("Compare", "Operand", "Test", "Not", "And", "Or"),
})  # fmt: skip
_FILTERS = frozenset({"upper", "lower", "capitalize", "title", "trim", "length", "count", "first", "last", "default"})
# Two private-use characters enclose a mark; texts never pass through the marked rendering.
_MARK = re.compile("\ue000(\\d+):(prompt|a|b)\ue001")
_PROBE_TEXTS = ("  Spaces AROUND \n", "", "x", "<b>&'\"{{ y }}{% z %}", "same", "same")
# What a template may raise: it may be of another encoding, too deep, written for another program, or compute nonsense.
TEMPLATE_ERRORS = (
    *(TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, SyntaxError),
)
_REMEDY = (
    "place {{ turn.prompt }}, {{ turn.a }} and {{ turn.b }} once each in `for turn in turns`, without filters or tests"
)


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
        return replace(battle, **{name: tuple(map(self, getattr(battle, name))) for name in TEXTS})


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
        self.source, self.where = source, where
        self._labels = SimpleNamespace(a=labels.a, b=labels.b, tie=labels.tie)
        if len(source) > _LARGEST:
            raise ArenaError(f"is longer than {_LARGEST:,} characters", where=where, remedy="give a judge prompt")
        # Strict about names, no access to Python, no helper functions (range, lipsum, cycler, …).
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.globals.clear()
        try:
            unsafe = list(dict.fromkeys(_faults(environment.parse(source), in_loop=False)))
            if unsafe:
                raise self._error("does more than place texts:" + "".join(f"\n  - {fault}" for fault in unsafe[:5]))
            self._template = environment.from_string(source)
        except TEMPLATE_ERRORS as error:
            raise self._error(
                f"is not a valid Jinja template: {_reason(error)}", getattr(error, "lineno", None)
            ) from None
        self._skeletons: dict[tuple[int, bool], Skeleton] = {}
        for turns in (1, 2, 3):
            self._check_plain(turns, dropped=turns > 1)

    @classmethod
    def load(cls, path: Path, labels: Labels) -> JudgePrompt:
        """Read the template from a file; raises ArenaError if it cannot be read or lies outside."""
        try:
            if not path.is_absolute() and not is_in_project(path):
                raise OSError("it lies outside of the project")
            source = "\n".join(read_regular(path, 4 * _LARGEST).decode().replace("\r\n", "\n").split("\r"))
        except (OSError, UnicodeDecodeError) as error:
            what, remedy = f"the judge prompt cannot be read: {error}", "correct the key prompt_template"
            raise ArenaError(what, where=str(path), remedy=remedy) from None
        return cls(source, labels, where=str(path))

    def skeleton(self, turns: int, dropped: int) -> Skeleton:
        """Return the pieces for a battle of `turns` kept turns, `dropped` older ones left out."""
        key = (turns, bool(dropped))
        if key not in self._skeletons:
            self._skeletons[key] = self._make_skeleton(*key)
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

    def _error(self, what: str, line: int | None = None) -> ArenaError:
        return ArenaError(what, where=f"{self.where} line {line}" if line else self.where, remedy=_REMEDY)

    def _render(self, texts: dict[tuple[int, str], str], dropped: bool) -> str:
        count = len(texts) // len(FIELDS)
        turns = [SimpleNamespace(**{field: texts[i, field] for field in FIELDS}) for i in range(count)]
        try:
            return self._template.render(turns=turns, dropped=int(dropped), labels=self._labels)
        except TEMPLATE_ERRORS as error:
            raise self._error(f"cannot be rendered: {_reason(error)}") from None

    def _make_skeleton(self, turns: int, dropped: bool) -> Skeleton:
        marks = {(i, field): f"\ue000{i}:{field}\ue001" for i in range(turns) for field in FIELDS}
        parts = _MARK.split(self._render(marks, dropped))
        slots = tuple((int(i), field) for i, field in zip(parts[1::3], parts[2::3], strict=True))
        if sorted(slots) != sorted(marks):
            raise self._error(f"with {turns} turn(s) it places {len(slots)} texts instead of {3 * turns}, each once")
        return Skeleton(tuple(parts[0::3]), slots)

    def _check_plain(self, turns: int, dropped: bool) -> None:
        """Raise ArenaError where texts of all kinds do not come out of Jinja as they come out of the skeleton."""
        slots = [(i, field) for i in range(turns) for field in FIELDS]
        for shift in range(len(_PROBE_TEXTS)):
            texts = {slot: _PROBE_TEXTS[(shift + number) % len(_PROBE_TEXTS)] for number, slot in enumerate(slots)}
            if self._render(texts, dropped) != self.skeleton(turns, dropped).fill(texts):
                raise self._error("changes or tests the texts that it places")


def texts_of(battle: Battle) -> dict[tuple[int, str], str]:
    """Return a battle's texts by (turn, field)."""
    return {(i, f): text for f, column in zip(FIELDS, battle.texts, strict=True) for i, text in enumerate(column)}


def _faults(node: nodes.Node, in_loop: bool) -> Iterator[str]:
    """Yield what a parsed template must not hold, each with its line; nothing for a template that is safe."""
    kind = type(node).__name__
    if kind not in _ALLOWED:
        yield f"line {node.lineno}: {kind} is not allowed"
    elif kind == "Getattr" and node.attr.startswith("_"):
        yield f"line {node.lineno}: the name {node.attr!r} is not allowed"
    elif kind == "Filter" and node.name not in _FILTERS:
        yield f"line {node.lineno}: the filter {node.name!r} is not allowed"
    elif kind == "For" and (in_loop or node.recursive or not _over_turns(node.iter)):
        yield f"line {node.lineno}: only one loop, over `turns`, is allowed"
    elif kind == "Assign" and any(isinstance(part, nodes.Concat | nodes.Add) for part in _within(node.node)):
        # It could be twice as long as the value before it, and so on.
        yield f"line {node.lineno}: a value that is set may not be put together from others"
    for child in node.iter_child_nodes():
        yield from _faults(child, in_loop or kind == "For")


def _over_turns(node: nodes.Node) -> bool:
    node = node.node if isinstance(node, nodes.Getitem) else node  # turns[1:]
    return isinstance(node, nodes.Name) and node.name == "turns"


def _within(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _reason(error: Exception) -> object:
    return "nested too deeply" if isinstance(error, RecursionError) else error
