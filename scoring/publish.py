"""A judge or an adapter on its way to the hub, with its card and its calibration: by `run.py publish` and nothing else.

What is sent is named file by file: no optimizer, checkpoint or log, and no vote. Of report.json go the keys that
scoring needs and the figures of the card, of experiment.yaml and of the recipe what shapes the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from common.errors import ArenaError, UsageError
from common.files import is_in_project
from common.progress import Show
from factory.merge import VALUE_HEAD
from factory.stage_context import StageContext
from factory.train import ADAPTER_FILES
from scoring.judge import GOLDEN_ANSWERS, MANIFEST
from scoring.model_card import CARD, public_base, public_recipe, write_cards
from scoring.predictions import REPORT
from scoring.score_stage import ScoreOptions, read_report

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
_MERGED = (CARD, MANIFEST, GOLDEN_ANSWERS, "config.json", "generation_config.json", "*.safetensors", *_TOKENIZER)
_ADAPTER = (CARD, *ADAPTER_FILES, VALUE_HEAD, *_TOKENIZER)
_REPORT = (
    *("experiment", "stage", "set", "rows", "class_counts", "log_loss", "log_loss_ci95", "accuracy", "ece"),
    *("baselines", "baselines_ci95", "beats_prior", "calibration", "calibrations", "agreement", "target_prior"),
    *("train_class_counts", "scoring"),
)
# What is of no use to others who score with it, or names paths of this machine.
_OWN = {"name", "description", "recipes", "prompt_template", "folds", "fold_answer", "distributed"}
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
_HUBS_OWN = {".gitattributes"}


def publish(
    context: StageContext, repo: str, *, adapter: bool, private: bool, dry_run: bool, show: Show
) -> dict[str, Any]:
    """Send a stage's merged judge, or its adapter, to the model repository `repo` in one commit; return what was sent.

    `dry_run` does not reach the hub. Raises UsageError for a malformed name or a stage without a model,
    ArenaError where the judge is not the one that was scored, or the hub refuses.
    """
    if not _REPOSITORY.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UsageError(f"{repo!r} is no repository's name", where="--repo", remedy="write OWNER/NAME")
    files = published_files(context, adapter=adapter)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    if adapter and not public_base(context.start):
        show.note(f"warning: the adapter's base is a folder of this machine, {context.start}: others need it, too")
    made = {"repo": repo, "private": private, "files": sizes, "sent": not dry_run}
    return made if dry_run else {**made, **_send(repo, files, f"{context.experiment.name} {context.label}", private)}


def published_files(context: StageContext, *, adapter: bool) -> dict[str, Path | bytes]:
    """Return what would be sent by its name in the repository: files of the model, and what is made of others."""
    if not context.is_trained:
        raise UsageError(f"{context.name} trains no model", where="--stage", remedy="choose sft, dpo or rm")
    report = read_report(context)
    options = ScoreOptions(precision="adapter") if adapter and context.step.data != "dpo_reward" else ScoreOptions()
    context.require_scored(options.spec(context).scorer().inputs())
    record = context.state.record("train")
    if record and record.finished_at and record.damaged:
        what = f"changed since the training: {', '.join(record.damaged)}"
        raise ArenaError(what, where=str(context.adapter), remedy=f"train it again: {context.command} --fresh")
    write_cards(context.reported, report, keep=True)
    folder = context.adapter if adapter else context.merged
    found = {path.name: path for pattern in (_ADAPTER if adapter else _MERGED) for path in folder.glob(pattern)}
    own = (MANIFEST, GOLDEN_ANSWERS, "tokenizer.json")  # a judge's prompt and tokens lie beside its merged weights
    judge = {name: context.merged / name for name in own if (context.merged / name).is_file()}
    if out := [path for path in (*found.values(), *judge.values()) if not is_in_project(path)]:
        what, remedy = "is a link that leads out of the project", "put the file itself there, if others may read it"
        raise ArenaError(what, where=str(out[0]), remedy=remedy)
    if not any(name.endswith(".safetensors") for name in found):
        raise ArenaError("holds no weights to publish", where=str(folder), remedy=context.command)
    settings = context.experiment.model_dump(mode="json", exclude=_OWN, exclude_defaults=True)
    settings["model"] = _elsewhere(context.experiment.model)
    kept = json.dumps({key: report[key] for key in _REPORT if key in report}, indent=2, ensure_ascii=False)
    made = {REPORT: kept.encode(), "experiment.yaml": _yaml(settings)}
    if not adapter:
        return {**found, **made}
    recipe = {**public_recipe(context), "model_name_or_path": _elsewhere(context.start)}
    recipe["output_dir"] = context.experiment.model_copy(update={"folds": 1}).adapter_folder(context.name).as_posix()
    return {**found, **judge, **made, f"{context.name}.yaml": _yaml(recipe)}


def published_lines(made: Mapping[str, Any]) -> list[str]:
    """Return what was or would be sent, one line a file."""
    lines = [f"{size:>15,}  {name}" for name, size in sorted(made["files"].items())]
    seen = "private" if made["private"] else "as the hub makes it, usually public"
    if not made["sent"]:
        return [*lines, f"to {made['repo']} ({seen}): nothing was sent; without --dry-run it is"]
    return [*lines, f"sent to {made['url']} ({'private' if made['private'] else 'public'})"]


def _send(repo: str, files: Mapping[str, Path | bytes], what: str, private: bool) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = api.model_info(repo)
        if private and not there.private:
            raise ArenaError("exists and is public", where=repo, remedy="make it private there, or name another one")
        others = sorted({each.rfilename for each in there.siblings or ()} - files.keys() - _HUBS_OWN)
        if others:
            what = f"holds other files, which would be mixed with this model: {', '.join(others[:5])}"
            raise ArenaError(what, where=repo, remedy="name another repository, or delete them there; nothing was sent")
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        commit = api.create_commit(repo, operations, commit_message=f"{what}, by arena-factory")
    except ArenaError:
        raise
    except Exception as error:  # no network, no login, no right: the library has a class for each
        said, token = str(error).strip() or type(error).__name__, get_token()
        said = (said.replace(token, "…") if token else said).splitlines()[0]
        raise ArenaError(
            f"cannot be published: {said}",
            where=repo,
            remedy="log in with a token that may write there (hf auth login, or HF_TOKEN); nothing is public until the "
            "last step, so the same command may be given again",
        ) from None
    return {"private": bool(there.private), "url": f"{constants.ENDPOINT}/{repo}", "commit": commit.oid}


def _elsewhere(model: str) -> str:
    """Return what others may call a model: of a folder outside the project only the last part of its path."""
    return f"models/{Path(model).name}" if Path(model).is_absolute() else model


def _yaml(content: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True).encode()
