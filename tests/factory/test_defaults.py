"""docs/recipes.md and docs/experiment.md list what the templates write: keys, values, a source for each."""

import re

import pytest
from chain import ROOT
from omegaconf import OmegaConf

from common.experiment import Experiment, load_experiment
from common.stages import TRAININGS
from factory.new_experiment import CUTOFF_LEN, NewExperiment, render_experiment
from factory.recipes import as_yaml, render_recipe, shared_values

PAGES = "\n".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("recipes", "experiment"))


def table(name: str) -> dict[str, str]:
    """Return the values of a marked table by key; each row has a source, then "`key` value; …"."""
    block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGES, re.DOTALL)[1]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    assert all(len(cells) == 2 and len(cells[0]) >= 8 for cells in rows)
    return dict(re.findall(r"`(\w+)` ([^;]+?)(?: \(.*?\))?(?=;|$)", ";".join(cells[1] for cells in rows)))


def value_of(cell: str, step: str) -> str | None:
    """Return a step's value in a cell such as "1.0e-4, dpo 5.0e-6", None where it has none."""
    parts = [part.split() for part in cell.split(", ")]
    found = [value for *stage, value in parts if not stage or step.startswith(stage[0])]
    return found[-1] if found else None


def read(text: str) -> dict:
    return OmegaConf.to_container(OmegaConf.create(text))


def recipes() -> dict[str, dict]:
    """Return the recipes of the default experiment, which replaces no first value."""
    its = load_experiment("qwen3-4b", ROOT)
    assert its.recipes == {}
    return {step: read(render_recipe(its, step)) for step in TRAININGS}


def test_every_default_of_a_recipe_is_on_the_page_with_its_source():
    its, listed = load_experiment("qwen3-4b", ROOT), table("recipe defaults")
    written = set()
    for step, recipe in recipes().items():
        own = recipe.keys() - shared_values(its, step, None).keys() - {"seed"}  # the seed is the experiment's
        written |= own
        for key in own:
            assert value_of(listed[key], step) == as_yaml(recipe[key]), f"{key} of {step}"
        assert {key for key, cell in listed.items() if value_of(cell, step)} == own
    assert set(listed) == written


def test_every_default_of_an_experiment_is_on_the_page_with_its_source():
    listed = table("experiment defaults")
    content = read(render_experiment(NewExperiment("x", "Qwen/Qwen3-4B-Instruct-2507")))
    defaults = content.keys() - {"model", "template", "description"}
    assert set(listed) == defaults
    for key in defaults:
        assert OmegaConf.to_container(OmegaConf.create(f"x: {listed[key]}"))["x"] == content[key], key
    assert content["cutoff_len"] == CUTOFF_LEN == 2048


@pytest.mark.parametrize("key", ["swap_copies", "dpo_rejected", "valid_share", "seed", "revision", "quantization_bit"])
def test_what_is_left_out_of_an_experiment_has_the_value_on_the_page(key):
    assert as_yaml(Experiment.model_fields[key].default) == table("experiment defaults")[key]
