"""The search: many students trained a little, the better ones a little more, the best to the end.

    check-recipe
    prepare-data, prepare-teacher, cache-teacher where trainings read its outputs
    measure-layers where several candidates measure which of the teacher's layers can go
    rung 1: for each candidate, at most `search.parallelism` at a time:
        convert-student, distil-student (to the rung's step)
    rank-candidates
    rung 2: for each slot:
        pick-candidate, distil-student (on from its checkpoint, to the rung's step)
    rank-candidates
    ...
    pick-candidate, distil-student (on, to the end), evaluate, export-student,
    evaluate-tasks where tasks are named, promote where the recipe says what a student must show

A recipe with the section `search` gives it; `run`, `compile`, `submit` and `schedule` take such a
recipe like any other. KFP has no loop over a number that is known only at run time beyond a
parameter, and none whose tasks could be given what another loop's tasks have made, one by one. But
how many candidates a rung has at most follows from the recipe: each rung is a loop over so many
slots. Slot i takes the i-th best that the ranking before names, by a pointer to its student; a slot
too many ends at once. All distil-student tasks of a candidate are one training, stopped and resumed
by its checkpoints.

A candidate that fails does not end the run (`flagscale.execution.absent`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.deployment.export_student.component import export_student
from components.evaluation.rank_candidates.component import rank_candidates
from components.monitoring.record_many.component import record_many
from components.training.pick_candidate.component import pick_candidate
from flagscale.recipe import Recipe, TasksRecipe
from flagscale.recipe.search import RankingRecipe, SearchRecipe, ranking_metrics, ranking_tasks
from pipelines import form, placement
from pipelines.parameters import Parameter, make_pipeline
from pipelines.placement import Placement
from pipelines.platform import Platform
from pipelines.wiring import (
    Rung,
    always,
    ask_tasks,
    cache,
    check,
    convert,
    decide,
    figures,
    judge,
    measure,
    place_record,
    prepare,
    reads,
    train,
)

_AT_A_TIME_HERE = 1  # on this machine one training takes all cores
Channel = Any  # KFP's


def build_search(recipe: Recipe, platform: Platform | None, code_version: str) -> BaseComponent:
    """The search's pipeline, with the recipe's candidates as a default; see `build_pipeline`.

    Args:
        recipe: resolved, with a search.
        platform: None for this machine, which takes one candidate after another.
        code_version: see `build_pipeline`.

    Raises:
        UserError: the platform cannot hold a candidate's training, or keeps no checkpoints.
    """
    search = recipe.search
    assert search is not None, "build_pipeline looks"
    if platform is not None:
        placement.check(platform, recipe)
        for candidate in recipe.variants:
            placement.check(platform, candidate.recipe)
    candidates = [{"name": one.name, "student": one.sections["student"]} for one in recipe.variants]
    parameters = form.parameters(
        recipe,
        platform,
        code_version,
        more=[
            Parameter("search_candidates", candidates, "each a name and a section student"),
            Parameter(
                "search_metric", search.metric, "held-out loss that ranks", ranking_metrics(search)
            ),
        ],
    )
    made = form.made(recipe, platform, [parameter.name for parameter in parameters])
    form.check_size(made, {parameter.name: parameter.default for parameter in parameters})

    def wire(values: Mapping[str, Any]) -> None:
        placed = Placement(platform, recipe, values)
        checked = check(values, placed, made)
        # As in a sweep: the local runner loops over no step's output that has a name.
        tasks = ranking_tasks(search, recipe.tasks)
        _Wiring(search, tasks, checked, checked if platform else values, placed).wire()

    return make_pipeline(
        name="distillation-search",
        display_name=f"Search: {recipe.name}",
        description="Searches for the best of several students of a teacher, and distils it.",
        parameters=parameters,
        wire=wire,
        config=placement.pipeline_config(platform),
    )


class _Wiring:
    """Makes the tasks of a search."""

    def __init__(
        self,
        search: SearchRecipe,
        tasks: TasksRecipe,
        values: Mapping[str, Any],
        looped: Mapping[str, Any],
        placed: Placement,
    ) -> None:
        self._search, self._values, self._looped = search, values, looped
        self._placed = placed
        asked = tasks.model_dump(mode="json", exclude_defaults=True) if tasks.is_asked else {}
        self._tasks = asked
        self._slots = search.slots_of(search.count)
        self._parallelism = search.parallelism if placed.on_a_cluster else _AT_A_TIME_HERE
        self._figures: dict[str, Channel] = {}

    def wire(self) -> None:
        """Make them all."""
        values, placed = self._values, self._placed
        dataset, teacher = prepare(values, placed)
        outputs = cache(values, placed, dataset, teacher) if placed.caches_teacher else None
        read = reads(dataset, teacher, outputs)
        measured = measure(values, placed, dataset, teacher)
        results = self._first_rung(dataset, teacher, measured, read)
        ranked = self._rank(1, results, None)
        for number in range(2, len(self._search.rungs) + 1):
            results = self._rung(number, ranked, read)
            ranked = self._rank(number, results, ranked)
        student = self._pick(1, ranked, values)
        distilled = train(values, placed, student, read)
        evaluation = judge(values, placed, dataset, teacher, student, distilled)
        exported = export_student(
            export_recipe=values["export"],
            models_recipe=values["models"],
            distilled_student=distilled,
            evaluation=evaluation,
            **always(values, "models"),
        )
        shipped = placed.place(exported, "models", "Export student").outputs["exported_student"]
        tasks = ask_tasks(values, placed, dataset, teacher, evaluation, shipped)
        decide(values, placed, evaluation, exported, tasks)
        if placed.on_a_cluster:
            given = figures(values, placed, "rank-candidates", "export-student")
            for of_winner in ("training_metrics", "evaluation_metrics"):
                given[f"winner_{of_winner}"] = given.pop(of_winner)
            place_record(record_many(ranking=ranked, **{**given, **self._figures}), placed)

    def _first_rung(
        self,
        dataset: Channel,
        teacher: Channel,
        measured: Mapping[str, Channel],
        read: Mapping[str, Channel],
    ) -> Channel:
        with dsl.ParallelFor(
            self._looped["search_candidates"], name="rung 1", parallelism=self._parallelism
        ) as candidate:
            own = {**self._looped, "student": candidate.student}
            student = convert(own, self._placed, dataset, teacher, measured, record_failure=True)
            result = train(self._looped, self._placed, student, read, self._rung_of(1))
        given = figures(self._values, self._placed)
        self._figures = {
            "student_metrics": dsl.Collected(given["student_metrics"]),
            "training_metrics": dsl.Collected(given["training_metrics"]),
        }
        return dsl.Collected(result)

    def _rung(self, number: int, ranked: Channel, read: Mapping[str, Channel]) -> Channel:
        slots = [{"slot": slot + 1} for slot in range(self._slots[number - 1])]
        with dsl.ParallelFor(slots, name=f"rung {number}", parallelism=self._parallelism) as one:
            student = self._pick(one.slot, ranked, self._looped)
            result = train(self._looped, self._placed, student, read, self._rung_of(number))
        return dsl.Collected(result)

    def _pick(self, slot: Any, ranked: Channel, values: Mapping[str, Any]) -> Channel:  # noqa: ANN401
        picked = pick_candidate(slot=slot, search=ranked, **always(values))
        self._placed.place(picked, "data", "Pick candidate", small=True)
        return picked.outputs["student"]

    def _rank(self, number: int, results: Channel, before: Channel | None) -> Channel:
        search, values = self._search, self._values
        following = [*self._slots[1:], 1]
        ends = [rung.end for rung in search.rungs]
        ranked = rank_candidates(
            candidates=values["search_candidates"],
            ranking_recipe=RankingRecipe(
                rung=number,
                slots=following[number - 1],
                next_step=[*ends[1:], 0][number - 1],
                bootstrap_samples=search.bootstrap_samples,
                confidence=search.confidence,
                margin=search.margin,
            ).model_dump(mode="json"),
            metric=values["search_metric"],
            checkpoints=values["training_checkpoints"],
            results=results,
            **({} if before is None else {"before": before}),
            **always(values),
        )
        title = f"Rank candidates, rung {number}"
        return self._placed.place(ranked, "data", title).outputs["search"]

    def _rung_of(self, number: int) -> Rung:
        return Rung(self._search.rungs[number - 1].end, self._search.samples, self._tasks)
