"""What a judge prompt's template may be made of: a stranger's template can neither reach out nor run on for ever.

Jinja's sandbox keeps a template from Python's insides, not from `range(10**9)` or a text that doubles forty times. So
only what placing texts needs is allowed: one loop over `turns`, conditions, values that do not grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes

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
