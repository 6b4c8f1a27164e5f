"""Which chat template a model needs: from LLaMA-Factory's own table, or from a local folder's own chat template.

The table is read from LLaMA-Factory's source files without importing them; tests/factory/test_model_table.py compares
it with the imported one.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import ArenaError, UsageError
from common.files import read_json
from common.llamafactory_schema import parse_module, templates
from data_prep.hub import cached_file

# The template that LLaMA-Factory's own web UI takes for a base model, which was never taught a chat.
BASE_TEMPLATE = "default"
# What makes LLaMA-Factory take a model for a chat model. It compares with the capital letter only, and so forgets
# microsoft/Phi-4-mini-instruct, which it calls Phi-4-3.8B-instruct.
_CHAT = ("-chat", "-distill", "-instruct", "-thinking")
# What a model's own chat template may raise beside Jinja's errors: it was written for another program.
_TEMPLATES_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, SyntaxError)
_MARK = "arenafactorymessage"
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class KnownModel:
    """A model of LLaMA-Factory's table: its id on a hub, its name there, its template, and whether it takes images."""

    id: str
    name: str
    template: str
    multimodal: bool


@dataclass(frozen=True)
class Choice:
    """A chat template, and why it is the one."""

    template: str
    reason: str

    @property
    def thinks(self) -> bool:
        """Whether the template puts thoughts before an answer, so that thinking must be switched off."""
        return templates()[self.template]


@cache
def known_models() -> dict[str, KnownModel]:
    """Return LLaMA-Factory's table by lower-case hub id (Hugging Face, ModelScope, …)."""
    found: dict[str, KnownModel] = {}
    for call in _calls("llamafactory.extras.constants", "register_model_group"):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        template, multimodal = _literal(given.get("template")), bool(_literal(given.get("multimodal")))
        for name, ids in _models(given.get("models")):
            chats = any(part in name.lower() for part in _CHAT) or multimodal
            fitting = str(template) if template and chats else BASE_TEMPLATE
            for each in ids:
                found.setdefault(each.lower(), KnownModel(each, name, fitting, multimodal))
    return found


def choose_template(model: str, asked: str | None = None) -> Choice:
    """Return the chat template of a hub id or a local folder; `asked` overrides what is known.

    Raises UsageError for a name that is neither, an unknown template, one whose tokens the model's tokenizer lacks
    (where that is on this disk), or where nothing tells the template; the nearest ones are named.
    """
    folder = Path(model).expanduser()
    local = bool(model) and folder.is_dir()
    if not local:
        _require_id(model)
    else:
        _require_plain_weights(folder)
    if asked is not None:
        if asked not in templates():
            raise UsageError(f"LLaMA-Factory has no chat template {asked!r}", remedy=_near_templates(asked))
        _require_tokens(model, folder if local else None, asked)
        return Choice(asked, "given by --template")
    if local:
        return _of_folder(folder)
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
    named = f"LLaMA-Factory's own for {known.name}"
    return Choice(known.template, named if known.template != BASE_TEMPLATE else f"{named}, which is no chat model")


def own_template(model: str) -> str:
    """Say which template is a model's own, or which ones it may be."""
    try:
        return choose_template(model).template
    except ArenaError as error:
        return error.remedy.removeprefix("name one with --template; ")


@cache
def tokens_of(template: str) -> tuple[str, ...]:
    """Return the special tokens that a template writes around every prompt and answer, those that a text begins and
    ends with by the tokenizer's own choice left out.

    A token is what stands alone in a formatter, or a stop word: LLaMA-Factory adds these to a tokenizer that lacks
    them. Other texts, such as [INST], are any tokenizer's.
    """
    call = next(c for c in _calls("llamafactory.data.template", "register_template") if _given(c, "name") == template)
    formatters = [each.value for each in call.keywords if each.arg in ("format_prefix", "format_user")]
    answer = [each.value for each in call.keywords if each.arg == "format_assistant"]
    slots = [slot for each in (*formatters, *answer) for slot in _parts(each)]
    slots += [{"eos_token"}] if not answer or _given(call, "efficient_eos") else []
    stops = _given(call, "stop_words") or []
    tokens = [slot["token"] for slot in slots if isinstance(slot, dict)]
    tokens += [word for word in stops if any(word in slot for slot in slots if isinstance(slot, str))]
    if _given(call, "replace_eos") and {"eos_token"} in slots:
        tokens.append(stops[0])
    return tuple(dict.fromkeys(tokens))


def _given(call: ast.Call, key: str) -> Any:
    return _literal(next((each.value for each in call.keywords if each.arg == key), None))


def _require_tokens(model: str, folder: Path | None, template: str) -> None:
    """Raise UsageError where the model's tokenizer is on this disk and lacks a token of the template."""
    path = folder / "tokenizer.json" if folder else cached_file(model, "tokenizer.json")
    if path is None or not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        known = Tokenizer.from_file(str(path)).get_vocab()
    except Exception:  # the library has no narrower class; `prepare` tells what is wrong with it
        return
    if lacking := [token for token in tokens_of(template) if token not in known]:
        raise UsageError(
            f"the tokenizer of {model} lacks {', '.join(lacking)}, which this template writes around every prompt "
            "and answer",
            where=f"--template {template}",
            remedy=f"give the model's own: {own_template(model)}",
        )


def _require_id(model: str) -> None:
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII) and not model.startswith((".", "-")):
        return
    raise UsageError(
        f"{model!r} is neither a folder nor a hub id",
        remedy="write a hub id such as Qwen/Qwen3-4B-Instruct-2507, or the path of a folder that holds config.json",
    )


def _require_plain_weights(folder: Path) -> None:
    if _config(folder).get("quantization_config"):
        raise UsageError(
            "holds quantized weights, into which no adapter can be merged",
            where=str(folder / "config.json"),
            remedy="take the model's 16-bit weights; quantization_bit of experiment.yaml quantizes them while training",
        )


def _of_folder(folder: Path) -> Choice:
    """Compare what the folder's own chat template writes with what each of LLaMA-Factory's writes."""
    kind = str(_config(folder).get("model_type", ""))
    shown = _render_own(folder)
    if shown is None:
        near = ", ".join(_starting(kind, sorted(_text_templates()))) or _closest(kind)
        raise UsageError(
            f"{folder} brings no chat template that could tell which of LLaMA-Factory's it needs",
            remedy=f"name one with --template; for {kind or 'this kind of model'} perhaps: {near}",
        )
    whole = [name for name, layout in _text_templates().items() if layout.fits(shown, whole=True)]
    ends = [name for name, layout in _text_templates().items() if layout.fits(shown, whole=False)]
    found = whole or ends  # a system message in front, such as today's date, is no part of LLaMA-Factory's template
    found = [kind] if kind in found else _starting(kind, found) or found
    if len(found) == 1:
        return Choice(found[0], f"it writes what the chat template in {folder} writes")
    raise UsageError(
        f"{len(found) or 'none'} of LLaMA-Factory's templates write{'' if found else 's'} what the chat template in "
        f"{folder} writes",
        remedy=f"name one with --template; perhaps: {', '.join(sorted(found)) or _closest(kind)}",
    )


def _starting(kind: str, names: list[str]) -> list[str]:
    """Return the templates whose names begin as the kind of model is called."""
    return [name for name in names if kind and name.startswith(kind)]


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(folder / "config.json")
    except FileNotFoundError:
        raise UsageError(
            "holds no config.json, so that it is no model", where=str(folder), remedy="give the model's own folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ArenaError(
            f"is not readable JSON: {error}", where=str(folder / "config.json"), remedy="fetch the model again"
        ) from None
    return content if isinstance(content, dict) else {}


def _render_own(folder: Path) -> str | None:
    """Return what the folder's chat template writes around one message, without the token that begins a text."""
    settings = _tokenizer_settings(folder)
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    begin, end = (_token(settings.get(key)) for key in ("bos_token", "eos_token"))
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    names = {"bos_token": begin, "eos_token": end, "add_generation_prompt": True, "enable_thinking": False}
    try:
        text = environment.from_string(source).render(messages=[{"role": "user", "content": _MARK}], **names)
    except (TemplateError, *_TEMPLATES_ERRORS):
        return None
    return text.removeprefix(begin)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _token(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else value or ""


@dataclass(frozen=True)
class _Layout:
    """What a template of LLaMA-Factory writes around one message; the token that begins a text is left out."""

    system: str
    user: str
    thinks: bool

    def fits(self, shown: str, *, whole: bool) -> bool:
        """Tell whether `shown` is that text, or at least ends in it."""
        text = self.user.replace("{{content}}", _MARK) + (_EMPTY_THOUGHT if self.thinks else "")
        return shown == self.system + text if whole else shown.endswith(text)


@cache
def _text_templates() -> dict[str, _Layout]:
    """Return the layouts of the templates that take text only."""
    found = {}
    for call in _calls("llamafactory.data.template", "register_template"):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        user = _slots(given.get("format_user"))
        if user is None or "{{content}}" not in user or "mm_plugin" in given:
            continue
        words = _literal(given.get("default_system")) or ""
        around = _slots(given.get("format_system")) or "{{content}}"
        system = (_slots(given.get("format_prefix")) or "") + (around.replace("{{content}}", words) if words else "")
        name = str(_literal(given["name"]))
        found[name] = _Layout(system, user, templates()[name])
    return found


def _slots(formatter: ast.expr | None) -> str | None:
    """Return a formatter's text; a token that begins or ends a text is left out, another one makes it unknown."""
    if not isinstance(formatter, ast.Call) or not (parts := _parts(formatter)):
        return None
    if any(isinstance(part, dict) for part in parts):
        return None
    return "".join(part for part in parts if isinstance(part, str))


def _parts(formatter: ast.expr) -> list[Any]:
    """Return a formatter's parts as they stand in the source: texts, {"token": …}, {"bos_token"}; [] where unknown."""
    keywords = formatter.keywords if isinstance(formatter, ast.Call) else []
    listed = next((keyword.value for keyword in keywords if keyword.arg == "slots"), None)
    parts = _literal(listed)
    return parts if isinstance(parts, list) else []


def _calls(module: str, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(parse_module(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            yield node


def _models(node: ast.expr | None) -> Iterator[tuple[str, list[str]]]:
    """Yield a group's models: the name, and its id on every hub."""
    for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
        ids = [_literal(each) for each in value.values] if isinstance(value, ast.Dict) else []
        yield str(_literal(key)), [each for each in ids if isinstance(each, str)]


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _near_models(model: str) -> str:
    short: dict[str, KnownModel] = {}
    for known in known_models().values():
        if known.template != BASE_TEMPLATE:
            short.setdefault(known.id.rsplit("/", 1)[-1].lower(), known)
    near = difflib.get_close_matches(model.rsplit("/", 1)[-1].lower(), short, n=3, cutoff=0.6)
    named = "; ".join(f"{short[each].id} has {short[each].template}" for each in near)
    return f"name its chat template with --template{f' ({named})' if named else ''}"


def _near_templates(asked: str) -> str:
    return f"choose one of LLaMA-Factory's, perhaps: {_closest(asked)}"


def _closest(word: str) -> str:
    near = difflib.get_close_matches(word.lower(), templates(), n=4, cutoff=0.5)
    return ", ".join(near or ("llama3", "gemma2", "qwen3_nothink", "phi4_mini"))
