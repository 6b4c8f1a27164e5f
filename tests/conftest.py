"""What several tests share: a small tokenizer in a chat frame, real rows where they are, an experiment."""

import contextlib
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# Before anything imports torch: tests that run side by side, and their children, take one core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["ARENA_FACTORY_HERE"] = "1"  # run.py is called in folders of the tests

from common.experiment import Labels
from data_prep.chat_template import ChatFrame
from data_prep.prompt import JudgePrompt

# The same examples everywhere, and no verdict by the clock of a busy machine. `pytest --hypothesis-profile=explore`
# draws others every time.
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False)
settings.load_profile("ci")

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
CORPUS = [
    "### User\n### Assistant A\n### Assistant B\n### Question\nWhich assistant do people prefer? Reply with A for",
    "The quick brown fox jumps over the lazy dog. Two assistants answered the same user; decide which is better.",
    "def f(x):\n    return x + 1\n\nnaïve café 日本語 😀 1234567890",
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what needs the trained judge or a browser as slow, before pytest chooses by -m."""
    for item in items:
        if {"chain", "browser"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """Let signals reach the processes that tests start, also where our own shell ignores them (a job with &, nohup)."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    earlier = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real votes, where it exists."""
    if not (REAL / "arena" / "train_natural.csv").is_file():
        pytest.skip("the folder of real votes is not beside this checkout")
    return REAL


@pytest.fixture(scope="session")
def train_tokenizer():
    """A function that makes a small byte-level BPE tokenizer in milliseconds, with Qwen's special tokens or others."""
    from workbench import train_tokenizer

    return partial(train_tokenizer, CORPUS * 3, 600)


@pytest.fixture(scope="session")
def small_tokenizer(train_tokenizer):
    """The tokenizer with Qwen's special tokens."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def small_frame(small_tokenizer) -> ChatFrame:
    """The frame of qwen3_nothink over the small tokenizer."""
    from workbench import frame_of

    return frame_of(small_tokenizer)


@pytest.fixture(scope="session")
def judge_prompt() -> JudgePrompt:
    """The committed judge prompt."""
    return JudgePrompt.load(ROOT / "templates" / "judge_prompt.j2", Labels())


@pytest.fixture
def make_experiment():
    """A function that makes an experiment with the given keys changed."""
    from chain import experiment_of

    return experiment_of


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty current folder with the project's templates in it."""
    (tmp_path / "templates").symlink_to(ROOT / "templates")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _made_once(tmp_path_factory, name: str, make) -> Path:
    """Return a folder that `make` fills, once for all workers of a run; tests leave it as it is."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared" / name
    finished = folder.with_suffix(".finished")
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not finished.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """The embedded base model."""

    def make(folder: Path) -> None:
        from data_prep.synthetic import synthetic_battles
        from factory.demo import build_base_model

        battles = [row.battle for row in synthetic_battles(seed=3, rows=400)]
        texts = (text for b in battles for text in b.prompts + b.responses_a + b.responses_b)
        build_base_model(folder / "arena-tiny", texts, seed=3)

    return _made_once(tmp_path_factory, "models", make) / "arena-tiny"


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    """A folder (with a space in its name) where votes were prepared and the judge was trained, merged and scored.

    One worker of a run trains it; each has a copy of its own.
    """
    from chain import train_chain

    trained = _made_once(tmp_path_factory, "chain", lambda folder: train_chain(folder / "place"))
    return shutil.copytree(trained / "place", tmp_path_factory.mktemp("chain") / "own place", symlinks=True)


@pytest.fixture(scope="session")
def _whole_place(tmp_path_factory, small_frame, small_tokenizer) -> Path:
    """A working place in miniature; tests get copies."""

    def make(folder: Path) -> None:
        from tests.bad_inputs.place import build

        with contextlib.chdir(folder):
            build(folder, small_frame, small_tokenizer)

    return _made_once(tmp_path_factory, "place", make)


@pytest.fixture
def place(_whole_place, tmp_path, monkeypatch):
    """A copy of the working place as the current folder."""
    from tests.bad_inputs.place import Place

    folder = shutil.copytree(_whole_place, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(folder)
    return Place()
