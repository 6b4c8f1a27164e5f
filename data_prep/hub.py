"""The hub: asked once whether it answers, before its library asks file by file, with five retries each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RETRIES = "huggingface_hub.utils._http"  # the logger that tells every failed request and every retry


@contextmanager
def asked_once(model: str, revision: str) -> Iterator[None]:
    """Let the library load `model` from the hub; where no hub answers, from the cache alone and without retries.

    Its lines about retries are kept off the terminal. Raises OSError where no hub answers and the cache lacks it.
    """
    from huggingface_hub import constants
    from llamafactory.extras.misc import use_modelscope, use_openmind

    logger = logging.getLogger(_RETRIES)
    offline, level = constants.HF_HUB_OFFLINE, logger.level
    elsewhere = Path(model).is_dir() or use_modelscope() or use_openmind()
    if not offline and not elsewhere and (reason := why_silent(model, revision)):
        if cached_file(model, "config.json", revision) is None:
            raise OSError(f"couldn't connect to {constants.ENDPOINT} ({reason}), and the cache does not hold it")
        constants.HF_HUB_OFFLINE = True  # read anew at each request
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def cached_file(model: str, name: str, revision: str = "main") -> Path | None:
    """Return a file of a hub's model that an earlier download left on this disk, None where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:  # no hub's id
        return None
    return Path(found) if isinstance(found, str) else None


def why_silent(model: str, revision: str) -> str | None:
    """Ask the hub for the head of one file and return why nothing came, None for any answer, a refusal too."""
    import httpx
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import get_session

    try:
        get_session().head(hf_hub_url(model, "config.json", revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except httpx.TransportError as error:
        return str(error) or type(error).__name__
    return None
