"""A judge: a merged model's folder whose judge.json says how the model is asked.

The golden prompts, fixed battles, guard it: their answers are written into the folder (canaries.json) when the model
is merged, and compared each time it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from common.battle import VERDICTS, Battle, swap
from common.errors import ArenaError, first_line
from common.experiment import LONGEST, Experiment, Labels
from common.files import atomic_folder, only_run, read_json, sha256_of, write_json
from data_prep.chat_template import ChatFrame, load_frame
from data_prep.export_reader import readable
from data_prep.preference_pairs import PairFitter, flatten, pair_sequences
from data_prep.prompt import JudgePrompt
from data_prep.truncation import Fitted, Fitter, without_panics
from factory.stage_context import StageContext
from factory.status import experiment_status, holder_of, stage_status
from scoring.model_loading import BROKEN_WEIGHTS, base_folder
from scoring.rewards import Triple

MANIFEST = "judge.json"
FORMAT = 2
_REMEDY, _MERGE = "merge the adapter again", "python run.py sft (dpo, rm) -e EXP --until merge"
# Encoded once when the judge is made and compared whenever it is loaded: another tokenizer would answer nonsense.
_ENCODED = ("Verdict:", "naïve 日本語 😀\n\n  code();", "### Assistant A\n")
# What judge.json must hold; another type would fail only later, in the middle of scoring.
_TYPES = {
    "cutoff_len": int,
    "prompt_share": float,
    "judge_prompt": str,
    "canaries": dict,
    "source": dict,
    "labels": dict,
}

GOLDEN_ANSWERS = "canaries.json"
# Short enough for any budget, unlike each other, and frozen: a change makes the answers in every judge's folder stale.
GOLDEN_PROMPTS = (
    Battle("sum", ("What is 2 + 2?",), ("4",), ("5",)),
    Battle("code", ("Reverse a list in Python.",), ("items[::-1]",), ("def reverse(x): pass",)),
    Battle("polite", ("Thank you!",), ("You are welcome! Anything else?",), ("ok",)),
    Battle("german", ("Wie heißt die Hauptstadt von Österreich?",), ("Wien",), ("Graz natürlich.",)),
    Battle("japanese", ("日本の首都は？",), ("東京です。",), ("わかりません。",)),
    Battle("long", ("List three colours.",), ("Red, green and blue. " * 6,), ("Red",)),
    Battle("same", ("Say hi.",), ("hi",), ("hi",)),
    Battle("emoji", ("Describe a cat.",), ("🐈 A small carnivore.",), ("It barks.",)),
)
# How far a probability may move from its golden answer, by the coarser of the two precisions. Measured on trained tiny
# judges: fp32 on other kernels 1e-5, 16 bits 2e-2, 8 bits 8e-2, 4 bits 6e-2; the limits leave room for larger models.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05, "f16": 0.05, "8bit": 0.15, "q8_0": 0.15}
COARSEST = 0.25


@dataclass(frozen=True)
class Judge:
    """What judge.json holds, with the tokenizer and the prompt builder made from it."""

    folder: Path
    frame: ChatFrame
    labels: Labels
    cutoff_len: int
    prompt_share: float
    tokenizer: Tokenizer
    prompt: JudgePrompt
    source: dict[str, Any]

    def fitter(self) -> Fitter:
        """Return the same fitter that made this judge's training rows."""
        return Fitter(
            self.frame, self.tokenizer, self.prompt, cutoff_len=self.cutoff_len, prompt_share=self.prompt_share
        )

    def sequences(self, fitted: Sequence[tuple[Battle, int]], *, swapped: bool = False) -> list[list[int]]:
        """Return each fitted battle's whole prompt as token ids, exactly those that training put before the label."""
        ordered = [(swap(battle) if swapped else battle, dropped) for battle, dropped in fitted]
        return judge_sequences(self.frame, self.tokenizer, self.prompt, ordered)

    def fit(self, battles: Sequence[Battle]) -> list[Fitted]:
        """Fit battles that were not exported before, both orders within the budget."""
        return self.fitter().fit(battles, both_orders=True)

    def golden_sequences(self) -> list[list[int]]:
        """Return the golden prompts as judge prompts, fitted as any battle is."""
        return self.sequences([(fitted.battle, fitted.dropped) for fitted in self.fit(GOLDEN_PROMPTS)])

    def golden_triples(self) -> list[Triple]:
        """Return the golden prompts as pairs of responses behind the user's prompt, for a reward model."""
        fitter = PairFitter(self.frame, self.tokenizer, cutoff_len=self.cutoff_len, prompt_share=self.prompt_share)
        pairs = [flatten(fitted.battle) for fitted in fitter.fit(GOLDEN_PROMPTS)]
        return pair_sequences(self.frame, self.tokenizer, pairs)


def judge_sequences(
    frame: ChatFrame, tokenizer: Tokenizer, prompt: JudgePrompt, fitted: Sequence[tuple[Battle, int]]
) -> list[list[int]]:
    """Return the judge prompt of each fitted battle, of which so many oldest turns were dropped, as token ids."""
    texts = [frame.wrap(prompt.message(battle, dropped)) for battle, dropped in fitted]
    return [frame.surround(each.ids) for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def write_judge(folder: Path, experiment: Experiment, frame: ChatFrame, prompt_source: str, source: dict) -> None:
    """Write judge.json into a merged model's folder; `source` says which stage, recipe and data made it.

    Raises ArenaError if the folder has no readable tokenizer.
    """
    tokenizer = _tokenizer(folder)
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "classes": list(VERDICTS),
            "labels": experiment.labels.model_dump(),
            "frame": asdict(frame),
            "judge_prompt": prompt_source,
            "cutoff_len": experiment.cutoff_len,
            "prompt_share": experiment.prompt_share,
            "canaries": {text: _ids(tokenizer, text) for text in _ENCODED},
            "source": source,
        },
    )


def write_judge_manifest(folder: Path, context: StageContext) -> None:
    """Make a freshly merged folder a judge that reads what its training rows were made with: frame, prompt, budget.

    Raises ArenaError if the export's judge prompt is missing or the folder's tokenizer is not the export's.
    """
    experiment, manifest = context.experiment, context.manifest
    source = {
        "experiment": experiment.name,
        "stage": context.name,
        "model": experiment.model,
        "data": manifest["files"],
        **({"recipe": sha256_of(context.recipe_path)} if context.is_trained else {}),
    }
    _, trained = load_frame(experiment)
    own = _tokenizer(folder)
    if any(_ids(own, text) != _ids(trained, text) for text in _ENCODED):
        what = "the merged folder's tokenizer is not the one that the training rows were made with"
        remedy = "check that the merge recipe and experiment.yaml name the same model"
        raise ArenaError(what, where=str(folder), remedy=remedy)
    with readable(experiment.data_folder / "manifest.json"):
        learned = {key: manifest["experiment"][key] for key in ("labels", "cutoff_len", "prompt_share")}
        exported = Experiment.model_validate({**experiment.model_dump(mode="json"), **learned})
    prompt = (experiment.data_folder / "judge_prompt.j2").read_text(encoding="utf-8")
    write_judge(folder, exported, ChatFrame.from_dict(manifest["frame"]), prompt, source)


def make_base_judge(context: StageContext) -> None:
    """Make the untrained base a judge: a folder of links to its files, with the manifest of today's export.

    Raises ArenaError where the base cannot be had.
    """
    _, tokenizer = load_frame(context.experiment)
    base = base_folder(context.experiment)
    with only_run(context.folder), atomic_folder(context.merged) as fresh:
        for file in base.iterdir():
            if file.is_file() and file.name not in ("tokenizer.json", MANIFEST, GOLDEN_ANSWERS):
                (fresh / file.name).symlink_to(file.resolve())
        tokenizer.save(str(fresh / "tokenizer.json"))
        write_judge_manifest(fresh, context)


def load_judge(folder: Path) -> Judge:
    """Return the judge in a merged folder; raises ArenaError if it is missing, damaged or has another tokenizer."""
    path = folder / MANIFEST
    try:
        content = read_json(path)
        if content["format"] != FORMAT or content["classes"] != list(VERDICTS):
            raise ArenaError("was made by another version", where=str(path), remedy=_REMEDY)
        for key, kind in _TYPES.items():
            if type(content[key]) is not kind:
                raise ValueError(f"{key} is not of type {kind.__name__}")
        if not 0 < content["cutoff_len"] <= LONGEST:
            raise ValueError(f"cutoff_len is not between 1 and {LONGEST:,}")
        tokenizer, frame = _tokenizer(folder), ChatFrame.from_dict(content["frame"])
        lists = (frame.prefix_ids, frame.suffix_ids, frame.label_ids, frame.answer_prefix_ids, frame.answer_suffix_ids)
        vocabulary = tokenizer.get_vocab_size()
        if unknown := [token for ids in lists for token in ids if not 0 <= token < vocabulary]:
            raise ValueError(f"token {unknown[0]} is not among the tokenizer's {vocabulary}")
        changed = [text for text, ids in content["canaries"].items() if _ids(tokenizer, text) != ids]
        if changed:
            what = f"the tokenizer in this folder is not the one that the judge was trained with: {changed[0]!r}"
            raise ArenaError(what, where=str(folder), remedy=f"move the folder away and merge again: {_MERGE}")
        labels = Labels(**content["labels"])
        return Judge(
            folder=folder,
            frame=frame,
            labels=labels,
            cutoff_len=content["cutoff_len"],
            prompt_share=content["prompt_share"],
            tokenizer=tokenizer,
            prompt=JudgePrompt(content["judge_prompt"], labels, where=f"{path}: judge_prompt"),
            source=content["source"],
        )
    except FileNotFoundError:
        what = "is not a judge: judge.json is missing"
        raise ArenaError(what, where=str(folder), remedy=f"train and merge first: {_MERGE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)[:300]
        raise ArenaError(f"is damaged: {reason}", where=str(path), remedy=_REMEDY) from None


def require_judge(context: StageContext) -> None:
    """Raise ArenaError where a stage's judge does not exist yet, with how far the stage is and the next command."""
    if (context.merged / MANIFEST).is_file():
        return
    view, whole = stage_status(context), experiment_status(context)
    state = (
        f"not {'trained' if context.is_trained else 'scored'}"
        if view.state == "new"
        else f"{view.state} {view.detail}".rstrip()
    )
    what, remedy = f"is not a judge yet: {context.name} is {state}", view.next
    if (context.merged.is_dir() or view.state == "scored") and not holder_of(context.folder):
        what = f"is not a judge: {MANIFEST} is missing"
        away = "move the folder away and " if context.merged.is_dir() else ""
        remedy = f"{away}merge again: {context.command} --until merge"
    elif whole.next:
        remedy = f"{whole.next}; then {context.command}"
    raise ArenaError(what, where=str(context.merged), remedy=remedy)


def write_golden_answers(judge: Judge, answers: np.ndarray, precision: str) -> None:
    """Write the judge's answers to the golden prompts, [n, classes], into its folder; raises ArenaError for NaN."""
    if not np.isfinite(answers).all():
        what = "the merged model gives no finite answer to the golden prompts"
        raise ArenaError(what, where=str(judge.folder), remedy=BROKEN_WEIGHTS)
    content = {battle.id: row.tolist() for battle, row in zip(GOLDEN_PROMPTS, answers, strict=True)}
    write_json(judge.folder / GOLDEN_ANSWERS, {"format": FORMAT, "precision": precision, "answers": content})


def require_golden_answers(folder: Path, precision: str, answer: Callable[[], np.ndarray]) -> None:
    """Raise ArenaError unless `answer()`, a loaded model's answers [n, classes], are near the golden answers.

    A folder may have no golden answers; raises ArenaError if their file is damaged.
    """
    golden = _golden_answers(folder)
    if golden is None:
        return
    tolerance = max(TOLERANCE.get(name, COARSEST) for name in (golden["precision"], precision))
    expected = np.array([golden["answers"][battle.id] for battle in GOLDEN_PROMPTS], dtype=np.float64)
    distance = float(np.abs(expected - answer()).max())
    if not distance <= tolerance:  # also where it is NaN
        raise ArenaError(
            f"this model does not answer as it did when it was merged: the golden prompts' probabilities "
            f"moved by up to {distance:.2g} ({golden['precision']} then, {precision} now), allowed {tolerance}",
            where=str(folder / GOLDEN_ANSWERS),
            remedy="the weights, the engine or its kernels have changed: copy the folder again, or merge again; "
            "--precision fp32 shows whether it is the precision",
        )


def _golden_answers(folder: Path) -> dict[str, Any] | None:
    path = folder / GOLDEN_ANSWERS
    if not path.is_file():
        return None
    with readable(path, "move the folder away and merge again"):
        content = read_json(path)
        classes = {len(content["answers"][battle.id]) for battle in GOLDEN_PROMPTS}
        if content["format"] != FORMAT or len(classes) != 1 or not isinstance(content["precision"], str):
            raise ValueError("not what this version writes")
        return content


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArenaError("tokenizer.json is missing", where=str(folder), remedy=_REMEDY)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no narrower class
        raise ArenaError(f"is damaged: {error}", where=str(path), remedy=_REMEDY) from None
    # A saved tokenizer may carry the trainer's batch settings; a prompt is never padded or cut here.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    with without_panics():
        return tokenizer.encode(text, add_special_tokens=False).ids
