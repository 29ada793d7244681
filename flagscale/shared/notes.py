"""Small files that a step leaves for its next attempt: what it has found out so far.

    FLAGSCALE_SHARED/notes/NAME.json, or without it in this machine's temporary folder

A step that cannot read or write them works as if there were none.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from flagscale import variables
from flagscale.artifacts import digest
from flagscale.errors import UserError
from flagscale.shared.store import ObjectStore, is_url

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 5.0


class Note:
    """One of them. Nothing is raised for what becomes of it."""

    def __init__(self, what: str, about: dict[str, Any]) -> None:
        """Find it, if it is there.

        Args:
            what: it is about, for its name.
            about: all that its content depends on, as JSON values: of others nothing is found.
        """
        place = os.environ.get(variables.SHARED, "")
        place = place or f"{tempfile.gettempdir()}/flagscale-{os.getuid()}"
        self._store = ObjectStore(f"{place.rstrip('/')}/notes", patient=False)
        self._name = f"{what}-{digest(about).removeprefix('sha256:')[:16]}.json"
        self._pause, self._written = _PAUSE_SECONDS, time.monotonic()

    def read(self) -> dict[str, Any]:
        """What was written last; empty where nothing was, or its writer was killed at it."""
        try:
            found = json.loads(self._store.read(self._name) or b"{}")
        except (UserError, OSError, ValueError) as error:
            logger.warning("%s: cannot be read, and is made anew: %s", self._name, error)
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, content: dict[str, Any]) -> None:
        """Write it, unless that was done a moment ago: then it goes with the next."""
        if time.monotonic() - self._written < self._pause:
            return
        try:
            if not is_url(self._store.url):
                Path(self._store.url).mkdir(parents=True, exist_ok=True)
            self._store.write(self._name, json.dumps(content).encode())
        except (UserError, OSError) as error:
            logger.warning("%s: cannot be written: %s", self._name, error)
            self._pause = float("inf")
        self._written = time.monotonic()

    def remove(self) -> None:
        """Once nobody needs it any more."""
        try:
            self._store.remove(self._name)
        except (UserError, OSError) as error:
            logger.warning("%s: was left: %s", self._name, error)
