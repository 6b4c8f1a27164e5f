"""The real page of LLaMA Board, built as `run.py board` builds it but not served."""

from pathlib import Path

import pytest
from board_page import function_named

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The real page with the committed experiments, in whose folder the tests of a module then are."""
    from factory.board_page import build

    folder = tmp_path_factory.mktemp("page")
    for name in ("factory_configs", "templates"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield build()


@pytest.fixture(scope="module")
def runner(page):
    """LLaMA-Factory's own runner behind the page: it makes arguments of what the elements hold."""
    return function_named(page, "load_args").fn.__self__
