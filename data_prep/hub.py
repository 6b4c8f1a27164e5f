"""The Hugging Face hub: one request finds out whether it answers, before five retries for each file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def offline_if_unreachable(model: str, revision: str) -> Iterator[None]:
    """Within the block, huggingface_hub reads its cache alone where the hub does not answer one request.

    A refusal (401, 404) is an answer. Raises OSError where the hub does not answer and the cache lacks the model.
    """
    import httpx
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import get_session
    from llamafactory.extras.misc import use_modelscope, use_openmind

    offline = constants.HF_HUB_OFFLINE
    if not (offline or Path(model).is_dir() or use_modelscope() or use_openmind()):
        try:
            url = hf_hub_url(model, "config.json", revision=revision)
            get_session().head(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except httpx.TransportError as error:
            if cached_file(model, "config.json", revision) is None:
                what = f"couldn't connect to {constants.ENDPOINT} ({error}), and the cache does not hold {model}"
                raise OSError(what) from None
            constants.HF_HUB_OFFLINE = True  # the library looks at each request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def cached_file(model: str, name: str, revision: str = "main") -> Path | None:
    """Return a file of a hub's model that an earlier download left on this disk, None where it did not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:  # not the id of a model on the hub
        return None
    return Path(found) if isinstance(found, str) else None
