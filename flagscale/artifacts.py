"""Artifacts: folders with a `manifest.json` that says what they are, written atomically.

A step writes through `new_artifact`, which gives it a staging folder beside the final one and, if
the step succeeds, hashes the files, writes the manifest last and renames the folder into place.
A step that dies leaves nothing at the final path. A step reads through `open_artifact`, which
refuses a folder that is incomplete, of another kind, or changed since it was written.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flagscale import processes
from flagscale.code_version import code_version
from flagscale.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_LONGEST_FACT = 4_000  # characters, of what an artifact says of those it was made of
_LIBRARIES = ("torch", "megatron-core", "nvidia-modelopt", "transformers", "numpy")


@dataclass(frozen=True)
class Manifest:
    """What an artifact is.

    Attributes:
        kind: `dataset`, `teacher`, `teacher-outputs`, `layer-importance`, `student`,
            `distilled-student`, `evaluation`, `task-evaluation`, `leaderboard`, `candidate`,
            `search`, `export`, `promotion`, or `absent` where there is none.
        recipe: the sections of the recipe that the step was given.
        parents: name of an input artifact -> its `digest`.
        files: path inside the folder -> `sha256:<hex>`.
        facts: what the step found out: counts, shapes, proofs, figures.
        tokenizer_hash: digest of the tokenizer's files, equal wherever vocabularies agree.
        libraries: versions of what wrote it.
        format_version: of this manifest.
        peak_memory: the most that the step's ranks held, bytes by rank: `host`, `device`.
        code: what wrote it: the release, and a digest of its sources.
        ancestors: digest -> what is known of each artifact that it was made of, its parents' own
            ones too: the manifest without `files`, costs, `ancestors` and long facts.
        energy: what they took, `joules` by rank, and `from`, how that is known.
    """

    kind: str
    recipe: dict[str, Any]
    parents: dict[str, str]
    files: dict[str, str]
    facts: dict[str, Any]
    tokenizer_hash: str | None
    libraries: dict[str, str]
    format_version: int = FORMAT_VERSION
    peak_memory: dict[str, list[int]] = field(default_factory=dict)
    code: str = ""
    ancestors: dict[str, dict[str, Any]] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identity of the content: files, facts and origin, not time, place or cost.

        Nor of what `parents` stand for already, nor the code: the same content is the same.
        """
        apart = ("peak_memory", "energy", "code", "ancestors")
        return digest({k: v for k, v in asdict(self).items() if k not in apart})

    def lineage(self) -> dict[str, dict[str, Any]]:
        """What those that are made of it say of it and its ancestors, as `ancestors`."""
        values = asdict(self)
        for name in ("files", "peak_memory", "energy", "ancestors", "format_version"):
            del values[name]
        values["facts"] = {
            name: fact
            for name, fact in self.facts.items()
            if len(json.dumps(fact, default=str)) <= _LONGEST_FACT
        }
        return {**self.ancestors, self.digest: values}


@dataclass
class Staging:
    """A folder that is being written. Fill `path`, and what of its manifest a step knows."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    tokenizer_hash: str | None = None
    peak_memory: dict[str, list[int]] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None


@contextmanager
def new_artifact(
    output: Path,
    kind: str,
    recipe: dict[str, Any],
    parents: dict[str, Manifest] | None = None,
    log: Callable[[Path], object] | None = None,
) -> Iterator[Staging]:
    """Write an artifact at `output`; on success `staging.manifest` holds its manifest.

    Args:
        output: final folder; what stands there is replaced.
        kind: what the artifact is.
        recipe: name of a section -> the section as plain values.
        parents: manifests of the inputs, by name.
        log: given the manifest's path when the artifact is in place; must not raise.

    Raises:
        UserError: the disk is full. Nothing is left behind, whatever is raised.
    """
    staging = Staging(staging_path(output))
    shutil.rmtree(staging.path, ignore_errors=True)
    try:
        staging.path.mkdir(parents=True)
        yield staging
        manifest = Manifest(
            kind=kind,
            recipe=recipe,
            parents={name: parent.digest for name, parent in (parents or {}).items()},
            files=hash_files(staging.path),
            facts=staging.facts,
            tokenizer_hash=staging.tokenizer_hash,
            libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
            peak_memory=staging.peak_memory or {"host": [processes.peak_memory()]},
            code=code_version(),
            ancestors=_merged(parent.lineage() for parent in (parents or {}).values()),
            energy=staging.energy,
        )
        write_json(staging.path / MANIFEST, asdict(manifest))
        shutil.rmtree(output, ignore_errors=True)
        os.replace(staging.path, output)
        staging.manifest = manifest
        if log is not None:
            log(output / MANIFEST)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(output) from error
        raise
    finally:
        shutil.rmtree(staging.path, ignore_errors=True)


def _merged(lineages: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {key: value for lineage in lineages for key, value in lineage.items()}


def staging_path(output: Path) -> Path:
    """Where the artifact of `output` is written before it is renamed."""
    return output.with_name(f".{output.name}.partial")


def open_artifact(path: Path, kind: str, check_files: bool = True) -> Manifest:
    """Check an artifact and return its manifest.

    Args:
        path: its folder.
        kind: what it must be.
        check_files: compare every file's hash.

    Raises:
        UserError: no such folder, an unfinished or changed one, or one of another kind.
    """
    manifest = read_manifest(path, kind)
    if manifest.kind != kind:
        raise UserError(f"{path}: is a {manifest.kind!r}, but a {kind!r} is needed")
    if check_files:
        check_names(path, manifest)
        for file in manifest.files:
            check_file(path, manifest, file)
    return manifest


def check_names(path: Path, manifest: Manifest) -> None:
    """Make sure that an artifact has the files of its manifest, and no others.

    Raises:
        UserError: which it lacks, or has.
    """
    changed = {file.relative_to(path).as_posix() for file in _files(path)} ^ set(manifest.files)
    if changed:
        raise _changed(path, manifest, min(changed))


def check_file(path: Path, manifest: Manifest, file: str) -> None:
    """Compare one file of an artifact with its manifest.

    Raises:
        UserError: it is another.
    """
    if _hash(path / file) != manifest.files[file]:
        raise _changed(path, manifest, file)


def _changed(path: Path, manifest: Manifest, file: str) -> UserError:
    return UserError(f"{path}: {file} is missing or changed; make the {manifest.kind} anew")


def read_manifest(path: Path, kind: str = "artifact") -> Manifest:
    """The manifest of the artifact at `path`, as it stands there.

    Args:
        path: its folder.
        kind: what is expected, for the message.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        values = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**values)
    except FileNotFoundError:
        raise UserError(f"{path}: no {kind} here ({MANIFEST} is missing)") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path / MANIFEST}: not a manifest: {error}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {manifest.format_version}, this program reads "
            f"{FORMAT_VERSION}; make it anew"
        )
    return manifest


def hash_files(folder: Path) -> dict[str, str]:
    """Relative path -> `sha256:<hex>` of every file below `folder` but the manifest."""
    return {path.relative_to(folder).as_posix(): _hash(path) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def digest(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """`sha256:<hex>` of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write `value` atomically, readable by people."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def flush(folder: Path, deep: bool = True) -> None:
    """Onto the disk: what is in the folder, and the folder's own list of names.

    Args:
        folder: of files and folders.
        deep: False for the list of names alone.
    """
    for path in (*(folder.rglob("*") if deep else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # file systems of the network may know this of files only
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that the disk or the quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def disk_full(path: Path) -> UserError:
    """The error for a full disk, with what is free."""
    folder = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(folder).free / 2**20
    return UserError(f"no space left on the disk of {folder} ({free:.0f} MiB free); free some")
