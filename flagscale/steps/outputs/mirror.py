"""What a step has written of teacher outputs so far, where its own disk goes with its pod.

Shards are added to at their end alone. So every now and then a writer begins new ones, and uploads
those before; a step that was stopped downloads them, and what they lack is asked again.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from flagscale.errors import UserError
from flagscale.shared.store import ObjectStore, is_url
from flagscale.teacher_outputs import OutputsWriter

logger = logging.getLogger(__name__)

_SECONDS = 120.0  # between uploads: at most so much is asked again


class OutputsMirror:
    """One process's side of a folder in an object store; of a folder that stays, nothing to do."""

    def __init__(self, place: str, folder: Path, writer: int) -> None:
        """Keep `place` as `folder` is.

        Args:
            place: URL of this work alone, or a path.
            folder: on this machine.
            writer: number of this process among those that write there.
        """
        self._store = ObjectStore(place) if is_url(place) else None
        self._folder, self._mine = folder, f"{writer:05d}-"
        self._last, self._there = time.monotonic(), set[str]()

    def download(self) -> None:
        """Fetch what is there and not here. One process does, before any writes.

        Raises:
            UserError: the store cannot be read.
        """
        if self._store is None:
            return
        found = self._store.sizes()
        wanted = [name for name, size in found.items() if size > _size(self._folder / name)]
        self._store.get({name: self._folder / name for name in wanted})

    def upload(self, writer: OutputsWriter) -> None:
        """Now and then: what this process has written since; a failure is only told."""
        if self._store is None or time.monotonic() - self._last < _SECONDS:
            return
        writer.close()
        files = {
            path.relative_to(self._folder).as_posix(): path
            for path in sorted(self._folder.rglob("*"), reverse=True)  # records before their index
            if path.is_file() and (path.name.startswith(self._mine) or path.name == "facts.json")
        }
        new = {name: path for name, path in files.items() if name not in self._there}
        try:
            self._store.put(new)
            self._there |= new.keys()
        except UserError as error:
            logger.warning("teacher outputs: were not uploaded: %s; the step goes on", error)
        self._last = time.monotonic()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
