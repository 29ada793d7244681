"""A small object that several may want to write: only if nobody else has meanwhile.

In S3 that is what `If-None-Match` and `If-Match` are for; whether a server heeds them is tried on
the object itself. Other stores and file systems are written without a condition, and who writes
must look again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fsspec.asyn import sync

from flagscale.shared.passing import error_code, http_status
from flagscale.shared.store import ObjectStore

_REFUSED = (409, 412)  # somebody is at it, or has been
_UNKNOWN = 501
_NEVER = '"00000000000000000000000000000000"'  # no object's version


class Version(NamedTuple):
    """What was read, and what to name in order to write over that and nothing else."""

    content: bytes
    etag: str


class VersionedObject:
    """One object of a store.

    Attributes:
        has_conditions: whether a write over another version is refused, as far as is known.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        """Name it; nothing is read yet."""
        self._store, self._name = store, name
        self.has_conditions = store.url.startswith(("s3://", "s3a://"))

    def read(self) -> Version | None:
        """What is there, None if nothing is.

        Raises:
            UserError: the store refuses, or cannot be reached.
        """
        if not self.has_conditions:
            content = self._store.read(self._name)
            return None if content is None else Version(content, "")
        return self._store.do("read", _get, self._name)

    def write(self, content: bytes, over: Version | None) -> bool:
        """Write it, unless another has since.

        Args:
            content: what to write.
            over: what `read` has found.

        Returns:
            Whether it was written. Without conditions it always is.

        Raises:
            UserError: the store refuses, or cannot be reached.
        """
        if self.has_conditions:
            written = self._put(content, {"IfNoneMatch": "*"} if over is None else _over(over.etag))
            if written is not None:
                return written
            self.has_conditions = False
        self._store.write(self._name, content)
        return True

    def try_conditions(self, content: bytes) -> None:
        """Find out whether the store heeds conditions; whoever has written `content` calls it.

        Raises:
            UserError: the store refuses, or cannot be reached.
        """
        for condition in ({"IfNoneMatch": "*"}, _over(_NEVER)):
            if self.has_conditions and self._put(content, condition) is not False:
                self.has_conditions = False

    def remove(self, version: Version) -> None:
        """Delete it, unless it has another version by now.

        Raises:
            UserError: the store refuses, or cannot be reached.
        """
        if not self.has_conditions:
            self._store.remove(self._name)
            return

        def delete(filesystem: Any, path: str) -> None:  # noqa: ANN401
            try:
                filesystem.call_s3("delete_object", **_place(filesystem, path), **_over(version[1]))
            except Exception as error:
                if http_status(error) not in (*_REFUSED, 404):
                    raise

        self._store.do("deleted", delete, self._name)

    def _put(self, content: bytes, condition: dict[str, str]) -> bool | None:
        """Whether it was written; None if the store says that it knows no conditions."""

        def put(filesystem: Any, path: str) -> bool | None:  # noqa: ANN401
            try:
                filesystem.call_s3(
                    "put_object", **_place(filesystem, path), Body=content, **condition
                )
            except Exception as error:
                status = http_status(error)
                if status == _UNKNOWN:
                    return None
                gone = error_code(error) == "NoSuchKey"
                if status not in _REFUSED and not gone:
                    raise
                return False
            return True

        return self._store.do("written", put, self._name)


def _over(etag: str) -> dict[str, str]:
    return {"IfMatch": etag}


def _place(filesystem: Any, path: str) -> dict[str, str]:  # noqa: ANN401
    bucket, key, _ = filesystem.split_path(path)
    return {"Bucket": bucket, "Key": key}


def _get(filesystem: Any, path: str) -> Version | None:  # noqa: ANN401
    """Content and version of one answer: between two, another may write."""

    async def get() -> Version:
        answer = await filesystem._call_s3("get_object", **_place(filesystem, path))
        async with answer["Body"] as body:
            return Version(await body.read(), answer["ETag"])

    try:
        found: Version = sync(filesystem.loop, get)
    except FileNotFoundError:
        return None
    return found
