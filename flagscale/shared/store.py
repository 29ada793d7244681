"""A folder of an object store, through fsspec: files go there and back, several at a time.

What fails for a reason that passes is tried again (`flagscale.patience`).

Credentials come from where the store's own library looks: for S3 `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, and `AWS_ENDPOINT_URL` for another server than Amazon's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from flagscale.artifacts import is_disk_full
from flagscale.errors import UserError
from flagscale.patience import patiently
from flagscale.shared.passing import passes

logger = logging.getLogger(__name__)

_AT_ONCE = 8
_PROGRESS_SECONDS = 30.0
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

ResultT = TypeVar("ResultT")


def is_url(place: str) -> bool:
    """Whether it names something in an object store, and no path."""
    return "://" in place


class ObjectStore:
    """A folder of an object store. Names are relative to it.

    All methods raise `UserError` where the store refuses, or cannot be reached for minutes.
    """

    def __init__(self, url: str, patient: bool = True) -> None:
        """Use a URL (or a path, for small files that are not shared by locks).

        Args:
            url: of the folder.
            patient: try again what fails for a reason that passes.
        """
        self.url, self._patient = url.rstrip("/"), patient

    def below(self, name: str) -> ObjectStore:
        """A folder inside."""
        return ObjectStore(f"{self.url}/{name}", self._patient)

    def read(self, name: str) -> bytes | None:
        """A small file; None if there is none."""

        def read(filesystem: Any, path: str) -> bytes | None:  # noqa: ANN401
            try:
                content: bytes = filesystem.cat_file(path)
                return content
            except FileNotFoundError:
                return None

        return self.do("read", read, name)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Parts of files, several at a time.

        Args:
            ranges: of each part the file, where it begins, and its bytes; fewer come where the
                file ends early.
        """

        def read(filesystem: Any, _: str) -> list[bytes]:  # noqa: ANN401
            paths = [self._path(name) for name, _, _ in ranges]
            starts = [start for _, start, _ in ranges]
            ends = [start + size for _, start, size in ranges]
            content: list[bytes] = filesystem.cat_ranges(paths, starts, ends, on_error="raise")
            return content

        return self.do("read", read, ranges[0][0] if ranges else "")

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, all at once."""
        self.do("written", lambda filesystem, path: filesystem.pipe_file(path, content), name)

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload files, and check that they have arrived whole.

        Args:
            files: name there -> file here.
        """
        sizes = {name: path.stat().st_size for name, path in files.items()}
        for names in _some("uploaded", list(files)):

            def put(filesystem: Any, _: str, names: Sequence[str] = names) -> None:  # noqa: ANN401
                here, there = [str(files[n]) for n in names], [self._path(n) for n in names]
                filesystem.put(here, there)

            self.do("written", put)
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
        for names in _some("downloaded", list(files)):

            def get(filesystem: Any, _: str, names: Sequence[str] = names) -> None:  # noqa: ANN401
                here, there = [str(files[n]) for n in names], [self._path(n) for n in names]
                try:
                    filesystem.get(there, here)
                except FileNotFoundError:
                    absent = sorted(files.keys() - self.sizes().keys())
                    raise UserError(f"{self.url}/{(absent or ['?'])[0]}: is missing") from None

            self.do("read", get)

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file."""

        def find(filesystem: Any, root: str) -> dict[str, int]:  # noqa: ANN401
            filesystem.invalidate_cache()
            found = filesystem.find(root, detail=True)
            return {path[len(root) :].lstrip("/"): info["size"] for path, info in found.items()}

        return self.do("listed", find)

    def folders(self) -> list[str]:
        """Names of the folders directly inside."""
        return sorted({name.split("/")[0] for name in self.sizes() if "/" in name})

    def remove(self, name: str = "") -> None:
        """Delete a file or a folder, if it is there; by default everything."""

        def delete(filesystem: Any, path: str) -> None:  # noqa: ANN401
            filesystem.invalidate_cache()
            try:
                filesystem.rm(path, recursive=True)
            except FileNotFoundError:
                return

        self.do("deleted", delete, name)

    def do(self, what: str, function: Callable[[Any, str], ResultT], name: str = "") -> ResultT:
        """Let the store's library do something; its errors say where.

        Libraries raise what they like: no common class says that a server cannot be reached.

        Args:
            what: for the message: it cannot be <what>.
            function: is given fsspec's file system and the path there.
            name: of a file or a folder; by default this one.

        Raises:
            UserError: it failed for a reason that does not pass, or did not for minutes.
        """
        filesystem, path = self._fs, self._path(name)
        place = f"{self.url}/{name}" if name else self.url
        pauses = None if self._patient else ()
        try:
            return patiently(lambda: function(filesystem, path), f"access {place}", passes, pauses)
        except UserError:
            raise
        except Exception as error:
            if is_disk_full(error):
                raise
            told = f"{place}: cannot be {what}: {str(error) or type(error).__name__}"
            raise UserError(told) from error

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


def _some(done: str, names: Sequence[str]) -> Iterator[Sequence[str]]:
    """So many names as go at once; tells of a long transfer every now and then."""
    told = time.monotonic()
    for start in range(0, len(names), _AT_ONCE):
        yield names[start : start + _AT_ONCE]
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            logger.info("%s %d of %d files", done, min(start + _AT_ONCE, len(names)), len(names))
