"""A folder of an object store, through fsspec: files go there and back, several at a time.

Credentials come from where the store's own library looks: for S3 `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, and `AWS_ENDPOINT_URL` for another server than Amazon's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from flagscale.artifacts import is_disk_full
from flagscale.errors import UserError

logger = logging.getLogger(__name__)

_AT_ONCE = 8
_PROGRESS_SECONDS = 30.0
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def is_url(place: str) -> bool:
    """Whether it names something in an object store, and no path."""
    return "://" in place


class ObjectStore:
    """A folder of an object store. Names are relative to it.

    All methods raise `UserError` where the store refuses or cannot be reached.
    """

    def __init__(self, url: str) -> None:
        """Use a URL (or a path, for small files that are not shared by locks)."""
        self.url = url.rstrip("/")

    def below(self, name: str) -> ObjectStore:
        """A folder inside."""
        return ObjectStore(f"{self.url}/{name}")

    def read(self, name: str) -> bytes | None:
        """A small file; None if there is none."""
        with self._explained("read", name):
            try:
                content: bytes = self._fs.cat_file(self._path(name))
                return content
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, all at once."""
        with self._explained("written", name):
            self._fs.pipe_file(self._path(name), content)

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload files, and check that they have arrived whole.

        Args:
            files: name there -> file here.
        """
        sizes = {name: path.stat().st_size for name, path in files.items()}
        with self._explained("written"):
            self._fs.put(
                [str(path) for path in files.values()],
                [self._path(name) for name in files],
                batch_size=_AT_ONCE,
                callback=_Progress("uploaded", len(files)),
            )
        found = self.sizes()
        for name, size in sizes.items():
            if found.get(name) != size:
                raise UserError(
                    f"{self.url}/{name}: {found.get(name, 0)} bytes have arrived of {size}; the "
                    "upload was interrupted, or something else writes there"
                )

    def get(self, files: Mapping[str, Path]) -> None:
        """Download files.

        Args:
            files: name there -> file here.
        """
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained("read"):
            try:
                self._fs.get(
                    [self._path(name) for name in files],
                    [str(path) for path in files.values()],
                    batch_size=_AT_ONCE,
                    callback=_Progress("downloaded", len(files)),
                )
            except FileNotFoundError:
                absent = sorted(files.keys() - self.sizes().keys())
                raise UserError(f"{self.url}/{(absent or ['?'])[0]}: is missing") from None

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file."""
        with self._explained("listed"):
            self._fs.invalidate_cache()
            root = self._path("")
            found = self._fs.find(root, detail=True)
        return {path[len(root) :].lstrip("/"): info["size"] for path, info in found.items()}

    def folders(self) -> list[str]:
        """Names of the folders directly inside."""
        return sorted({name.split("/")[0] for name in self.sizes() if "/" in name})

    def remove(self, name: str = "") -> None:
        """Delete a file or a folder, if it is there; by default everything."""
        with self._explained("deleted", name):
            self._fs.invalidate_cache()
            try:
                self._fs.rm(self._path(name), recursive=True)
            except FileNotFoundError:
                return

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        scheme = self.url.split("://")[0]
        try:
            filesystem, path = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            package = _PACKAGES.get(scheme)
            hint = f"install {package}" if package else "known are s3://, gs:// and az://"
            raise UserError(f"{self.url}: cannot be used: {error}; {hint}") from error
        return filesystem, path.rstrip("/")

    @property
    def _fs(self) -> Any:  # noqa: ANN401 - fsspec has no type information
        return self._opened[0]

    def _path(self, name: str) -> str:
        return f"{self._opened[1]}/{name}" if name else self._opened[1]

    @contextmanager
    def _explained(self, what: str, name: str = "") -> Iterator[None]:
        """Any error of the store's library as one that says where.

        Libraries raise what they like: no common class says that a server cannot be reached.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if is_disk_full(error):
                raise
            place = f"{self.url}/{name}" if name else self.url
            reason = str(error) or type(error).__name__
            raise UserError(f"{place}: cannot be {what}: {reason}") from error


class _Progress(Callback):
    """Tells of a long transfer every now and then."""

    def __init__(self, done: str, total: int) -> None:
        super().__init__(size=total)
        self._done, self._total = done, total
        self._told = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if time.monotonic() - self._told > _PROGRESS_SECONDS:
            self._told = time.monotonic()
            logger.info("%s %d of %d files", self._done, self.value, self._total)
