"""One stage of one experiment: everything about it that lies on disk, each file read once and then passed down."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import ArenaError, UsageError, same_command
from common.experiment import Experiment, read_yaml
from common.files import read_json, sha256_of
from common.stages import STAGES, UNTRAINED, Fold, Step, fold_name, merge_of
from data_prep.export_reader import MANIFEST, read_columns, read_manifest, readable
from factory.fingerprint import data_sets, differences, exported_files
from factory.recipes import as_yaml, fold_overrides
from factory.state import Record, StageState, Standing, flag_to_go_on, listed

# The keys of experiment.yaml that the exported rows depend on; dpo_rejected shapes the rows of one stage only.
_SHAPING = (
    *("template", "enable_thinking", "cutoff_len", "labels", "prompt_share", "valid_share", "folds", "swap_copies"),
    *("orders_together", "epochs_as_rows", "seed"),
)
_SHAPING_ONE = {"dpo_judge": ["dpo_rejected"]}
_LARGEST_PROMPT = 1 << 18  # bytes


# In a stage's folder: which of its checkpoints is merged, where it is not the last (scoring.checkpoints).
CHOICE = "checkpoint.json"


class StageContext:
    """A stage with its recipes, manifest and state; raises ArenaError where a file that is asked for is unreadable."""

    def __init__(self, experiment: Experiment, name: str, family: dict[Any, Any] | None = None, fold: Fold = None):
        """`family` holds what the stages of one experiment share: each other, and the export's manifest.

        Where the experiment has folds, a stage without one stands for all of them: it has scores and no model.
        """
        self.experiment, self.name, self.fold = experiment, name, fold
        self._family = {} if family is None else family
        self._family[name, fold] = self
        # The stage that the user's command named, itself or all folds; and that command's options.
        self.called, self.asked = self, ""

    def other(self, name: str) -> StageContext:
        """Return another stage of the same experiment and fold, on the same exported data."""
        fold = None if name in UNTRAINED else self.fold
        return self._family.get((name, fold)) or StageContext(self.experiment, name, self._family, fold)

    def of(self, fold: Fold) -> StageContext:
        """Return another fold of the same stage."""
        return self._family.get((self.name, fold)) or StageContext(self.experiment, self.name, self._family, fold)

    @property
    def trainings(self) -> list[StageContext]:
        """The trainings of this stage: itself, or its folds and the one on all votes."""
        return [self.of(fold) for fold in self.experiment.trainings_of_a_stage] if self.is_trained else [self]

    @property
    def label(self) -> str:
        """What a person reads of it: sft, sft fold0, sft full."""
        return self.name if self.fold is None else f"{self.name} {fold_name(self.fold)}"

    @property
    def of_folds(self) -> bool:
        """Whether it stands for all folds: it has a result, made from theirs, and no model of its own."""
        return self.fold is None and self.experiment.folds > 1 and self.is_trained

    def require_one_judge(self) -> None:
        """Raise UsageError where it stands for all folds, which have a judge each."""
        if self.of_folds:
            remedy = f"say which one: --fold full, or 0 to {self.experiment.folds - 1}"
            raise UsageError(f"{self.name} has a judge in each fold", where=self.experiment.name, remedy=remedy)

    @property
    def judging(self) -> list[StageContext]:
        """The trainings that judge the validation rows: itself, or all folds."""
        return [each for each in self.trainings if each.fold != "full"] if self.of_folds else [self]

    @property
    def answering(self) -> list[StageContext]:
        """The trainings that answer battles without a verdict, by the experiment's `fold_answer`."""
        full = self.experiment.fold_answer == "full"
        return [self.of("full")] if self.of_folds and full else self.judging

    @property
    def scored_one_by_one(self) -> list[StageContext]:
        """The trainings whose scores its result is made of."""
        return list(dict.fromkeys([*self.judging, *self.answering]))

    @property
    def reported(self) -> StageContext:
        """The stage whose report has its calibration and figures: its own, or that of the folds for a judge of all."""
        return self.of(None) if self.fold == "full" else self

    def scores(self, split: str) -> bool:
        """Tell whether these rows are scored: not what `full` trained on, and the test set by those who answer it."""
        if split == "test" and self.fold is not None:
            return self in self.of(None).answering
        return self.fold != "full"

    def parts(self, split: str) -> list[str]:
        """Return the splits of the exported rows that are this fold's train, valid or test rows."""
        return self.experiment.parts(split, self.fold)

    @property
    def step(self) -> Step:
        """The training step: LLaMA-Factory's stage, its data set, the command that runs it."""
        return STAGES[self.name]

    @property
    def is_trained(self) -> bool:
        """Whether the stage trains: has recipes, and an adapter once it was run."""
        return self.name not in UNTRAINED

    @property
    def command(self) -> str:
        """The command that runs this stage: python run.py sft -e demo [--fold 0]"""
        return f"python run.py {self.step.command} -e {self.experiment.name}{self.fold_option}"

    def way_on(self) -> str:
        """Return how an interrupted training goes on: a whole command, since `demo` trains too."""
        flag = flag_to_go_on(self.adapter, self.step.stage)
        if flag == "--fresh" and self.called is not self:  # the finished folds would begin again
            return f"go on with {self.command}{self.asked} --fresh, then {same_command()}"
        return f"go on with {self.called.command}{self.asked} {flag}".rstrip()

    @property
    def score_again(self) -> str:
        """The command that scores this stage again."""
        return f"python run.py score -e {self.experiment.name} --stage {self.name}{self.fold_option} --fresh"

    def report_again(self, keep_scores: bool = False) -> str:
        """Return the command that makes another report, of the scores that are there or of new ones."""
        # Not the stage's own command, which would have to be given the options that it was run with, such as --layer.
        score = self.score_again.removesuffix(" --fresh") if keep_scores else self.score_again
        return self.command if self.of_folds else score

    @property
    def fold_option(self) -> str:
        """What a command line says of the fold, with a blank before it."""
        return "" if self.fold is None else f" --fold {self.fold}"

    @property
    def recipe_path(self) -> Path:
        """factory_configs/<experiment>/<stage>.yaml"""
        return self.experiment.recipe(self.name)

    @property
    def merge_recipe_path(self) -> Path:
        """factory_configs/<experiment>/merge_<stage>.yaml"""
        return self.experiment.recipe(merge_of(self.name))

    @cached_property
    def written(self) -> dict[str, Any]:
        """The training recipe as it stands in its file; empty where nothing is trained."""
        return read_yaml(self.recipe_path) if self.is_trained else {}

    @cached_property
    def merge_written(self) -> dict[str, Any]:
        """The merge recipe as it stands in its file."""
        return read_yaml(self.merge_recipe_path)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The training recipe of this fold; empty where nothing is trained."""
        return self.written and {**self.written, **fold_overrides(self.experiment, self.name, self.fold)}

    @cached_property
    def merge_recipe(self) -> dict[str, Any]:
        """The merge recipe of this fold."""
        chosen = {"adapter_name_or_path": self.weights.as_posix()} if self.choice.get("chosen") else {}
        return {**self.merge_written, **fold_overrides(self.experiment, merge_of(self.name), self.fold), **chosen}

    def overrides(self, step: str) -> list[str]:
        """Return what LLaMA-Factory's command line says of fold and checkpoint: dataset=…, output_dir=…"""
        own, written = self.recipe, self.written
        if step != self.name:
            own, written = self.merge_recipe, self.merge_written
        # OmegaConf reads the values as YAML: a bare no would be false.
        return [f"{key}={as_yaml(value)}" for key, value in own.items() if key not in written or written[key] != value]

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the exported data."""
        if "manifest" not in self._family:
            self._family["manifest"] = read_manifest(self.experiment.data_folder)
        return self._family["manifest"]

    def forget_export(self) -> None:
        """Read the manifest again when it is asked for next: the data were exported again."""
        self._family.pop("manifest", None)

    @property
    def exported(self) -> dict[str, str]:
        """The exported files' hashes by path; empty where the recipe trains on a data set of the user's."""
        folder = self.experiment.data_folder
        return exported_files(self.manifest, folder) if (folder / MANIFEST).is_file() else {}

    @property
    def has_soft_labels(self) -> bool:
        """Whether labels were drawn from distributions: a teacher's, or the shares of a table of votes."""
        path = self.experiment.data_folder / "rows.parquet"
        with readable(path):
            shares = read_columns(path, ["shares"])["shares"]
            return shares.null_count < len(shares)

    @cached_property
    def state(self) -> StageState:
        """What of this stage began and what is finished."""
        return StageState(self.folder)

    @property
    def adapter(self) -> Path:
        """saves/<model>/lora/<experiment>_<stage>[_fold0]"""
        return self.experiment.adapter_folder(self.name, self.fold)

    @cached_property
    def choice(self) -> dict[str, Any]:
        """What was chosen by --checkpoint; empty where the adapter is the last."""
        path = self.folder / CHOICE
        with readable(path, "choose again: --checkpoint best, last or a step"):
            return dict(read_json(path)) if path.is_file() else {}

    def forget_choice(self) -> Path:
        """Read the choice again and return what is merged now."""
        for name in ("choice", "merge_recipe"):
            vars(self).pop(name, None)
        return self.weights

    @property
    def weights(self) -> Path:
        """The adapter that is merged and scored: the chosen checkpoint, or what the training ended with."""
        return self.adapter / self.choice["chosen"] if self.choice.get("chosen") else self.adapter

    @property
    def folder(self) -> Path:
        """outputs/<experiment>/<stage>[/fold0]"""
        return self.experiment.output_folder(self.name, self.fold)

    @property
    def merged(self) -> Path:
        """outputs/<experiment>/<stage>[/fold0]/merged"""
        return self.experiment.merged_folder(self.name, self.fold)

    @property
    def start(self) -> str:
        """The model that the training starts from."""
        return self.experiment.start_model(self.name, self.fold)

    @property
    def trained_recipe(self) -> dict[str, Any]:
        """The recipe that the adapter was trained with; today's where `run.py` did not train it."""
        record = self.state.record("train")
        recorded = record.inputs.get(str(self.recipe_path)) if record else None
        if not isinstance(recorded, dict):
            return self.recipe
        return {**recorded, "output_dir": self.recipe["output_dir"]}  # the adapter may have been moved since

    @property
    def training_inputs(self) -> dict[str, Any]:
        """What a training depends on, but for the weights of local models and the files of an engine."""
        if not self.is_trained:
            return {"data": self.scoring_inputs["data"]}
        engine = self.experiment.distributed
        inputs = {str(self.recipe_path): self.recipe, "data": data_sets(self.recipe, self.exported)}
        return inputs if engine == "auto" else {**inputs, "distributed": engine}

    @property
    def scoring_inputs(self) -> dict[str, Any]:
        """What a report depends on, but for the model: the exported rows, and what is made of the scores."""
        experiment, folder, exported = self.experiment, self.experiment.data_folder, self.exported
        pairs = ["pairs.parquet"] if self.step.data == "dpo_reward" else []
        paths = [(folder / name).as_posix() for name in ("rows.parquet", "battles.parquet", "truth.csv", *pairs)]
        folds = {}
        if self.of_folds:
            records = {each.label: each.state.record("score") for each in (*self.judging, *self.answering)}
            folds["folds"] = {label: record and record.finished_at for label, record in records.items()}
            folds["fold_answer"] = experiment.fold_answer
        return {
            **folds,
            "data": {path: exported[path] for path in paths if path in exported},
            "swap_tta": experiment.swap_tta,
            "seed": experiment.seed,
            "target_prior": experiment.target_prior and experiment.target_prior.model_dump(),
        }

    def glance(self, part: str) -> Standing:
        """Return how a part stands by what can be compared at once; the weights of local models are not read."""
        if part == "merge":
            inputs = {str(self.merge_recipe_path): self.merge_recipe}
        else:
            inputs = self.training_inputs if part == "train" else self.scoring_inputs
        return self.state.standing(part, inputs, partial=True)

    def changed_settings(self) -> list[str]:
        """Return one line for each setting that the exported rows depend on and that changed since `prepare`."""
        made, today = self.manifest["experiment"], self.experiment.model_dump(mode="json")
        keys = [key for key in (*_SHAPING, *_SHAPING_ONE.get(self.name, ())) if key in made]
        before, now = ({key: each[key] for key in keys} for each in (made, today))
        template = Path(self.experiment.prompt_template)
        if template.is_file():  # judges read the export's own copy, so that a project may be moved without it
            before["prompt_template"] = f"sha256:{self.manifest['files'].get('judge_prompt.j2')}"
            small = template.stat().st_size < _LARGEST_PROMPT
            now["prompt_template"] = f"sha256:{sha256_of(template)}" if small else "longer than a prompt may be"
        return differences(before, now)

    def require_current_settings(self) -> None:
        """Raise ArenaError where experiment.yaml or the judge prompt ask for other rows than were exported."""
        if changes := self.changed_settings():
            raise ArenaError(
                listed("was exported with other settings; since then changed:", changes),
                where=str(self.experiment.data_folder),
                remedy=f"undo the change (in {self.experiment.folder / 'experiment.yaml'}); or export again, then "
                f"train with --fresh: {prepare_again(self.manifest, self.experiment.name)}",
            )

    def require_current_training(self) -> None:
        """Raise ArenaError where the adapter, or the judge that it starts from, learned from other exported rows: it
        may have seen today's validation rows."""
        if self.name != "sft" and self.start != self.experiment.model:
            self.other("sft").require_current_training()
        record = self.state.record("train")
        if record and (changed := self._other_files(record)):
            raise ArenaError(
                f"{self.name} was trained on another export than {self.experiment.data_folder} holds now "
                f"({some(changed)} changed since): it may have been trained on today's validation rows",
                where=str(self.folder),
                remedy=f"prepare the earlier votes again; or train on the new ones: {self.command} --fresh",
            )

    def require_scored(self, model: Mapping[str, Any] | None = None) -> None:
        """Raise ArenaError where the report is of an earlier judge or of other settings; `model` is what the scores
        depend on now."""
        if why := self.earlier_scores():
            what = f"{why}: its calibration and figures are of an earlier judge"
            raise ArenaError(what, where=str(self.folder), remedy=f"make a new report: {self.command}")
        standing = self.glance("score")
        if settings := [line for line in standing.changes if not line.startswith("data: ")]:
            raise ArenaError(
                listed("its report was made with other settings; since then changed:", settings),
                where=str(self.folder),
                remedy=f"undo the change, or make a new report: {self.report_again(standing.only_prior_changed)}",
            )
        record = self.state.record("score")
        if record and model is not None and (changes := differences(record.inputs.get("model", {}), model)):
            raise ArenaError(
                listed("the judge is not the one that was scored; since then changed:", changes),
                where=str(self.folder),
                remedy=f"undo the change, or score again: {self.score_again}",
            )

    def earlier_scores(self) -> str | None:
        """Return why the report is not of the judge as it is now, None where it is, or where no state.json is."""
        if self.of_folds and (changes := self.glance("score").changes):
            return f"the report of all folds is of other scores or rows than today's ({some(list(changes))})"
        records = {part: record for part in ("train", "merge", "score") if (record := self.state.record(part))}
        if not self.state.path.is_file() or ("score" in records and records["score"].finished_at):
            return None
        begun = f"{list(records)[-1]} began" if records else "nothing is finished"
        return f"{self.name} was started again after its report was written, and was not scored since ({begun})"

    def outdated_files(self, parts: tuple[str, ...] = ("train", "merge", "score")) -> list[str]:
        """Return the exported files that changed since these parts were made from them."""
        records = [record for part in parts if (record := self.state.record(part))]
        return list(dict.fromkeys(name for record in records for name in self._other_files(record)))

    def _other_files(self, record: Record) -> list[str]:
        folder = self.experiment.data_folder
        known, used = exported_files(self.manifest, folder), record.inputs.get("data", {})
        own = {Path(path): digest for path, digest in used.items() if isinstance(digest, str)}
        changed = [path for path, digest in own.items() if known.get(path.as_posix()) != digest]
        return [path.relative_to(folder).as_posix() for path in changed if path.is_relative_to(folder)]


def context_labelled(experiment: Experiment, label: str) -> StageContext:
    """Return the stage, or the fold of a stage, with this `label`."""
    name, _, fold = label.partition(" ")
    number = fold.removeprefix("fold")
    return StageContext(experiment, name, fold=int(number) if number.isdecimal() else "full" if fold else None)


def prepare_again(manifest: Mapping[str, Any], name: str) -> str:
    """Return the command that exports the same votes again."""
    words = [f"python run.py prepare -e {name}"]
    for key, source in manifest["sources"].items():
        option, weight = {"folds": "folds-from", "drop": "drop-ids"}.get(key, key.split("_")[0]), source["weight"]
        file = source["file"] + (f":{weight:g}" if weight != 1 and key != "soft" else "")
        words += [f"--{option}", shlex.quote(file), *([f"--soft-share {weight:g}"] if key == "soft" else [])]
    return " ".join(words)


def some(items: list[str], most: int = 3) -> str:
    """Return the first items as a list in one line, the others counted."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
