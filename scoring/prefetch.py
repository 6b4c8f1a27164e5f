"""Work ahead: the next items are made in a thread while the present one is used.

It pays where both let Python's lock go, as tokenizing, copying to a GPU and a model's pass do.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

_Item = TypeVar("_Item")
_SECONDS = 0.1


def ahead(items: Iterable[_Item], depth: int = 1) -> Generator[_Item, None, None]:
    """Yield the items in their order, up to `depth` of them made before they are asked for.

    What `items` raises is raised here, in its place. When the iterator is closed, nothing more is made.
    """
    ready: Queue = Queue(maxsize=depth)
    stopped = Event()

    def put(kind: str, value: object) -> None:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=_SECONDS)
                return
            except Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # whatever it is, it belongs to the one who asks
            put("error", error)

    thread = Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = ready.get(timeout=_SECONDS)
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
