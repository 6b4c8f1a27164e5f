"""A model before it is loaded: whether the hub answers, what its cache holds, and which chat template the model needs.

The template comes from LLaMA-Factory's own table, or from a local folder's own chat template; both are known from
common/llamafactory_schema.json.
"""

from __future__ import annotations

import difflib
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from common.errors import ArenaError, UsageError
from common.files import read_json
from common.llamafactory_schema import known_models, templates
from data_prep.prompt import TEMPLATE_ERRORS

# The template that LLaMA-Factory's own web UI takes for a base model, which was never taught a chat.
BASE_TEMPLATE = "default"
_HUB_ID = r"[\w.-]+(/[\w.-]+)?"
_MARK = "arenafactorymessage"
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


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
            if cached_file(model, "config.json", revision) is None:
                what = f"couldn't connect to {constants.ENDPOINT} ({error}), and the cache does not hold {model}"
                raise OSError(what) from None
            constants.HF_HUB_OFFLINE = True  # the library looks at each request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def cached_file(model: str, name: str, revision: str = "main") -> Path | None:
    """Return a file of a hub's model that an earlier download left on this disk, None where it did not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

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

    Raises UsageError for a name that is neither, an unknown template, one whose tokens the model's tokenizer lacks
    (where that is on this disk), or where nothing says which template it is; the nearest ones are named.
    """
    folder = Path(model).expanduser() if model and Path(model).expanduser().is_dir() else None
    if folder is None and (model.startswith((".", "-")) or not re.fullmatch(_HUB_ID, model, re.ASCII)):
        raise UsageError(
            f"{model!r} is neither a folder nor a hub id",
            remedy="write a hub id such as Qwen/Qwen3-4B-Instruct-2507, or the path of a folder that holds config.json",
        )
    if folder and _config(folder).get("quantization_config"):
        raise UsageError(
            "holds quantized weights, into which no adapter can be merged",
            where=str(folder / "config.json"),
            remedy="take the model's 16-bit weights; quantization_bit of experiment.yaml quantizes them while training",
        )
    if asked is not None:
        if asked not in templates():
            remedy = f"choose one of LLaMA-Factory's, perhaps: {_closest(asked)}"
            raise UsageError(f"LLaMA-Factory has no chat template {asked!r}", remedy=remedy)
        _require_tokens(model, folder, asked)
        return Choice(asked, "given by --template")
    return _of_folder(folder) if folder else _of_hub_id(model)


def _of_hub_id(model: str) -> Choice:
    known = known_models().get(model.lower())
    if known is None:
        raise UsageError(
            f"there is no folder {model}, and LLaMA-Factory's table does not hold a model of this id",
            remedy=f"give the path of a folder that holds config.json; or, for a hub id, {_near_models(model)}",
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
        return error.remedy.removeprefix("name one with --template; ")


def _require_tokens(model: str, folder: Path | None, template: str) -> None:
    """Raise UsageError where the model's tokenizer is on this disk and lacks a token of the template."""
    path = folder / "tokenizer.json" if folder else cached_file(model, "tokenizer.json")
    if path is None or not path.is_file():
        return
    try:
        known = Tokenizer.from_file(str(path)).get_vocab()
    except Exception:  # the library has no narrower class; `prepare` tells what is wrong with it
        return
    if lacking := [token for token in templates()[template].tokens if token not in known]:
        raise UsageError(
            f"the tokenizer of {model} lacks {', '.join(lacking)}, which this template writes around every prompt "
            "and answer",
            where=f"--template {template}",
            remedy=f"give the model's own: {own_template(model)}",
        )


def _of_folder(folder: Path) -> Choice:
    """Compare what the folder's own chat template writes with what each of LLaMA-Factory's writes."""
    kind = str(_config(folder).get("model_type", ""))
    of_text = {name: its for name, its in templates().items() if its.user is not None}
    likely = [name for name in of_text if kind and name.startswith(kind)]
    written, found = _render_own(folder), []
    if written is not None:
        messages = {
            name: str(its.user).replace("{{content}}", _MARK) + (_EMPTY_THOUGHT if its.thinks else "")
            for name, its in of_text.items()
        }
        whole = [name for name, text in messages.items() if written == of_text[name].system + text]
        # a system message in front, such as today's date, is no part of LLaMA-Factory's template
        found = whole or [name for name, text in messages.items() if written.endswith(text)]
        found = [kind] if kind in found else [name for name in found if name in likely] or found
        if len(found) == 1:
            return Choice(found[0], f"it writes what the chat template in {folder} writes")
        if named := _named_like(folder, found):
            others = ", ".join(name for name in found if name != named)
            return Choice(named, f"named like the model, of those that write what its chat template does ({others})")
    what = "brings no chat template that works"
    if written is not None:
        what = f"{len(found)} of LLaMA-Factory's templates write what the chat template in this folder writes"
    raise UsageError(
        what,
        where=str(folder),
        remedy=f"name one with --template; perhaps: {', '.join(sorted(found or likely)) or _closest(kind)}",
    )


def _named_like(folder: Path, found: list[str]) -> str | None:
    """Return the longest of the templates' names that stands in a model's: gemma for gemma-3-1b-it; None for none."""
    whole = folder.resolve()
    # a hub's cache: models--google--gemma-3-1b-it/snapshots/<commit>
    name = next((part for part in whole.parts if part.startswith("models--")), whole.name).lower()

    def stands(template: str) -> bool:
        parts = re.findall(r"[a-z]+|\d+", template)
        return bool(re.search(rf"(?<![a-z\d]){'[-_. ]?'.join(parts)}(?![a-z])", name))

    return max(filter(stands, found), key=len, default=None)


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


def _render_own(folder: Path) -> str | None:
    """Return what the folder's chat template writes around one message, without the token that begins a text.

    None where there is no template or it fails. It comes with a downloaded model: it runs in transformers' sandbox.
    """
    try:
        settings = dict(read_json(folder / "tokenizer_config.json"))
    except (OSError, ValueError, TypeError):
        settings = {}
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        named = [each for each in source if isinstance(each, dict)]
        source = next((each.get("template") for each in named if each.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if not isinstance(source, str):
        return None

    def refuse(message: str) -> None:
        raise ValueError(message)

    def token(value: Any) -> str:
        return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    names = {name: token(settings.get(name)) for name in ("bos_token", "eos_token")}
    names |= {"add_generation_prompt": True, "enable_thinking": False}
    try:
        with _bounded():
            text = environment.from_string(source).render(messages=[{"role": "user", "content": _MARK}], **names)
    except (*TEMPLATE_ERRORS, TimeoutError, MemoryError):
        return None
    return text.removeprefix(names["bos_token"])


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox without multiplication, which can take hours inside one step."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse the operators above."""
        raise TemplateError(f"{operator} is not allowed")


@contextmanager
def _bounded(seconds: float = 5.0, memory: int = 1 << 30) -> Iterator[None]:
    """Within the block raise TimeoutError after so long, MemoryError beyond so many bytes more than now."""

    def late(*_: Any) -> None:
        raise TimeoutError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + memory
    usual = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(soft, most), hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, usual)


def _near_models(model: str) -> str:
    short = {
        known.id.rsplit("/", 1)[-1].lower(): known for known in reversed(known_models().values()) if known.template
    }
    near = difflib.get_close_matches(model.rsplit("/", 1)[-1].lower(), short, n=3, cutoff=0.6)
    named = "; ".join(f"{short[each].id} has {short[each].template}" for each in near)
    return f"name its chat template with --template{f' ({named})' if named else ''}"


def _closest(word: str) -> str:
    return ", ".join(difflib.get_close_matches(word.lower(), templates(), n=4, cutoff=0.5) or ("llama3", "gemma2"))
