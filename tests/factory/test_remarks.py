"""factory.remarks: exactly the named remarks are dropped, and they are still what the libraries say."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

from factory.remarks import _REMARKS, hush_remarks


@pytest.mark.parametrize(("logger", "beginning"), _REMARKS.items())
def test_this_remark_is_dropped_and_another_of_the_same_logger_is_not(logger, beginning, caplog):
    hush_remarks()
    hush_remarks()
    logging.getLogger(logger).warning("%s something", beginning)
    assert caplog.text == ""
    logging.getLogger(logger).warning("out of memory: %s", beginning)
    assert caplog.messages == [f"out of memory: {beginning}"]
    assert len(logging.getLogger(logger).filters) == 1


@pytest.mark.parametrize(("logger", "beginning"), _REMARKS.items())
def test_the_installed_library_says_it_in_this_very_module(logger, beginning):
    package, *rest = logger.split(".")
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    source = Path(find_spec(package).origin).parent.joinpath(*rest).with_suffix(".py")
    text = source.read_text(encoding="utf-8")
    assert beginning in text and "getLogger(__name__)" in text.replace("get_logger", "getLogger")
