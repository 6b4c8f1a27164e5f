"""The Python that runs us: new enough, with the packages of the lock, told before the first of them is imported.

The standard library only, and nothing that an older Python cannot read: each must get as far as the message.
"""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

OLDEST = (3, 11)
_ROOT = Path(__file__).resolve().parents[1]
# What every command imports; one that needs more of the lock says so itself.
_PACKAGES = ("click", "jinja2", "omegaconf", "psutil", "pydantic", "rich")


def require_packages() -> None:
    """End the process with one message and exit code 2 where this Python cannot run the commands."""
    what = _fault()
    if what:
        sys.stderr.write(f"Error: {what}\n  remedy: {_remedy()}\n")
        sys.exit(2)


def _fault() -> str | None:
    if sys.version_info < OLDEST:
        needed, here = (".".join(map(str, version[:2])) for version in (OLDEST, sys.version_info))
        return f"arena-factory needs Python {needed} or newer, and {sys.executable} is {here}"
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        return f"the packages of this project are not in this Python ({sys.executable}): no {', '.join(missing)}"
    import click

    try:
        click.Argument(["name"], help="")  # new in click 8.5; the version itself takes longer to look up
    except TypeError:
        return f"the packages of this project are not in this Python ({sys.executable}): its click is too old"
    return None


def _remedy() -> str:
    """Say how to come to the right Python from where the user stands."""
    root, here = shlex.quote(str(_ROOT)), Path().resolve() == _ROOT
    folder = "" if here else f"{root}/"
    make = "`make install`" if here else f"`make -C {root} install`"
    activate = f"`source {folder}.venv/bin/activate`"
    if Path(sys.prefix).resolve() == (_ROOT / ".venv").resolve():  # it is the right one, and half made
        return f"`rm -r {folder}.venv`, then {make}"
    return activate if (_ROOT / ".venv" / ".synced").exists() else f"{make}, then {activate}"
