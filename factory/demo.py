"""The demo's own two things: a synthetic arena and the embedded base model, both drawn from one seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.dataset import earlier_manifest
from data_prep.errors import ArenaError
from data_prep.files import atomic_folder, read_json, write_json
from data_prep.strangers import refuse_loss, refuse_strangers
from data_prep.synthetic import ArenaFiles, write_arena

if TYPE_CHECKING:
    from factory.experiment import Experiment
    from factory.progress import Show

# The folder that stands for the embedded base wherever an experiment names it as its model.
EMBEDDED_BASE = "models/arena-tiny"
ARENA = Path("data") / "synthetic_arena"
DEFAULT_SEED = 1
TRAIN_ROWS, TEST_ROWS = 6000, 500
_FILES = ("train.csv", "test.csv", "truth.csv", "drawn.json")


def refuse_other_votes(experiment: Experiment) -> None:
    """Raise ArenaError where the experiment's export is of other votes than an arena's: the demo would replace it."""
    manifest = earlier_manifest(experiment.data_folder)
    votes = Path(manifest["sources"]["train"]["file"]) if manifest else ARENA
    if not votes.is_relative_to(ARENA):
        raise ArenaError(
            f"holds an export of {votes}, which the demo would replace by its arena",
            where=str(experiment.data_folder),
            remedy="python run.py demo --fresh does so, and puts the SFT results on these votes aside",
        )


def demo_arena(experiment: Experiment, seed: int, show: Show) -> tuple[ArenaFiles, bool]:
    """Return the arena of this seed and whether another one (or another base) was there before.

    Raises ArenaError, before anything is replaced, where anybody else's files would go with it.
    """
    refuse_loss(experiment.data_folder)
    files = ArenaFiles(ARENA / "train.csv", ARENA / "test.csv", ARENA / "truth.csv")
    drawn, earlier = _drawn(seed), _read(ARENA / "drawn.json")
    if earlier == drawn and Path(experiment.model).is_dir():
        return files, False
    if experiment.model != EMBEDDED_BASE:
        raise ArenaError(
            f"names the model {experiment.model}, and the demo would build its own tiny base in that place",
            where=str(experiment.folder / "experiment.yaml"),
            remedy=f"write model: {EMBEDDED_BASE}, and make another experiment for your model: run.py new EXP --model",
        )
    _draw(seed)
    show.note(f"drew {TRAIN_ROWS:,} battles with known probabilities and {TEST_ROWS} to submit (seed {seed}): {ARENA}")
    build_embedded_base(experiment, files.train, seed, show)
    return files, earlier is not None and earlier != drawn


def ensure_embedded_base(experiment: Experiment, show: Show) -> None:
    """Build the embedded base if the experiment names it and it is not there yet."""
    if experiment.model != EMBEDDED_BASE or Path(experiment.model).is_dir():
        return
    _draw(DEFAULT_SEED)
    build_embedded_base(experiment, ARENA / "train.csv", DEFAULT_SEED, show)


def build_embedded_base(experiment: Experiment, votes: Path, seed: int, show: Show) -> None:
    """Build the tiny base; its tokenizer learns from whole judge prompts, so that their fixed parts take few tokens."""
    from data_prep.prompt import JudgePrompt
    from data_prep.readers import VoteReader
    from factory.base_model import build_base_model

    folder = Path(experiment.model)
    prompt = JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)
    with show.line("embedded base") as line:
        line.phase("training a tokenizer, drawing random weights")
        build_base_model(folder, (prompt.message(b) for _, b in VoteReader(votes, labelled=True)), seed=seed)
    show.note(f"built a tiny base model with random weights (seed {seed}): {folder}")


def _draw(seed: int) -> None:
    """Write the arena of a seed; raises ArenaError where its folder holds anybody else's files."""
    own = _FILES if (ARENA / "drawn.json").is_file() else ()
    refuse_strangers(ARENA, own.__contains__, "demo")
    with atomic_folder(ARENA) as folder:
        write_arena(folder, seed=seed, train_rows=TRAIN_ROWS, test_rows=TEST_ROWS)
        write_json(folder / "drawn.json", _drawn(seed))


def _drawn(seed: int) -> dict[str, int]:
    return {"seed": seed, "train_rows": TRAIN_ROWS, "test_rows": TEST_ROWS}


def _read(path: Path) -> dict | None:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
