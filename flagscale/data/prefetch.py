"""Items made ahead in a thread, so that whoever takes them does not wait."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

_ItemT = TypeVar("_ItemT")
_END = object()


class Ahead(Iterator[_ItemT], Generic[_ItemT]):
    """An iterator whose items a background thread makes, a few ahead of what has been taken.

    The thread starts when the first item is asked for, and ends with the items, when this object
    is closed or no longer referred to, and when the interpreter exits. An error in making an item
    is raised where that item would have been taken.

    Args:
        make: gives the iterator; called in the thread.
        depth: items to keep ready.
    """

    def __init__(self, make: Callable[[], Iterator[_ItemT]], depth: int) -> None:
        self._work: _Work | None = _Work(make, depth)
        # Also runs when the interpreter exits: a thread may not be inside torch by then.
        self._stop = weakref.finalize(self, self._work.stop)

    def __next__(self) -> _ItemT:
        if self._work is None:
            raise StopIteration
        if not self._work.thread.ident:
            self._work.thread.start()
        item, error = self._work.take()
        if error is None and item is not _END:
            return item
        self.close()
        raise error if error is not None else StopIteration

    def close(self) -> None:
        """End the thread; there are no more items."""
        self._stop()
        self._work = None


class _Work:
    """What the thread and its consumer share; it must not refer to the consumer."""

    def __init__(self, make: Callable[[], Iterator[Any]], depth: int) -> None:
        self._make = make
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def take(self) -> tuple[Any, BaseException | None]:
        """The next item or error; `_END` after the last."""
        found = self._ready.get()  # a signal's handler runs meanwhile
        self._room.release()
        return found

    def stop(self) -> None:
        """Ask the thread to end, and wait for the item that it is making."""
        self._stopped.set()
        self._room.release()
        if self.thread.ident and self.thread is not threading.current_thread():
            self.thread.join()

    def _run(self) -> None:
        try:
            items = self._make()
            item = None
            while item is not _END and self._has_room():
                item = next(items, _END)
                self._ready.put((item, None))
        except BaseException as error:
            self._ready.put((None, error))

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._stopped.is_set()
