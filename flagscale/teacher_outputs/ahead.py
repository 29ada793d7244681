"""Reads what the next micro-batch will ask for, while this one is worked with."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from flagscale.teacher_outputs.reader import TeacherOutputs
from flagscale.teacher_outputs.values import Hidden, SparseTargets


class ReadAhead:
    """Teacher outputs whose reader says what it will ask for next: it then does not wait for it.

    One micro-batch a split is read ahead, in a thread; another may be asked for all the same.
    """

    def __init__(self, outputs: TeacherOutputs) -> None:
        """Read nothing yet."""
        self._outputs = outputs
        self._thread: ThreadPoolExecutor | None = None
        self._coming: dict[str, tuple[list[int], Future[Hidden | SparseTargets]]] = {}

    def read(
        self, split: str, samples: Sequence[int], following: Sequence[int] = ()
    ) -> Hidden | SparseTargets:
        """See `TeacherOutputs.read`.

        Args:
            split: see there.
            samples: see there.
            following: of the same split, what will be asked for next, if it is known.
        """
        expected, coming = self._coming.pop(split, ([], None))
        if coming is not None and expected == list(samples):
            found = coming.result()
        else:
            found = self._outputs.read(split, samples)
        if following:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "teacher-outputs")
            ahead = self._thread.submit(self._outputs.read, split, list(following))
            self._coming[split] = list(following), ahead
        return found
