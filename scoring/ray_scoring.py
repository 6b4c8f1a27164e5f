"""Ray's actors score side by side, one engine each, on this machine or on a cluster.

The same shards from the same store as without Ray, so the same scores. On a cluster of several machines all of them
must see this folder under the same path (a shared disk): the model and the rows are read from it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import ArenaError, same_command
from scoring.executor import Asker, SideBySide
from scoring.scorer import ScorerSpec

LOCAL = "local"
# What every process of Ray needs: our modules, and no usage statistics sent.
_ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "RAY_USAGE_STATS_ENABLED": "0"}


class RayActors(SideBySide):
    """A pool of Ray's actors; one that dies is started again once, on another machine if need be."""

    name = "Ray"

    def __init__(self, spec: ScorerSpec, note: Callable[[str], None], *, address: str, actors: int | None):
        """Connect to the cluster at `address` ("local": start one on 127.0.0.1) and load the first model there.

        `actors` is their number (None: one a GPU of the cluster, else one). Raises ArenaError where Ray is missing,
        cannot be reached, or the model cannot be loaded there.
        """
        if find_spec("ray") is None:
            raise ArenaError("Ray is not installed", where="--ray", remedy="make extra-ray")
        _connect(address, actors)
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0)) if spec.engine == "torch" else 0
        count = actors or max(gpus, 1)
        actor = ray.remote(num_cpus=1, num_gpus=float(bool(gpus)), max_restarts=1, max_task_retries=1)(Asker)
        self._actors = [actor.remote(spec, str(Path.cwd())) for _ in range(count)]  # they end when nothing names them

        def asker(actor: Any) -> Callable[..., Future]:
            return lambda method, *arguments: getattr(actor, method).remote(*arguments).future()

        super().__init__([asker(actor) for actor in self._actors], note)
        note(f"Ray: {count} actor(s) on {len(ray.nodes())} machine(s)")

    def close(self) -> None:
        import ray

        ray.shutdown()  # a cluster that was started here ends

    def _result(self, future: Future) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return future.result()
        except RayTaskError as error:  # what an Asker raised
            raise error.cause from None
        except RayActorError as error:
            raise ArenaError(
                f"a Ray actor died twice: {str(error).splitlines()[0]}",
                where="--ray",
                remedy=f"{same_command()} goes on from what is scored; give fewer --workers or a smaller --precision",
            ) from None


def _connect(address: str, actors: int | None) -> None:
    os.environ.update(_ENVIRONMENT)
    import ray

    options: dict[str, Any] = {"runtime_env": {"env_vars": _ENVIRONMENT}}
    if address == LOCAL:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's name for: listen on 127.0.0.1 only
        options = {"num_cpus": max(actors or 1, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
        raise ArenaError(
            f"Ray cannot be reached: {str(error).strip().splitlines()[0]}",
            where=f"--ray {address}",
            remedy="check the address (ray://HOST:10001) and that the cluster runs the same versions of Python and "
            "Ray; --ray alone starts one here",
        ) from None
