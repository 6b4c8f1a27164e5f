"""One stage of one experiment: everything about it that lies on disk, each file read once and then passed down."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from common.experiment import Experiment, read_yaml
from common.stages import STEPS, Step, merge_of
from data_prep.export_reader import read_manifest
from factory.state import StageState


class StageContext:
    """A stage with its recipes, manifest and state; raises ArenaError where a file that is asked for is unreadable."""

    def __init__(self, experiment: Experiment, name: str):
        self.experiment, self.name = experiment, name

    @property
    def step(self) -> Step:
        """The training step: LLaMA-Factory's stage, its data set, the command that runs it."""
        return STEPS[self.name]

    @property
    def recipe_path(self) -> Path:
        """factory_configs/<experiment>/<stage>.yaml"""
        return self.experiment.recipe(self.name)

    @property
    def merge_recipe_path(self) -> Path:
        """factory_configs/<experiment>/merge_<stage>.yaml"""
        return self.experiment.recipe(merge_of(self.name))

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The training recipe as it stands in its file."""
        return read_yaml(self.recipe_path)

    @cached_property
    def merge_recipe(self) -> dict[str, Any]:
        """The merge recipe as it stands in its file."""
        return read_yaml(self.merge_recipe_path)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the exported data."""
        return read_manifest(self.experiment.data_folder)

    @cached_property
    def state(self) -> StageState:
        """What of this stage began and what is finished."""
        return StageState(self.folder)

    @property
    def adapter(self) -> Path:
        """saves/<model>/lora/<experiment>_<stage>"""
        return self.experiment.adapter_folder(self.name)

    @property
    def folder(self) -> Path:
        """outputs/<experiment>/<stage>"""
        return self.experiment.output_folder(self.name)

    @property
    def merged(self) -> Path:
        """outputs/<experiment>/<stage>/merged"""
        return self.experiment.merged_folder(self.name)
