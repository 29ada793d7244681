"""The files of this machine that a recipe names: the steps see these, in containers no others."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from flagscale.errors import UserError
from flagscale.recipe import Recipe

# Sections that may name files; others hold what is any text.
_WITH_FILES = {"data", "teacher", "student", "distillation", "training", "sweep", "search", "tasks"}
LATEST = "latest"  # in the folder of runs: a link to the run that began last
LOCAL_URL = re.compile("^(file|local):(//)?")  # as fsspec reads them


def before_this_run(recipe: Recipe, runs: Path) -> Recipe:
    """The recipe, with what it names by way of `latest` in the run that is so called now.

    A run that begins takes that link over, and would look in its own folder for what an earlier one
    made: a student that is to be the next one's teacher, for one.

    Args:
        recipe: validated.
        runs: folder of all runs, absolute.
    """
    latest = runs / LATEST
    if not latest.is_symlink():
        return recipe
    run = runs / latest.readlink()

    def lasting(text: str) -> str:
        path = Path(os.path.abspath(LOCAL_URL.sub("", text)))
        return str(run / path.relative_to(latest)) if latest in path.parents else text

    before = recipe.model_dump(mode="json", include=_WITH_FILES, exclude_unset=True)
    after = {section: _mapped(values, lasting) for section, values in before.items()}
    if after == before:
        return recipe
    return Recipe.model_validate(recipe.model_dump(mode="json", exclude_unset=True) | after)


def local_files(recipe: Recipe) -> set[str]:
    """Local files and folders that the recipe names, and what links below them point to.

    Raises:
        UserError: one is named relative to a home.
    """
    found: set[str] = set()
    for written in _texts(recipe.model_dump(mode="json", include=_WITH_FILES)):
        text = LOCAL_URL.sub("", written)
        if text.startswith("~"):
            raise UserError(f"{text}: with --image give the path in full; a container has no home")
        for place in _places(text):
            path = Path(os.path.abspath(place))  # not resolved: the step uses this name
            if not text or not path.exists():
                continue
            found.add(str(path))
            found |= {str(p.resolve()) for p in path.rglob("*") if p.is_symlink() and p.exists()}
    return found


def _places(text: str) -> list[str]:
    """What a recipe's text names, if it is a path; a pattern means what it means to the step."""
    if not glob.has_magic(text) or "://" in text:
        return [text]
    found: list[str] = LocalFileSystem().glob(os.path.abspath(text))
    return found


def check_readable(files: Iterable[str], user: int) -> None:
    """What root can read need not be readable to the user of the steps.

    Raises:
        UserError: that user cannot read one of them.
    """
    for place in map(Path, files):
        for path in [place, *place.rglob("*")]:
            if not path.exists():
                continue  # a link to nothing, which the step will not find either
            facts = path.stat()
            wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
            if facts.st_uid != user and facts.st_mode & wanted != wanted:
                raise UserError(
                    f"{path}: user {user}, as whom the steps run when root calls, cannot "
                    "read it: `chmod -R a+rX`, or call as another user"
                )


def _mapped(value: Any, change: Callable[[str], str]) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401 - JSON
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
