"""Artifacts that are not there, and why: how one of many students fails without ending the run.

KFP ends a loop, and all that waits for it, with the first task that fails. So a step of a sweep or
a search that fails ends well, and writes an artifact of kind `absent` where its own was to be. A
step that is given one passes it on. Whoever compares the students tells of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flagscale.artifacts import MANIFEST, Manifest, new_artifact, read_manifest
from flagscale.errors import UserError

KIND = "absent"


class AbsentInputError(UserError):
    """An input of the step is absent.

    Attributes:
        manifest: of it.
    """

    def __init__(self, name: str, manifest: Manifest) -> None:
        super().__init__(f"input {name}: there is none: {reason(manifest)}")
        self.manifest = manifest


def absent(path: Path) -> Manifest | None:
    """The manifest of an absent artifact; None if there is one, or something else."""
    try:
        kind = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return read_manifest(path) if kind == KIND else None


def reason(manifest: Manifest) -> str:
    """Which step failed, and with which error."""
    return f"{manifest.facts['step']}: {manifest.facts['error']}"


def is_empty(manifest: Manifest) -> bool:
    """Whether nothing failed: there was nothing to do."""
    return bool(manifest.facts.get("empty"))


def write_absent(
    path: Path,
    step: str,
    error: str,
    recipe: dict[str, Any],
    *,
    empty: bool = False,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Say at `path` that there is no artifact.

    Args:
        path: where it was to be.
        step: that was to make it.
        error: why it did not.
        recipe: what it was to be made of: sections, as plain values.
        empty: nothing failed: there was nothing to do.
        files: name -> content of what is kept with it, e.g. logs.
    """
    with new_artifact(path, KIND, recipe) as staging:
        for name, content in (files or {}).items():
            (staging.path / name).parent.mkdir(parents=True, exist_ok=True)
            (staging.path / name).write_bytes(content)
        staging.facts = {"step": step, "error": error, "empty": empty}


def pass_on(path: Path, given: Manifest, recipe: dict[str, Any]) -> None:
    """Say at `path` what an absent input says."""
    facts = given.facts
    own = {**given.recipe, **recipe}
    write_absent(path, facts["step"], facts["error"], own, empty=is_empty(given))
