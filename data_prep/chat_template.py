"""What LLaMA-Factory puts around a prompt and its answer, as token ids, so that fitting and scoring need no trainer.

prefix_ids + encode(before + message + after) + suffix_ids                               ->   the prompt
answer_prefix_ids + encode(answer_before + text + answer_after) + answer_suffix_ids      ->   the answer after it
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tokenizers import Tokenizer

from common.error_hints import remedy_for
from common.errors import ArenaError
from common.experiment import Experiment
from common.files import atomic_file, read_json
from data_prep.model_lookup import offline_if_unreachable, own_template

CACHE = Path("data") / ".frames"
_FORMAT = 4  # of the cached files
_MARK = "arenafactorymessage"
_ANSWER_MARK = "arenafactoryanswer"
# Texts on which a new frame must agree with LLaMA-Factory's own encoder before it is used.
_PROBES = (
    "",
    "A",
    " leading and trailing \n",
    "ünï ©ode 日本語 😀\n\n\tcode",
    "Verdict:\n\n",
    "\n\n  after empty lines",
    "1234567890 <b>&amp;</b>",
    "First.\n\n### User\nMore?\n\n### Assistant\nSecond.\n",
)


@dataclass(frozen=True)
class ChatFrame:
    """The ids and strings around a message and an answer, the labels' ids, the strings that parse as special tokens.

    `label_ids` are in the order of VERDICTS; `answer_len` is the number of ids that training appends for a
    label (label, end of turn, …). `answer_lstrip` are characters that the template takes off an answer's front.
    """

    template: str
    prefix_ids: tuple[int, ...]
    before: str
    after: str
    suffix_ids: tuple[int, ...]
    label_ids: tuple[int, int, int]
    answer_len: int
    answer_prefix_ids: tuple[int, ...]
    answer_before: str
    answer_after: str
    answer_suffix_ids: tuple[int, ...]
    special_strings: tuple[str, ...]
    answer_lstrip: str = ""

    def wrap(self, message: str) -> str:
        """Return the one string of the prompt that is tokenized."""
        return self.before + message + self.after

    def surround(self, ids: list[int]) -> list[int]:
        """Return the whole prompt's ids from the ids of the wrapped message."""
        return [*self.prefix_ids, *ids, *self.suffix_ids]

    def wrap_answer(self, text: str) -> str:
        """Return the one string of an answer that is tokenized."""
        return self.answer_before + text.lstrip(self.answer_lstrip) + self.answer_after

    def answer(self, ids: list[int]) -> list[int]:
        """Return the whole answer's ids, end of turn included, from the ids of the wrapped text."""
        return [*self.answer_prefix_ids, *ids, *self.answer_suffix_ids]

    @property
    def overhead(self) -> int:
        """The number of ids that every row spends outside its wrapped message: prefix, suffix and answer."""
        return len(self.prefix_ids) + len(self.suffix_ids) + self.answer_len

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ChatFrame:
        """Rebuild a frame from `dataclasses.asdict` of it, as JSON keeps it; raises ValueError if it is no frame."""
        return TypeAdapter(cls).validate_python(content)


def load_frame(experiment: Experiment) -> tuple[ChatFrame, Tokenizer]:
    """Return the experiment's frame and the very tokenizer that LLaMA-Factory uses, from a cache where it is there.

    The first call for a model imports LLaMA-Factory (about 20 s); later ones read a small file.
    Raises ArenaError when the model's tokenizer cannot be loaded, lacks a token of the template, or a label is not one
    token in its place.
    """
    path = cache_path(experiment)
    if path.is_file():
        try:
            content = read_json(path)
            return ChatFrame.from_dict(content["frame"]), Tokenizer.from_str(content["tokenizer"])
        except Exception:  # tokenizers has no narrower class
            path.unlink(missing_ok=True)  # a damaged entry is made again
    frame, tokenizer = probe_frame(experiment)
    write_cache(experiment, frame, tokenizer)
    return frame, Tokenizer.from_str(tokenizer)


def write_cache(experiment: Experiment, frame: ChatFrame, tokenizer: str) -> None:
    """Keep a frame and the tokenizer's JSON for `load_frame`."""
    with atomic_file(cache_path(experiment)) as file:
        json.dump({"frame": asdict(frame), "tokenizer": tokenizer}, file)


def cache_path(experiment: Experiment) -> Path:
    """Return the file that keeps the frame, named by all that it depends on."""
    asked = (
        _FORMAT,
        experiment.model,
        experiment.revision,
        experiment.template,
        experiment.enable_thinking,
        experiment.labels.in_order(),
        metadata.version("llamafactory"),
        metadata.version("transformers"),
    )
    digest, folder = hashlib.sha256(json.dumps(asked).encode()), Path(experiment.model)
    if folder.is_dir():
        for path in sorted([*folder.glob("*token*"), *folder.glob("*.model"), *folder.glob("vocab*")]):
            digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return CACHE / f"{digest.hexdigest()[:32]}.json"


def probe_frame(experiment: Experiment) -> tuple[ChatFrame, str]:
    """Ask LLaMA-Factory for its template ids and return the frame with the tokenizer as JSON; heavy imports."""
    from llamafactory.data.template import ReasoningTemplate

    tokenizer, template, known = _llamafactory_template(experiment)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArenaError(
            "has no fast tokenizer (tokenizer.json), which fitting to the token budget needs",
            where=experiment.model,
            remedy="choose a model that ships tokenizer.json, or convert it with transformers once",
        )
    recorder = _Recorder(tokenizer)
    prompt_ids, answer_ids = _encode(recorder, template, _MARK, _ANSWER_MARK)
    _require_tokens(experiment, template, tokenizer, known, [*prompt_ids, *answer_ids])
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    strip = ""
    if isinstance(template, ReasoningTemplate):
        # It looks for its thought words in every answer, and cuts them out. Where thinking is off, it also removes the
        # line ends behind a thought that may stand before the answer, even where there was none.
        special |= {word.strip() for word in template.thought_words}
        strip = "\n" if template.enable_thinking is False else ""
    frame = ChatFrame(
        experiment.template,
        *recorder.around(_MARK, prompt_ids),
        *_labels(tokenizer, template, experiment),
        *recorder.around(_ANSWER_MARK, answer_ids),
        special_strings=tuple(sorted(special)),
        answer_lstrip=strip,
    )
    _verify(frame, tokenizer, template, experiment)
    return frame, backend.to_str()


def _llamafactory_template(experiment: Experiment):
    """Return LLaMA-Factory's tokenizer and template, and the tokens that the tokenizer had before the template's."""
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from llamafactory.model import load_tokenizer

    if experiment.model.startswith("models/") and not Path(experiment.model).is_dir():  # the hub has no such name
        remedy = "`make extra-smollm2` makes that of smollm2-135m; of other models put the files there"
        raise ArenaError("there is no such folder", where=experiment.model, remedy=remedy)
    model_args = ModelArguments(
        model_name_or_path=experiment.model,
        model_revision=experiment.revision,
        trust_remote_code=experiment.trust_remote_code,
    )
    thinking = {} if experiment.enable_thinking is None else {"enable_thinking": experiment.enable_thinking}
    try:
        with offline_if_unreachable(experiment.model, experiment.revision):
            tokenizer = load_tokenizer(model_args)["tokenizer"]
        known = set(tokenizer.get_vocab())
        data_args = DataArguments(template=experiment.template, **thinking)
        return tokenizer, get_template_and_fix_tokenizer(tokenizer, data_args), known
    except (OSError, ValueError) as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        first = error.__cause__ or error
        reason = str(first).strip().splitlines()
        raise ArenaError(
            f"tokenizer or chat template {experiment.template!r} cannot be loaded: {reason[0] if reason else first!r}",
            where=experiment.model,
            remedy=remedy_for("\n".join(f"{type(each).__name__}: {each}" for each in causes))
            or "check the keys model and template in experiment.yaml; a gated model needs its licence accepted "
            "and HF_TOKEN set; without internet give a local folder as model",
        ) from None


def _encode(tokenizer, template, message: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids of prompt and answer as LLaMA-Factory's processors feed them."""
    turn = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    prompt_ids, answer_ids = template.encode_oneturn(tokenizer, turn)
    return prompt_ids, answer_ids + ([tokenizer.eos_token_id] if template.efficient_eos else [])


def _require_tokens(experiment: Experiment, template, tokenizer, known: set[str], ids: list[int | None]) -> None:
    """Raise ArenaError where a frame holds tokens that the model was never taught.

    LLaMA-Factory adds them with a line in its log, and the training dies of their ids, or trains on rows of the
    embedding that hold random numbers.
    """
    parts = (template.format_prefix, template.format_user, template.format_assistant)
    named = [slot["token"] for part in parts for slot in part.slots if isinstance(slot, dict)]
    fed = [tokenizer.convert_ids_to_tokens(each) for each in ids if each is not None]
    if lacking := [token for token in dict.fromkeys([*named, *fed]) if token not in known]:
        raise ArenaError(
            f"the tokenizer of {experiment.model} lacks {', '.join(lacking)}, which template {experiment.template!r} "
            "writes around every prompt and answer",
            where=f"{experiment.folder}/experiment.yaml: template",
            remedy=f"write the model's own template there: {own_template(experiment.model)}",
        )


def _labels(tokenizer, template, experiment: Experiment) -> tuple[tuple[int, ...], int]:
    """Return the labels' ids and the number of ids of an answer that is a label."""
    labels = experiment.labels.in_order()
    answers = [_encode(tokenizer, template, _MARK, label)[1] for label in labels]
    first = tuple(answer[0] for answer in answers)
    rest = {tuple(answer[1:]) for answer in answers}
    texts = [tokenizer.decode([i]).strip() for i in first]
    if len(set(first)) != len(labels) or len(rest) != 1 or texts != [label.strip() for label in labels]:
        thought = " (this is a reasoning template: use its _nothink twin)" if "<think>" in texts[0] else ""
        raise ArenaError(
            f"the labels {labels} are not three distinct single tokens after template {experiment.template!r}: their "
            f"first tokens are {texts}{thought}",
            where=f"{experiment.folder}/experiment.yaml: labels, template",
            remedy="choose labels that the tokenizer knows as one token each, such as A, B, C, and a template "
            "that answers at once",
        )
    return first, len(answers[0])


def _verify(frame: ChatFrame, tokenizer, template, experiment: Experiment) -> None:
    """Raise ArenaError unless the frame gives LLaMA-Factory's own ids for each text of _PROBES."""

    def ids(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    for probe in _PROBES:
        message, answer = _encode(tokenizer, template, probe, probe)
        pairs = {
            "message": (frame.surround(ids(frame.wrap(probe))), message),
            "answer": (frame.answer(ids(frame.wrap_answer(probe))), answer),
        }
        for kind in (kind for kind, (ours, theirs) in pairs.items() if ours != theirs):
            raise ArenaError(
                f"template {experiment.template!r} does not keep a fixed frame around the {kind} {probe!r}",
                where=experiment.model,
                remedy="choose a text-only template of the same family (see LLaMA-Factory's template list)",
            )


class _Recorder:
    """A tokenizer that notes what LLaMA-Factory's template encodes with it."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._calls: list[tuple[str, list[int]]] = []

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options) -> list[int]:
        ids = self._tokenizer.encode(text, **options)
        self._calls.append((text, ids))
        return ids

    def around(self, mark: str, whole: list[int]) -> tuple[tuple[int, ...], str, str, tuple[int, ...]]:
        """Return what surrounds a marked text: ids before its piece, string before, string after, ids behind."""
        text, ids = next(call for call in self._calls if mark in call[0])
        before, after = text.split(mark)
        start = next(i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids)
        return tuple(whole[:start]), before, after, tuple(whole[start + len(ids) :])
