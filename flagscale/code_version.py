"""Which code runs: what an installed package is called says nothing of what was changed in it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

_DISTRIBUTION = "flagscale-distillation"


@functools.cache
def code_version() -> str:
    """The release, and a digest of this package's sources as they are here."""
    release = importlib.metadata.version(_DISTRIBUTION)
    return f"{_DISTRIBUTION} {release}, sources {digest_of([Path(__file__).parent])}"


def digest_of(folders: Iterable[Path]) -> str:
    """16 hexadecimal digits of all files in the folders but compiled ones.

    Of all files, not of kinds that are known: a template changes a result, and so does a kernel.
    """
    value = hashlib.sha256()
    for root in folders:
        for path in sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".pyc"):
            value.update(path.relative_to(root).as_posix().encode() + b"\0")
            value.update(hashlib.sha256(path.read_bytes()).digest())
    return value.hexdigest()[:16]
