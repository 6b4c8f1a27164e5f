"""A model card: README.md of a merged judge and of its adapter, written when its report is.

Every figure is report.json's, every source and sum the export's; of the votes it holds numbers and no text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import atomic_file
from data_prep.export_reader import read_audit, read_columns, readable
from factory.recipes import as_yaml, render_template
from factory.stage_context import StageContext
from scoring.report.findings import BASELINE_NAMES, count, headline, interval, number, percent

CARD = "README.md"
MARK = "arena-factory"  # a tag: LLaMA-Factory's own README.md lacks it
# Keys of a recipe about paths, trackers and how often something is saved.
_PLACES = re.compile(
    "token|key|secret|url|space|dir|path|dataset|hub|report|project|name|swanlab|trackio|^ray|save|log|worker|cache"
    "|deepspeed|plot|ddp|^do_"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_CACHE = re.compile(r"datasets--([\w.-]+?)--([\w.-]+)/snapshots/")
_ODD = re.compile(r"[^\w.,:/@+ -]")


def write_cards(context: StageContext, report: Mapping[str, Any], *, keep: bool = False) -> None:
    """Write the cards of a trained stage's adapter and merged model, as far as they exist.

    The report of all folds describes the judge that trained on all votes. With `keep` a card of ours stays as it is.
    """
    own = context.of("full") if context.of_folds else context
    for folder in (own.adapter, own.merged) if own.is_trained else ():
        path = folder / CARD
        if folder.is_dir() and not (keep and path.is_file() and MARK in path.read_text(encoding="utf-8")):
            with atomic_file(path) as file:
                file.write(model_card(own, report, adapter=folder == own.adapter))


def model_card(context: StageContext, report: Mapping[str, Any], *, adapter: bool) -> str:
    """Return the card of a stage's adapter or of its merged model."""
    experiment, base, data = context.experiment, public_base(context.experiment.model), context.experiment.data_folder
    with readable(data / "rows.parquet"):
        trained = len(read_columns(data / "rows.parquet", ["id"], where=("split", context.parts("train"))))
    there = at_another_place(context)
    given = {"experiment": experiment, "context": context, "there": there, "report": report, "adapter": adapter}
    values = {
        "headline": headline(report),
        "base": base,
        "model": _plain(base or experiment.short_model),
        "rewards": context.step.data == "dpo_reward",
        "losses": list(_losses(report)),
        "sources": list(_sources(context)),
        "trained": count(trained),
        "recipe": {key: as_yaml(value) for key, value in public_recipe(context).items()},
        "place": (there.adapter if adapter else there.merged).as_posix(),
    }
    shown = {"count": count, "percent": percent, "number": number}
    return render_template("model_card.md.j2", given | values | shown)


def public_base(model: str) -> str | None:
    """Return the hub id of a base model, None for a folder."""
    return model if _HUB_ID.fullmatch(model) and not Path(model).exists() else None


def public_recipe(context: StageContext) -> dict[str, Any]:
    """Return the keys of the recipe, as it was trained with, that shape the result: no place, account or address."""
    shaping = {key: value for key, value in context.trained_recipe.items() if not _PLACES.search(key)}
    return {key: value for key, value in shaping.items() if not isinstance(value, dict) and "/" not in str(value)}


def at_another_place(context: StageContext) -> StageContext:
    """Return the stage as it is for others, who have only this judge: without folds."""
    return StageContext(context.experiment.model_copy(update={"folds": 1}), context.name)


def _losses(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    known = {**report["baselines"], **({} if report["bayes"] is None else {"bayes": report["bayes"]})}
    yield "**this judge**", f"**{number(report['log_loss'], 4)}**", interval(report["log_loss_ci95"], 4)
    for name, loss in known.items():
        yield BASELINE_NAMES[name], number(loss, 4), interval(report["baselines_ci95"].get(name), 4)


def _sources(context: StageContext) -> Iterator[tuple[str, str, str, str]]:
    read = read_audit(context.experiment.data_folder)["sources"]
    for name, source in context.manifest["sources"].items():
        rows, file, hub = read.get(name, {}), source["file"], _HUB_CACHE.search(source["file"])
        shown = f"hf://datasets/{hub[1]}/{hub[2]}" if hub else Path(file).name  # not the path on this machine
        what = f"{_plain(shown)} ({'test set' if name == 'test' else name.replace('_', ' ')})"
        yield what, count(rows.get("rows_read")), count(rows.get("rows_kept")), source["sha256"]


def _plain(text: str) -> str:
    """Return a name without what Markdown or HTML would read as more than a name."""
    return _ODD.sub("_", text)
