"""The first step of every pipeline: a mistake in a run's values ends it before a GPU is asked for.

It needs seconds and neither torch nor transformers, unless tasks of lm-eval's are named: whether
their data can be had is looked at now, and not when the student is trained. Its outputs are the
sections that all other steps work by, so that none of them begins before.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flagscale.recipe import TasksRecipe
from flagscale.run_values import LISTS, MEASURED, MET, SECTIONS, Made, check_run
from flagscale.run_values.literal import carried, literal

logger = logging.getLogger(__name__)


def check_recipe(made: Made, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Check a run as `python -m pipelines submit` does, with the same words.

    Args:
        made: the pipeline.
        arguments: the component's as KFP carries them, by name: the pipeline's parameters are among
            them.

    Returns:
        The recipe's sections, then a sweep's variants and a search's candidates, those of their
        students that measure layers, and what trainings meet of teacher outputs, as KFP can carry
        them; empty for what this pipeline does not have.

    Raises:
        UserError: what is wrong.
    """
    checked = check_run(made, {name: literal(arguments[name]) for name in made.parameters})
    if made.evaluates_tasks:
        _check_tasks(TasksRecipe.model_validate(checked["tasks"]))
    logger.info("recipe %s: %d parameters are right", made.recipe["name"], len(made.parameters))
    found = (
        *(checked.get(name, {}) for name in SECTIONS),
        *(checked.get(name, []) for name in LISTS),
        checked.get(MEASURED, []),
        checked.get(MET, {}),
    )
    return tuple(carried(value) for value in found)


def _check_tasks(tasks: TasksRecipe) -> None:
    """Load them, but for those that are made of a dataset, which is not there yet.

    Raises:
        UserError: lm-eval is not installed, a task is not known, or its data cannot be had.
    """
    from flagscale.evaluation.tasks.finding import check_installed, load_tasks, tasks_folder

    check_installed()
    if tasks.needs_lm_eval_tasks:
        with tempfile.TemporaryDirectory(prefix="flagscale-check-") as scratch:
            load_tasks(tasks, tasks_folder(tasks, Path(scratch)))
