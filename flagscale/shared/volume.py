"""Artifacts on a volume that every pod mounts.

    artifacts/student-0123456789abcdef/    a complete artifact, named by its manifest's digest
    artifacts/.distil-student-1a2b3c4d/    of a running step: `alive`, and what it writes

An artifact gets its name by a rename, after everything in it is on the disk. A step touches its
`alive` every minute; the folders of steps that died are removed by the next step that writes.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import threading
import uuid
from pathlib import Path

from flagscale.artifacts import (
    Manifest,
    disk_full,
    flush,
    is_disk_full,
    open_artifact,
    read_manifest,
)
from flagscale.errors import UserError
from flagscale.shared.place import (
    ARTIFACTS,
    Place,
    check_digest,
    missing,
    name_of,
    pointer_to,
    staged_manifest,
)
from flagscale.shared.pointer import Pointer

logger = logging.getLogger(__name__)

_ALIVE = "alive"
_ALIVE_SECONDS = 60.0
_DEAD_SECONDS = 3600.0


class Volume(Place):
    """A folder that steps share."""

    def __init__(self, root: Path) -> None:
        """Use a folder.

        Raises:
            UserError: there is none: made here, it would be the pod's own and go with it.
        """
        if not root.is_dir():
            raise UserError(f"FLAGSCALE_SHARED={root}: no such folder; is the volume mounted?")
        self._folder = root.absolute() / ARTIFACTS
        self._staging: list[Path] = []
        self._closed = threading.Event()

    def stage(self, step: str) -> Path:
        """See `Place.stage`."""
        staging = self._folder / f".{step}-{uuid.uuid4().hex[:8]}"
        try:
            staging.mkdir(parents=True)
            (staging / _ALIVE).touch()
        except OSError as error:
            raise UserError(
                f"{staging}: cannot be written: {error.strerror}; user {os.getuid()} needs to write"
                " on the volume"
            ) from error
        if not self._staging:
            threading.Thread(target=self._stay_alive, daemon=True).start()
        self._staging.append(staging)
        _remove_dead(self._folder, now=(staging / _ALIVE).stat().st_mtime)
        return staging / "artifact"

    def publish(self, staged: Path) -> Pointer:
        """See `Place.publish`. What stands there already serves if it is intact."""
        manifest = staged_manifest(staged)
        first = self._folder / name_of(manifest)
        try:
            flush(staged)
            for number in itertools.count(1):
                target = first if number == 1 else first.with_name(f"{first.name}-{number}")
                pointer = pointer_to(staged, manifest, str(target))
                if _rename(staged, target) or _is_intact(target, manifest):
                    break
                # Not put right: another step may be at it, or reading what it has put right.
                logger.warning("%s: is damaged; going on to the next name", target)
            flush(self._folder, deep=False)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(first) from error
            raise UserError(f"{first}: cannot be written: {error}") from error
        return pointer

    def close(self) -> None:
        """See `Place.close`."""
        self._closed.set()
        for staging in self._staging:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def fetch(cls, pointer: Pointer, folder: Path) -> Path:
        """See `flagscale.shared.fetch`; nothing is copied."""
        found = Path(pointer.location)
        if not found.is_dir():
            raise missing(
                pointer,
                "mount the volume that it was written to "
                f"(FLAGSCALE_SHARED is {os.environ.get('FLAGSCALE_SHARED') or 'not set'})",
            )
        check_digest(found, pointer)
        return found

    @classmethod
    def manifest(cls, pointer: Pointer) -> Manifest:
        """See `flagscale.shared.manifest_of`."""
        return read_manifest(cls.fetch(pointer, Path()))

    @classmethod
    def damage(cls, pointer: Pointer) -> str | None:
        """See `flagscale.shared.damage`."""
        try:
            open_artifact(cls.fetch(pointer, Path()), pointer.kind)
        except (UserError, OSError) as error:
            return str(error)
        return None

    def _stay_alive(self) -> None:
        while not self._closed.wait(_ALIVE_SECONDS):
            for staging in self._staging:
                try:
                    os.utime(staging / _ALIVE)
                except OSError as error:
                    logger.warning("%s: %s", staging, error)


def _rename(source: Path, target: Path) -> bool:
    """Whether it went there; False if something is there."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _is_intact(folder: Path, manifest: Manifest) -> bool:
    try:
        return open_artifact(folder, manifest.kind).digest == manifest.digest
    except (UserError, OSError):
        return False


def _remove_dead(folder: Path, now: float) -> None:
    """Remove what steps left that were killed.

    Args:
        folder: of the artifacts.
        now: by the file server's clock, which also set the times to compare with.
    """
    for staging in folder.glob(".*-*"):
        try:
            alive = staging / _ALIVE
            seen = (alive if alive.exists() else staging).stat().st_mtime
        except FileNotFoundError:
            continue  # its step, or another one, removed it just now
        if now - seen > _DEAD_SECONDS:
            logger.info("removing %s, left by a step that died", staging)
            shutil.rmtree(staging, ignore_errors=True)
