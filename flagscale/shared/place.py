"""What a volume and an object store have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

from flagscale.artifacts import MANIFEST, Manifest, read_manifest
from flagscale.errors import UserError
from flagscale.shared.pointer import Pointer

ARTIFACTS = "artifacts"  # the folder of them
# KFP takes the oldest entry that fits, so what a run without cache makes is never found again.
ANEW = (
    "KFP's cache still names it, and goes on doing so after a run without cache; a run with "
    "another where_code_version makes everything anew"
)


class Place(ABC):
    """A place for artifacts; as a context, it leaves no staging folder behind."""

    @abstractmethod
    def stage(self, step: str) -> Path:
        """A path for a new artifact, with room beside it; `publish` makes it visible.

        Args:
            step: for the name of the folder.

        Raises:
            UserError: it cannot be written there.
        """

    @abstractmethod
    def publish(self, staged: Path) -> Pointer:
        """Move an artifact that a step wrote at a path from `stage` to where readers look.

        Raises:
            UserError: there is no artifact, or it cannot be written.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove what was staged and not published."""

    @classmethod
    @abstractmethod
    def fetch(cls, pointer: Pointer, folder: Path) -> Path:
        """See `flagscale.shared.fetch`."""

    @classmethod
    @abstractmethod
    def manifest(cls, pointer: Pointer) -> Manifest:
        """See `flagscale.shared.manifest_of`."""

    @classmethod
    @abstractmethod
    def damage(cls, pointer: Pointer) -> str | None:
        """See `flagscale.shared.damage`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def name_of(manifest: Manifest) -> str:
    """The folder of an artifact: equal content, equal name."""
    return f"{manifest.kind}-{manifest.digest.removeprefix('sha256:')[:16]}"


def pointer_to(staged: Path, manifest: Manifest, location: str) -> Pointer:
    """The pointer to a staged artifact that is, or will be, at `location`."""
    size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    return Pointer(manifest.kind, manifest.digest, location, size)


def staged_manifest(staged: Path) -> Manifest:
    """The manifest of what a step wrote.

    Raises:
        UserError: it wrote nothing.
    """
    if not (staged / MANIFEST).is_file():
        raise UserError(f"{staged}: the step ended without writing its artifact here")
    return read_manifest(staged)


def check_digest(folder: Path, pointer: Pointer) -> None:
    """Refuse an artifact that is not the one which was pointed to.

    Raises:
        UserError: its manifest cannot be read, or is another one.
    """
    found = read_manifest(folder).digest
    if found != pointer.digest:
        raise UserError(
            f"{pointer.location}: is not the {pointer.kind} that was written there: its digest is "
            f"{found}, the pointer says {pointer.digest}; {ANEW}"
        )


def missing(pointer: Pointer, hint: str) -> UserError:
    """The error for a pointer to nothing."""
    return UserError(f"nothing is left at {pointer.location}: {hint}; or it was deleted: {ANEW}")
