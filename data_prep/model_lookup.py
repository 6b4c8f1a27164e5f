"""A model before it is loaded: whether the hub answers, what its cache holds, and which chat template the model needs.

The template comes from LLaMA-Factory's own table (common/llamafactory_schema.json), by a hub id or a folder's name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ArenaError, UsageError
from common.files import read_json
from common.llamafactory_schema import KnownModel, known_models, templates

# The template that LLaMA-Factory's own web UI takes for a base model, which was never taught a chat.
BASE_TEMPLATE = "default"
_HUB_ID = r"[\w.-]+(/[\w.-]+)?"


@contextmanager
def offline_if_unreachable(model: str, revision: str) -> Iterator[None]:
    """Within the block, huggingface_hub reads its cache alone where the hub does not answer one request.

    A refusal (401, 404) is an answer. Raises OSError where the hub does not answer and the cache lacks the model.
    """
    import httpx
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import get_session
    from llamafactory.extras.misc import use_modelscope, use_openmind

    offline = constants.HF_HUB_OFFLINE
    if not (offline or Path(model).is_dir() or use_modelscope() or use_openmind()):
        try:
            url = hf_hub_url(model, "config.json", revision=revision)
            get_session().head(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except httpx.TransportError as error:
            if model_file(model, "config.json", revision) is None:
                what = f"couldn't connect to {constants.ENDPOINT} ({error}), and the cache does not hold {model}"
                raise OSError(what) from None
            constants.HF_HUB_OFFLINE = True  # the library looks at each request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def model_file(model: str, name: str, revision: str = "main") -> Path | None:
    """Return a file of a model that is on this disk, in its folder or by an earlier download; None where it is not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        return Path(model, name) if Path(model, name).is_file() else None
    try:
        found = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:  # not the id of a model on the hub
        return None
    return Path(found) if isinstance(found, str) else None


@dataclass(frozen=True)
class Choice:
    """A chat template, and why it is the one."""

    template: str
    reason: str

    @property
    def thinks(self) -> bool:
        """Whether the template puts thoughts before an answer, so that thinking must be switched off."""
        return templates()[self.template].thinks


def choose_template(model: str, asked: str | None = None) -> Choice:
    """Return the chat template of a hub id or a local folder; `asked` overrides what is known.

    A folder is known by its name, as a download has it. Raises UsageError for a name that is neither, an unknown
    template, or where nothing says which template it is; the nearest ones are named.
    """
    folder = Path(model).expanduser() if model and Path(model).expanduser().is_dir() else None
    if folder is None and (model.startswith((".", "-")) or not re.fullmatch(_HUB_ID, model, re.ASCII)):
        raise UsageError(
            f"{model!r} is neither a folder nor a hub id",
            remedy="write a hub id such as Qwen/Qwen3-4B-Instruct-2507, or the path of a folder that holds config.json",
        )
    kind = str(_config(folder).get("model_type", "")) if folder else ""
    if asked is not None:
        if asked not in templates():
            remedy = f"choose one of LLaMA-Factory's, perhaps: {_closest(asked)}"
            raise UsageError(f"LLaMA-Factory has no chat template {asked!r}", remedy=remedy)
        return Choice(asked, "given by --template")
    name = _name_of(folder) if folder else model
    known = _by_name().get(name.lower()) if folder else known_models().get(model.lower())
    if known is None:
        likely = ", ".join(each for each in (kind, f"{kind}_nothink") if each in templates())
        nowhere = "" if folder else f"there is no folder {model}, and "
        give = "" if folder else "give the path of a folder that holds config.json; or, for a hub id, "
        raise UsageError(
            f"{nowhere}LLaMA-Factory's table does not hold a model called {name}",
            remedy=f"{give}name its chat template with --template{_near(name)}{likely and f'; perhaps: {likely}'}",
        )
    if known.multimodal:
        raise UsageError(
            f"{model} reads images too: its chat template looks for their placeholders in every text",
            remedy="choose a text-only model, or name a text-only template with --template",
        )
    reason = f"LLaMA-Factory's own for {known.name}"
    if known.template is None:
        return Choice(BASE_TEMPLATE, f"{reason}, which is no chat model")
    return Choice(known.template, reason)


def own_template(model: str) -> str:
    """Say which template is a model's own, or which ones it may be."""
    try:
        return choose_template(model).template
    except ArenaError as error:
        return error.remedy.partition("--template")[2].strip(" ;") or "that of the model that it was made from"


def _name_of(folder: Path) -> str:
    """Return what a model is called by its folder, also in a hub's cache: models--google--gemma-3-1b-it/snapshots/…"""
    whole = folder.resolve()
    return next((part.split("--")[-1] for part in whole.parts if part.startswith("models--")), whole.name)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = read_json(path)
    except FileNotFoundError:
        what = "holds no config.json, so that it is no model"
        raise UsageError(what, where=str(folder), remedy="give the model's own folder") from None
    except (OSError, ValueError) as error:
        what = f"is not readable JSON: {error}"
        raise ArenaError(what, where=str(path), remedy="fetch the model again") from None
    return content if isinstance(content, dict) else {}


def _by_name() -> dict[str, KnownModel]:
    """Return the known models without their owners, in lower case; of one name a chat model."""
    every = list(reversed(known_models().values()))
    chats = [known for known in every if known.template]
    return {known.id.rsplit("/", 1)[-1].lower(): known for known in (*every, *chats)}


def _near(name: str) -> str:
    """Return the templates of models that are called nearly so, in brackets; nothing where none is."""
    chats = {short: known for short, known in _by_name().items() if known.template}
    near = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), chats, n=3, cutoff=0.6)
    named = "; ".join(f"{chats[each].id} has {chats[each].template}" for each in near)
    return f" ({named})" if named else ""


def _closest(word: str) -> str:
    return ", ".join(difflib.get_close_matches(word.lower(), templates(), n=4, cutoff=0.5) or ("llama3", "gemma2"))
