"""Folders of object stores, as s3fs, gcsfs and adlfs read them."""

from __future__ import annotations

import re

_URL = re.compile(r"(?P<scheme>s3|gs|az)://(?P<bucket>[^/]*)(?P<path>/.*)?", re.DOTALL)
# The widest of the stores' rules; az:// may name the account behind an @.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9](@[A-Za-z0-9.-]{3,250})?")
_LONGEST_KEY = 1024  # bytes; a step's files need a part of it
_ROOM = 256


def check_bucket_url(url: str) -> str:
    """The URL, if it can be one of an object store.

    Raises:
        ValueError: what it must be like.
    """
    found = _URL.fullmatch(url)
    if found is None or not found["bucket"]:
        raise ValueError("must start with s3://, gs:// or az://, and name a bucket")
    if not _BUCKET.fullmatch(found["bucket"]):
        raise ValueError(
            f"names the bucket {found['bucket']!r}; a bucket's name has 3 or more letters, digits, "
            "dots and dashes"
        )
    path = found["path"] or ""
    if len(path.encode()) > _LONGEST_KEY - _ROOM:
        raise ValueError(
            f"the path in the bucket must be no longer than {_LONGEST_KEY - _ROOM} bytes"
        )
    wrong = re.search(r"[?#*\[\]\\]|//|(?:^|/)\.\.?(?:/|$)", path)
    if wrong is not None:
        raise ValueError(f"holds {wrong[0]!r}, which is no part of a folder's name in a bucket")
    return url
