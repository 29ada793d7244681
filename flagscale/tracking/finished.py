"""Evaluations that pipeline runs have left in MLflow: what runs are compared by."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagscale.errors import UserError
from flagscale.secrets import hide_in_urls
from flagscale.tracking.names import CACHED_TAG, PARENT_TAG, PROCESS_TAG
from flagscale.tracking.server import (
    children_of,
    find_run,
    make_client,
    quick_to_give_up,
    tracking_uri,
    unusable,
)

EVALUATE = "evaluate"
_OF_ALL = ("data.", "teacher.", "evaluation.")  # parameters that a run's students share
_MOST_RUNS = 50_000


@dataclass
class Evaluated:
    """A student that a run has measured.

    Attributes:
        run_id: of the step `evaluate` that did the work; served from a cache, the original's.
        name: of the pipeline's run.
        pipelines: ids of all pipeline runs that have it, the oldest first.
        started: when the measuring began, ms.
        params: `section.field` -> value, as the pipeline's steps logged them: of the sections that
            all its students share.
        figures: what other steps found of this student: step -> figure -> value.
        steps: other steps that worked on this student: step -> id of the run that did the work.
    """

    run_id: str
    name: str
    pipelines: list[str]
    started: int
    params: dict[str, str]
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)


@dataclass
class _Family:
    """What a pipeline's run and its steps say of all its students, or of its only one."""

    name: str
    params: dict[str, str] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)


class History:
    """The finished pipeline runs of a tracking server.

    Args:
        runs: folder of `mlflow.db`, read unless `MLFLOW_TRACKING_URI` is set.

    Raises:
        UserError: the server does not answer, or refuses, within seconds.
    """

    def __init__(self, runs: Path) -> None:
        database = runs.absolute() / "mlflow.db"
        uri = tracking_uri()
        if not uri and not database.exists():
            raise UserError(
                f"{database}: no runs are tracked there; say where with --runs, or set "
                "MLFLOW_TRACKING_URI"
            )
        self._uri = uri or f"sqlite:///{database}"
        self._client = self._ask(make_client, self._uri)

    @property
    def place(self) -> str:
        """Where it reads, without a password."""
        return hide_in_urls(self._uri)

    def of_experiment(self, name: str) -> list[Evaluated]:
        """All students that an experiment's finished steps have measured, the oldest first.

        Raises:
            UserError: there is no such experiment, or nothing in it.
        """
        experiment = self._ask(self._client.get_experiment_by_name, name)
        if experiment is None:
            known = sorted(one.name for one in self._ask(self._client.search_experiments))
            raise UserError(
                f"experiment {name!r}: there is none at {self.place}; known are {', '.join(known)}"
            )
        query = f"attributes.run_name = '{EVALUATE}' and attributes.status = 'FINISHED'"
        steps = self._search(experiment.experiment_id, query)
        found = self._evaluated([run for run in steps if _is_step(run)])
        if not found:
            raise UserError(f"experiment {name!r} at {self.place}: no run of it was evaluated yet")
        return found

    def of_runs(self, ids: Sequence[str]) -> list[Evaluated]:
        """The students of these runs: of a pipeline, or of its step `evaluate`.

        Raises:
            UserError: there is no such run, or it has not measured exactly one student.
        """
        found = [self._of_run(one) for one in ids]
        if len({one.run_id for one in found}) < len(found):
            raise UserError(
                f"runs {' and '.join(ids)}: have the same evaluation, one of them from the cache: "
                "there is nothing to compare"
            )
        return found

    def download(self, run_id: str, names: Sequence[str], folder: Path) -> dict[str, Path]:
        """Fetch files that a run has logged.

        Args:
            run_id: of the run.
            names: of the files.
            folder: that they are put into.

        Returns:
            Name -> path of those that are there.

        Raises:
            UserError: a file cannot be fetched.
        """
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        there = {file.path for file in self._ask(self._client.list_artifacts, run_id)}
        return {
            name: Path(self._ask(self._client.download_artifacts, run_id, name, str(folder)))
            for name in names
            if name in there
        }

    def _of_run(self, run_id: str) -> Evaluated:
        run = self._ask(find_run, self._client, run_id)
        if run is None:
            raise UserError(f"run {run_id}: there is none at {self.place}")
        steps = [run]
        if not _is_step(run):
            children = self._ask(children_of, self._client, run.info.experiment_id, run_id)
            steps = [child for child in children if _is_step(child)]
        found = self._evaluated(steps)
        if len(found) != 1:
            ids = ", ".join(one.run_id for one in found)
            raise UserError(
                f"run {run_id} ({run.info.run_name}) has measured {len(found)} students"
                + (f": name one of its runs of {EVALUATE}: {ids}" if ids else "")
            )
        return found[0]

    def _evaluated(self, steps: Sequence[Any]) -> list[Evaluated]:
        found: dict[str, Evaluated] = {}
        families: dict[str, _Family] = {"": _Family(EVALUATE)}
        for step in sorted(steps, key=lambda run: (run.info.start_time, run.info.run_id)):
            original = step
            if CACHED_TAG in step.data.tags:
                original = self._ask(find_run, self._client, step.data.tags[CACHED_TAG])
                if original is None:
                    continue  # its figures are here, its documents are not
            parent = self._pipeline(step)
            if parent not in families:
                families[parent] = self._family(step.info.experiment_id, parent)
            family = families[parent]
            known = found.get(original.info.run_id)
            if known is not None:
                known.pipelines.append(parent)
                continue
            found[original.info.run_id] = Evaluated(
                run_id=original.info.run_id,
                name=family.name,
                pipelines=[parent] if parent else [],
                started=int(original.info.start_time),
                params={**family.params, **_shared(original.data.params)},
                figures=family.figures,
                steps=family.steps,
            )
        return list(found.values())

    def _family(self, experiment_id: str, parent: str) -> _Family:
        """Of a pipeline's run.

        A step on a cluster logs its own sections; the run itself has none there.
        """
        run = self._ask(find_run, self._client, parent)
        children = self._ask(children_of, self._client, experiment_id, parent)
        params = _shared(run.data.params) if run is not None else {}
        family = _Family(run.info.run_name if run is not None else parent, params)
        finished = [child for child in children if child.info.status == "FINISHED"]
        is_only_one = sum(map(_is_step, finished)) == 1
        for child in finished:
            params |= _shared(child.data.params)
            if is_only_one:  # else it is not said whose they are
                family.figures[child.info.run_name] = dict(child.data.metrics)
                original = child.data.tags.get(CACHED_TAG, child.info.run_id)
                family.steps[child.info.run_name] = original
        return family

    def _pipeline(self, step: Any) -> str:  # noqa: ANN401 - mlflow's Run
        """Id of the run at the top: below KFP's plugin a step is two levels down."""
        top, above = "", step.data.tags.get(PARENT_TAG)
        while above:
            run = self._ask(find_run, self._client, above)
            if run is None:
                break
            top, above = above, run.data.tags.get(PARENT_TAG)
        return top

    def _search(self, experiment_id: str, query: str) -> list[Any]:
        runs: list[Any] = []
        token: str | None = None
        while len(runs) < _MOST_RUNS:
            page = self._ask(
                lambda token=token: self._client.search_runs(
                    [experiment_id], query, max_results=1000, page_token=token
                )
            )
            runs += page
            token = page.token
            if not token:
                break
        return runs

    def _ask(self, call: Any, *arguments: Any) -> Any:  # noqa: ANN401 - MLflow's
        try:
            with quick_to_give_up():
                return call(*arguments)
        except Exception as error:  # MLflow and its databases raise many kinds
            raise unusable(self._uri, error) from error


def _is_step(run: Any) -> bool:  # noqa: ANN401 - mlflow's Run
    """Whether it is of a step that has evaluated, and not KFP's plugin's run of the same name."""
    ours = PROCESS_TAG in run.data.tags or CACHED_TAG in run.data.tags
    return bool(ours and (run.info.run_name, run.info.status) == (EVALUATE, "FINISHED"))


def _shared(params: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in params.items() if name.startswith(_OF_ALL)}
