"""Finds the tasks of EleutherAI's lm-evaluation-harness (lm-eval), and reads their data.

lm-eval is the extra `tasks` of this package, and is imported when a task is asked for.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.patience import patiently
from flagscale.recipe import TasksRecipe, strict_yaml
from flagscale.recipe.tasks import HELDOUT_TASKS
from flagscale.shared.store import ObjectStore, is_url

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Tasks:
    """What is asked.

    Attributes:
        asked: names of tasks and groups, in the recipe's order; what a tag is on one by one.
        tasks: every single task by name, those of groups among them.
        groups: every group by name.
    """

    asked: tuple[str, ...]
    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]


def check_installed() -> None:
    """Make sure that there is lm-eval.

    Raises:
        UserError: how to get it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "tasks: lm-eval is not installed; pip install 'flagscale-distillation[tasks]', or take "
            "an image that was built with it (TASKS=tasks, as it is by default)"
        )


def load_tasks(tasks: TasksRecipe, folder: Path | None, heldout: Path | None = None) -> Tasks:
    """Find all tasks and read their data, which lm-eval does together.

    Args:
        tasks: the recipe's section.
        folder: what is at `tasks.include_path`, on this machine.
        heldout: the folder of `write_heldout_tasks`, in which they are cached too; None: such tasks
            are left out.

    Raises:
        UserError: a task is not known, or its data cannot be had.
    """
    check_installed()
    from lm_eval.tasks import TaskManager

    wanted = [name for name in tasks.names if name not in HELDOUT_TASKS]
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(wanted) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # 13,000 tasks: 15 s
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise UserError(_unknown(unknown[0], [*HELDOUT_TASKS, *manager.all_tasks]))
    specs: dict[str, str | dict[str, Any]] = {name: name for name in wanted}
    for name in tasks.names:
        if name in HELDOUT_TASKS and heldout is not None:
            specs[name] = _heldout(heldout, name)
    for text in tasks.own:
        values = strict_yaml.load(text)
        specs[values["task"]] = values
    order = [name for name in (*tasks.names, *specs) if name in specs]
    asked: dict[str, Task | Group] = {}
    for name in dict.fromkeys(order):
        asked |= _load(manager, name, specs[name])
    try:
        whole = manager.load(list(asked.values()))
    except ValueError as error:  # a task of two groups
        raise UserError(f"tasks.names: {error}; leave one of them out") from error
    return Tasks(tuple(asked), whole["tasks"], whole["groups"])


def tasks_folder(tasks: TasksRecipe, scratch: Path) -> Path | None:
    """What is at `tasks.include_path`, on this machine.

    Args:
        tasks: the recipe's section.
        scratch: to which it is copied from an object store.

    Raises:
        UserError: there is no such folder.
    """
    place = tasks.include_path
    if place is None:
        return None
    if is_url(place):
        store, folder = ObjectStore(place), scratch / "include"
        store.get({name: folder / name for name in store.sizes()})
    else:
        folder = Path(place).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"tasks.include_path={place}: no such folder here; it must be where the steps' pods "
            "see it, or in an object store"
        )
    return folder


def _heldout(folder: Path, name: str) -> dict[str, Any]:
    """As its YAML says, but for the place of its file."""
    values: dict[str, Any] = strict_yaml.load((folder / f"{name}.yaml").read_text("utf-8"))
    files = values["dataset_kwargs"]["data_files"]
    values["dataset_kwargs"] = {
        "data_files": {split: str((folder / file).absolute()) for split, file in files.items()},
        "cache_dir": str(folder / "cache"),
    }
    return values


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"tasks.names: lm-eval knows no task {name!r}{hint}"


def _load(manager: TaskManager, name: str, spec: str | dict[str, Any]) -> dict[str, Task | Group]:
    """A task, a group, or what a tag is on."""
    try:
        found = patiently(lambda: manager.load([spec]), f"load the task {name}", is_hub_away)
    except Exception as error:  # whatever hub, datasets and a task's own code raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(
            f"tasks: {name} cannot be loaded: {type(error).__name__}: {reason}; where its data "
            "cannot be reached, leave it out or name files of your own in a task of tasks.own"
        ) from error
    inside = {child for children in found["group_map"].values() for child in children}
    every = {**found["groups"], **found["tasks"]}
    return {name: item for name, item in every.items() if name not in inside}
