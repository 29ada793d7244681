"""lm-eval's tasks, asked of one model after the other, and their results side by side."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flagscale.evaluation.tasks.finding import Tasks
from flagscale.evaluation.tasks.scores import TaskScores
from flagscale.recipe import TasksRecipe

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

logger = logging.getLogger(__name__)

# For standard errors of what is no mean (perplexity); lm-eval's own 100,000 take minutes.
BOOTSTRAP_ITERS = 1000
_NO_FILTER = "none"
_ONE_PROCESS = "DISABLE_MULTIPROC"  # a variable of lm-eval's


def ask(lm: LM, tasks: Tasks, settings: TasksRecipe) -> dict[str, Any]:
    """Ask one model all tasks.

    Args:
        lm: the model.
        tasks: of `load_tasks`; the same for every model.
        settings: the recipe's section.

    Returns:
        What lm-eval's `simple_evaluate` does, without what it finds out of the machine by starting
        other programs. Only on the first rank; elsewhere nothing.
    """
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    for task in tasks.tasks.values():
        own = task.get_config("num_fewshot")
        if own != 0:  # which is a task's own, and stays
            count = own if settings.num_fewshot is None else settings.num_fewshot
            task.set_config(key="num_fewshot", value=count or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _no_other_processes():
        found: dict[str, Any] | None = evaluate(
            lm=lm,
            task_dict={"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)},
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
            bootstrap_iters=BOOTSTRAP_ITERS,
        )
    return found or {}


@contextlib.contextmanager
def _no_other_processes() -> Iterator[None]:
    """Let lm-eval resample in this process: forks of one that holds models and threads may hang."""
    before = os.environ.get(_ONE_PROCESS)
    os.environ[_ONE_PROCESS] = "1"
    try:
        yield
    finally:
        os.environ.pop(_ONE_PROCESS)
        if before is not None:
            os.environ[_ONE_PROCESS] = before


def scores(tasks: Tasks, results: Mapping[str, Mapping[str, Any]]) -> tuple[TaskScores, ...]:
    """Put the models' results side by side.

    Args:
        tasks: that were asked.
        results: model -> what `ask` returned.

    Returns:
        The scores, groups before their tasks. A metric of which lm-eval does not know whether more
        of it is better is left out, and named in the log.
    """
    found: list[TaskScores] = []
    for name, group in tasks.groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        listed = list(group.aggregate_metric_list or ())
        sized = {one.metric for one in listed if one.weight_by_size and one.aggregation == "mean"}
        order = [one.metric for one in listed]
        found += _metrics(name, members, order, sized.__contains__, results)
    for name, task in tasks.tasks.items():
        order = [str(one["metric"]) for one in task.get_config("metric_list") or ()]
        found += _metrics(name, [name], order, _is_mean(task), results)
    return tuple(found)


def _is_mean(task: Task) -> Callable[[str], bool]:
    from lm_eval.api.metrics import mean

    aggregations = task.aggregation()
    return lambda metric: aggregations.get(metric, mean) is mean  # lm-eval's own default


def _metrics(
    name: str,
    members: Sequence[str],
    order: Sequence[str],
    is_mean: Callable[[str], bool],
    results: Mapping[str, Mapping[str, Any]],
) -> list[TaskScores]:
    """One of each metric and filter of a task or a group, as `order` has the metrics."""
    first = next(iter(results.values()))
    examples = _examples(members, first)
    for model, result in results.items():
        if _examples(members, result) != examples:
            raise RuntimeError(
                f"{name}: {model} was asked other examples than {next(iter(results))}"
            )
    better = first["higher_is_better"].get(name, {})
    found = []
    for metric, filter_name in _keys(first["results"][name], order):
        higher_is_better = _higher_is_better(metric, better)
        if higher_is_better is None:
            logger.warning(
                "%s: lm-eval does not say whether more of %s is better; it is left out; say "
                "higher_is_better in the task's metric_list",
                *(name, metric),
            )
            continue
        values = {
            model: _values(members, metric, filter_name, result)
            for model, result in results.items()
        }
        reported = {
            model: _reported(result["results"][name], metric, filter_name)
            for model, result in results.items()
        }
        is_kept = is_mean(metric) and all(
            one is not None and math.isclose(one.mean(), reported[model][0], abs_tol=1e-9)
            for model, one in values.items()
        )
        found.append(
            TaskScores(
                task=name,
                metric=metric if filter_name == _NO_FILTER else f"{metric}:{filter_name}",
                higher_is_better=higher_is_better,
                examples=examples,
                values={m: v for m, v in values.items() if v is not None} if is_kept else {},
                reported=reported,
            )
        )
    return found


def _keys(result: Mapping[str, Any], order: Sequence[str]) -> list[tuple[str, str]]:
    """Metrics and their filters, as the task lists the metrics; others come last."""
    pairs = [key.partition(",")[::2] for key in result if "," in key]
    listed = {metric: place for place, metric in reversed(list(enumerate(order)))}
    return sorted(
        (pair for pair in pairs if not pair[0].endswith("_stderr")),
        key=lambda pair: listed.get(pair[0], len(listed)),
    )


def _higher_is_better(metric: str, told: Mapping[str, Any]) -> bool | None:
    from lm_eval.api.registry import is_higher_better

    said = told.get(metric)
    if said is None:
        try:
            said = is_higher_better(metric)
        except KeyError:
            return None
    return None if said is None else bool(said)


def _samples(
    members: Sequence[str], filter_name: str | None, result: Mapping[str, Any]
) -> list[Any]:
    """Of one filter; None: of the first that there is."""
    found = []
    for member in members:
        samples = result["samples"][member]
        chosen = filter_name or (samples[0]["filter"] if samples else None)
        own = [sample for sample in samples if sample["filter"] == chosen]
        found += sorted(own, key=lambda sample: sample["doc_id"])
    return found


def _examples(members: Sequence[str], result: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sample["doc_hash"] for sample in _samples(members, None, result))


def _values(
    members: Sequence[str], metric: str, filter_name: str, result: Mapping[str, Any]
) -> np.ndarray | None:
    """The metric of each example; None where it is no number, or not there for each of them."""
    values = [sample.get(metric) for sample in _samples(members, filter_name, result)]
    if len(values) != len(_samples(members, None, result)) or not values:
        return None
    if not all(isinstance(value, bool | int | float | np.number | np.bool_) for value in values):
        return None
    return np.array(values, dtype=np.float64)


def _reported(
    result: Mapping[str, Any], metric: str, filter_name: str
) -> tuple[float, float | None]:
    value, stderr = float(result[f"{metric},{filter_name}"]), None
    told = result.get(f"{metric}_stderr,{filter_name}")  # "N/A" where there is none
    if isinstance(told, int | float | np.number) and math.isfinite(told):
        stderr = float(told)
    return value, stderr
