"""Render the recipes of all committed experiments again, after a change in templates/.

    python benchmarks/render_recipes.py

Recipes that were edited by hand are kept and listed.
"""

import os

from figures import ROOT

from common.experiment import load_experiment
from common.stages import STEPS
from factory.recipes import write_recipe

if __name__ == "__main__":
    os.chdir(ROOT)
    for path in sorted(ROOT.glob("factory_configs/*/experiment.yaml")):
        for step in STEPS:
            outcome = write_recipe(load_experiment(path.parent.name), step)
            if outcome.state != "unchanged":
                print(outcome.state, outcome.path)
