"""Artifacts in an object store.

    URL/artifacts/student-0123456789abcdef/...    named by its manifest's digest
    URL/artifacts/.writable                       empty: written before the work, as a trial

A step writes into a folder of its own machine. After it, the files are uploaded, the manifest last:
an artifact without one is no artifact.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from flagscale.artifacts import MANIFEST, Manifest, disk_full, is_disk_full, read_manifest
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
from flagscale.shared.store import ObjectStore

logger = logging.getLogger(__name__)

_WRITABLE = ".writable"


class Bucket(Place):
    """A folder of an object store."""

    def __init__(self, url: str) -> None:
        """Use a URL that fsspec knows."""
        self._store = ObjectStore(url)
        self._staging: list[Path] = []

    def stage(self, step: str) -> Path:
        """See `Place.stage`; the folder is on this machine.

        An empty file there shows, before hours of work, that this step may write.
        """
        self._store.write(f"{ARTIFACTS}/{_WRITABLE}", b"")
        self._staging.append(Path(tempfile.mkdtemp(prefix=f"{step}-")))
        return self._staging[-1] / "artifact"

    def publish(self, staged: Path) -> Pointer:
        """See `Place.publish`.

        What stands there already is written over, with the same: it may be damaged.
        """
        manifest = staged_manifest(staged)
        store = self._store.below(f"{ARTIFACTS}/{name_of(manifest)}")
        logger.info("uploading the %s to %s", manifest.kind, store.url)
        store.put({name: staged / name for name in manifest.files})
        store.put({MANIFEST: staged / MANIFEST})
        return pointer_to(staged, manifest, store.url)

    def close(self) -> None:
        """See `Place.close`."""
        for staging in self._staging:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def fetch(cls, pointer: Pointer, folder: Path) -> Path:
        """See `flagscale.shared.fetch`."""
        store = ObjectStore(pointer.location)
        try:
            _fetch_manifest(store, pointer, folder)
            files = read_manifest(folder).files
            logger.info("downloading the %s (%.0f MB)", pointer.kind, pointer.bytes / 1e6)
            store.get({name: folder / name for name in files})
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(folder) from error
            raise
        return folder

    @classmethod
    def manifest(cls, pointer: Pointer) -> Manifest:
        """See `flagscale.shared.manifest_of`."""
        with tempfile.TemporaryDirectory() as name:
            _fetch_manifest(ObjectStore(pointer.location), pointer, Path(name))
            return read_manifest(Path(name))

    @classmethod
    def damage(cls, pointer: Pointer) -> str | None:
        """See `flagscale.shared.damage`."""
        store = ObjectStore(pointer.location)
        try:
            files = cls.manifest(pointer).files
            sizes = store.sizes()
        except UserError as error:
            return str(error)
        absent = sorted({*files, MANIFEST} - sizes.keys())
        if absent:
            return f"{store.url}/{absent[0]}: is missing"
        found = sum(sizes[name] for name in (*files, MANIFEST))
        if found != pointer.bytes:
            return f"{store.url}: {found} bytes, but {pointer.bytes} were written"
        return None


def _fetch_manifest(store: ObjectStore, pointer: Pointer, folder: Path) -> None:
    content = store.read(MANIFEST)
    if content is None:
        raise missing(pointer, "look whether this is the bucket that it was written to")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_bytes(content)
    check_digest(folder, pointer)
