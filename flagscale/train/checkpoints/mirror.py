"""Training checkpoints in an object store: written here, kept there.

    URL/<training>/latest.json                 which files make which checkpoint; written last
    URL/<training>/step-00000050-1a2b3c4d/...  the files of one

After each checkpoint a thread uploads what the store lacks while training goes on; when it falls
behind it goes on with the newest. Each upload has a folder of its own, and only what `latest.json`
lists counts: an upload that was cut off is no checkpoint, and two writers cannot mix their files.
The folder here is a copy for Megatron-Core to read and write, made anew from the store at the
start.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.artifacts import digest, write_json
from flagscale.errors import UserError
from flagscale.shared.store import ObjectStore, is_url

logger = logging.getLogger(__name__)

_LATEST = "latest.json"
_FORMAT_VERSION = 1
_WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class _Snapshot:
    """Checkpoints to keep in the store, as hard links: training may delete its own meanwhile."""

    folder: Path
    names: tuple[str, ...]  # the latest last
    begun: float  # when it was complete here; seconds

    @property
    def step(self) -> int:
        """Of the latest."""
        return int(self.names[-1].removeprefix("step-"))


class Mirror:
    """The store's side of one training's checkpoints. The first rank uses it."""

    def __init__(self, url: str, folder: Path) -> None:
        """Keep `url` as `folder` is.

        Args:
            url: of this training alone.
            folder: on this machine.
        """
        self._store = ObjectStore(url)
        self._folder = folder
        self._download: Future[None] | None = None
        self._there: dict[str, dict[str, Any]] = {}  # name here -> its folder and files there
        self._known: set[str] = set()  # folders there that are this writer's to delete
        self._next: _Snapshot | None = None
        self._busy = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def downloaded(self) -> bool:
        """Make the folder what the store has, waiting for a few seconds at most at each call.

        Returns:
            Whether it is done: every checkpoint that counts is here, or there is none.

        Raises:
            UserError: the store cannot be read, or files are missing there.
        """
        if self._download is None:
            self._download = Future()
            threading.Thread(target=self._run_download, args=(self._download,), daemon=True).start()
        try:
            self._download.result(timeout=_WAIT_SECONDS)
        except TimeoutError:
            if not self._download.done():
                return False
            raise
        return True

    def upload(self, checkpoints: Sequence[Path]) -> None:
        """Begin to make the store what the folder is; returns at once.

        Args:
            checkpoints: all complete ones in the folder, the latest last.
        """
        folder = self._folder / f".upload-{uuid.uuid4().hex[:8]}"
        for path in checkpoints:
            shutil.copytree(path, folder / path.name, copy_function=os.link)
        with self._changed:
            superseded = self._next
            names = tuple(path.name for path in checkpoints)
            self._next = _Snapshot(folder, names, time.monotonic())
            self._changed.notify_all()
        if superseded is not None:
            shutil.rmtree(superseded.folder, ignore_errors=True)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_uploads, daemon=True)
            self._thread.start()

    def uploaded(self) -> bool:
        """Wait for a few seconds at most; whether nothing is left to upload, or it was given up."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._next is None and not self._busy, _WAIT_SECONDS
            )
        if not done:
            logger.info("waiting for the upload of a checkpoint to %s", self._store.url)
        return done

    def remove(self) -> None:
        """Delete everything there.

        Raises:
            UserError: the store refuses.
        """
        self._store.remove()

    def _run_download(self, future: Future[None]) -> None:
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            self._download_all()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    def _download_all(self) -> None:
        self._known.update(self._store.folders())
        content = self._store.read(_LATEST)
        if content is None:
            return
        try:
            found = json.loads(content)
            if found["format_version"] != _FORMAT_VERSION:
                raise ValueError(f"format version {found['format_version']}")
            there = dict(found["checkpoints"])
            latest = {"step": found["step"], "folder": found["folder"]}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self._store.url}/{_LATEST}: cannot be read: {error}; delete it to train from "
                "the beginning"
            ) from error
        for name, one in there.items():
            self._download_one(name, one)
        self._there = there
        write_json(self._folder / _LATEST, latest)

    def _download_one(self, name: str, one: dict[str, Any]) -> None:
        logger.info("downloading the checkpoint %s from %s", name, self._store.url)
        target = self._folder / name
        files = {file: target / file for file in one["files"]}
        self._store.below(one["folder"]).get(files)
        for file, size in one["files"].items():
            found = files[file].stat().st_size
            if found != size:
                raise UserError(
                    f"{self._store.url}/{one['folder']}/{file}: {found} bytes, but {size} were "
                    f"written; delete {self._store.url}/{_LATEST} to train from the beginning"
                )

    def _run_uploads(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                snapshot, self._next, self._busy = self._next, None, True
            assert snapshot is not None
            self._try_upload(snapshot)
            shutil.rmtree(snapshot.folder, ignore_errors=True)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _try_upload(self, snapshot: _Snapshot) -> None:
        try:
            self._synchronise(snapshot)
        except Exception as error:  # training goes on, whatever it is, and the next may succeed
            logger.warning(
                "checkpoint of step %d: was not uploaded: %s; training goes on",
                snapshot.step,
                error,
            )
        else:
            seconds = time.monotonic() - snapshot.begun
            logger.info(
                "checkpoint of step %d: in %s %.1f s later", snapshot.step, self._store.url, seconds
            )

    def _synchronise(self, snapshot: _Snapshot) -> None:
        """Upload what is missing, then point to it, then delete the rest.

        Not what came after this writer began and is not its own: it may have been cut off for so
        long that another has taken over, and hear of it a moment too late.
        """
        for name in snapshot.names:
            if name not in self._there:
                self._there[name] = self._upload_one(snapshot.folder / name)
        kept = {name: self._there[name] for name in snapshot.names}
        latest = {
            "format_version": _FORMAT_VERSION,
            "step": snapshot.step,
            "folder": snapshot.names[-1],
            "checkpoints": kept,
        }
        self._store.write(_LATEST, (json.dumps(latest, indent=2) + "\n").encode())
        self._there = kept
        for folder in self._known - {one["folder"] for one in kept.values()}:
            self._store.remove(folder)
            self._known.remove(folder)

    def _upload_one(self, path: Path) -> dict[str, Any]:
        files = {
            file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()
        }
        folder = f"{path.name}-{uuid.uuid4().hex[:8]}"
        self._known.add(folder)
        self._store.below(folder).put(files)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        return {"folder": folder, "files": sizes}


def place(checkpoints: str, name: str) -> tuple[Path, Mirror | None]:
    """Where one training's checkpoints are.

    Args:
        checkpoints: folder or URL of many trainings'.
        name: of this one.

    Returns:
        The folder to write to, and what keeps it in the store if `checkpoints` is a URL.
    """
    if not is_url(checkpoints):
        return Path(checkpoints) / name, None
    url = f"{checkpoints.rstrip('/')}/{name}"
    here = f"flagscale-{os.getuid()}-{digest(url).removeprefix('sha256:')[:16]}"
    folder = Path(tempfile.gettempdir()) / here  # the same for every rank on this machine
    return folder, Mirror(url, folder)


def forget(checkpoints: str, name: str) -> None:
    """Delete one training's checkpoints: its result is in place. A failure is only told."""
    folder, remote = place(checkpoints, name)
    if folder.exists():
        with _only_told():
            shutil.rmtree(folder)
    if remote is not None:
        with _only_told():
            remote.remove()


@contextmanager
def _only_told() -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as error:
        logger.warning("checkpoints that nobody needs any more were left: %s", error)
