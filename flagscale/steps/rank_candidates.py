"""rank-candidates: the end of a rung of a search -> a `search` artifact: who goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flagscale import tracking
from flagscale.artifacts import Manifest, digest, new_artifact, open_artifact, write_json
from flagscale.errors import UserError
from flagscale.evaluation import REPORT, SEARCH, SUMMARY
from flagscale.evaluation.forecast.accounts import CONFIDENCE, curve_of
from flagscale.evaluation.forecast.learning_curve import Forecast
from flagscale.evaluation.forecast.learning_rates import learning_rates
from flagscale.evaluation.search.board import Candidate, SearchBoard, after_rung
from flagscale.evaluation.search.page import render, summary_markdown
from flagscale.evaluation.search.ranking import Losses, places
from flagscale.execution.absent import absent, is_empty, reason
from flagscale.execution.exclusive import delete_unless_held
from flagscale.execution.step_process import when_published
from flagscale.recipe import StudentRecipe, TrainingRecipe, parse_section
from flagscale.recipe.search import LOSSES, RankingRecipe
from flagscale.shared.store import ObjectStore, is_url
from flagscale.steps.leaderboard import changes
from flagscale.steps.search.rung import SAMPLE_LOSSES
from flagscale.tracking.candidates import log_candidates

logger = logging.getLogger(__name__)


def rank_candidates(
    ranking: RankingRecipe,
    metric: str,
    candidates: Sequence[Mapping[str, Any]],
    results: Sequence[Path],
    before: Path | None,
    checkpoints: str,
    output: Path,
) -> dict[str, float]:
    """Rank the candidates of a rung, and say which of them go on.

    Args:
        ranking: which rung, and what decides.
        metric: one of `LOSSES`, or a task that the candidates were asked.
        candidates: all of the search: of each its `name` and its section `student`.
        results: of the rung: `candidate` artifacts, or absent ones, in any order.
        before: the `search` artifact of the rung before; None at the end of the first one.
        checkpoints: folder or URL of their trainings; those of who is dropped are deleted.
        output: folder of the `search` artifact: search.json, report.html, summary.md.

    Returns:
        How many go on, were dropped and failed so far, and the loss of the best.

    Raises:
        UserError: every candidate failed, or they cannot be compared.
    """
    known = _standing(candidates, before)
    given = _by_number(results, known)
    found = dict(known.by_number)
    for number, one in known.by_number.items():
        if number in given:
            found[number] = _updated(one, given[number])
        elif one.status == "goes on":
            why = f"rung {ranking.rung}: no result of it was given"
            found[number] = replace(one, status="failed", why=why)
    measured = {n: path for n, path in given.items() if found[n].status == "goes on"}
    if not measured:
        errors = "".join(f"\n  {one.name}: {one.why}" for one in found.values() if one.why)
        raise UserError(f"rung {ranking.rung}: no candidate is left:{errors}")
    parents = {found[n].name: open_artifact(path, "candidate") for n, path in measured.items()}
    losses = {number: _losses(path, metric) for number, path in measured.items()}
    ranked = places(
        losses, ranking.slots, ranking.bootstrap_samples, ranking.confidence, ranking.margin
    )
    steps = {n: int(parents[found[n].name].facts["steps"]) for n in measured}
    after = after_rung(list(found.values()), ranked, ranking.rung, steps)
    board = SearchBoard(
        rung=ranking.rung,
        metric=metric,
        confidence=ranking.confidence,
        samples=len(next(iter(losses.values()))),
        candidates=tuple(
            _with_forecasts(one, measured[one.number], metric, ranking.next_step)
            if one.number in measured
            else one
            for one in after
        ),
    )
    if not board.going_on:
        raise UserError(f"rung {ranking.rung}: no candidate has a finite loss")
    given_ranking = {"metric": metric, **ranking.model_dump(mode="json")}
    recipe = {"search": {**given_ranking, "candidates": [dict(one) for one in candidates]}}
    with (
        tracking.step_run("rank-candidates", {"search": given_ranking}, parents=parents) as run,
        new_artifact(output, "search", recipe, parents, run.log_manifest) as staging,
    ):
        write_json(staging.path / SEARCH, board.as_json())
        (staging.path / REPORT).write_text(render(board), encoding="utf-8")
        (staging.path / SUMMARY).write_text(summary_markdown(board), encoding="utf-8")
        figures = _figures(board)
        run.log_headline(figures)
        run.describe((staging.path / SUMMARY).read_text(encoding="utf-8"), pipeline=True)
        for name in (REPORT, SEARCH):
            run.log_artifact(staging.path / name)
    dropped = [one.checkpoints for one in board.candidates if one.status == "dropped"]
    when_published(lambda: _forget(checkpoints, dropped))
    log_candidates(board.as_json())
    _tell(board)
    return figures


class _Known(NamedTuple):
    """The candidates before this rung: by number, and their numbers by their students' recipes."""

    by_number: dict[int, Candidate]
    numbers: dict[str, int]


def _standing(candidates: Sequence[Mapping[str, Any]], before: Path | None) -> _Known:
    sections = {
        str(one["name"]): parse_section(
            StudentRecipe, one["student"], f"candidate {one['name']!r}: student"
        ).model_dump(mode="json")
        for one in candidates
    }
    numbers = {digest(section): n for n, section in enumerate(sections.values(), start=1)}
    if before is not None:
        open_artifact(before, "search")
        board = SearchBoard.from_json(json.loads((before / SEARCH).read_text(encoding="utf-8")))
        return _Known({one.number: one for one in board.candidates}, numbers)
    own = changes({name: {"student": section} for name, section in sections.items()})
    new = (Candidate(n, name, own[name]) for n, name in enumerate(sections, start=1))
    return _Known({one.number: one for one in new}, numbers)


def _by_number(results: Sequence[Path], known: _Known) -> dict[int, Path]:
    """Whose results they are; those of empty slots are nobody's."""
    found: dict[int, Path] = {}
    for path in results:
        failed = absent(path)
        if failed is not None and is_empty(failed):
            continue
        if failed is not None:
            section = failed.recipe.get("student")
        else:
            section = open_artifact(path, "candidate").facts["student recipe"]
        number = known.numbers.get(digest(section))
        if number is None:
            raise UserError(f"{path}: is of no candidate of this search: {section}")
        if number in found:
            name = known.by_number[number].name
            raise UserError(f"{path} and {found[number]}: are both of candidate {name!r}")
        found[number] = path
    return found


def _updated(one: Candidate, path: Path) -> Candidate:
    failed = absent(path)
    if failed is not None:
        return replace(one, status="failed", why=reason(failed))
    return _with_facts(one, path, open_artifact(path, "candidate"))


def _with_facts(one: Candidate, path: Path, manifest: Manifest) -> Candidate:
    facts = manifest.facts
    records = _read_log(path / "training.jsonl")
    key = (
        "logits distillation loss"
        if records and LOSSES["distillation_loss"] in records[0]
        else ("lm loss")
    )
    return replace(
        one,
        status="goes on",
        curve=tuple((record["step"], record[key]) for record in records),
        made=facts["made"],
        tokens=facts["tokens"],
        rank_seconds=facts["rank seconds"],
        tokens_per_second=facts.get("median tokens per second", 0.0),
        student=facts["student"],
        checkpoints=facts["checkpoints"],
    )


def _with_forecasts(one: Candidate, path: Path, metric: str, next_step: int) -> Candidate:
    """With what its losses so far say of the next rung's end and of the training's."""
    if metric not in LOSSES:
        return one  # a score is no loss that falls along a curve
    given = open_artifact(path, "candidate", check_files=False).recipe["training"]
    rates = learning_rates(TrainingRecipe.model_validate(given))
    *before, last = one.points
    try:
        curve = curve_of(
            _read_log(path / "training.jsonl"),
            _read_log(path / "validation.jsonl"),
            rates,
            LOSSES[metric],
            samples={point.step: point.loss["value"] for point in one.points},
            of_samples=True,
        )
    except ValueError as error:
        logger.info("%s: no forecast: %s", one.name, error)
        return one
    steps = [step for step in (next_step, len(rates)) if step > last.step]
    made: tuple[Forecast, ...] = tuple(curve.forecast(step, CONFIDENCE) for step in steps)
    return replace(one, points=(*before, replace(last, forecasts=made)))


def _read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _losses(path: Path, metric: str) -> Losses:
    found = json.loads((path / SAMPLE_LOSSES).read_text(encoding="utf-8"))
    key = LOSSES.get(metric, metric)
    if key not in found:
        raise UserError(f"{path}: has no {key!r} to rank by; it has {', '.join(found)}")
    pairs = found[key]
    return {int(number): (pairs[number][0], pairs[number][1]) for number in sorted(pairs, key=int)}


def _figures(board: SearchBoard) -> dict[str, float]:
    best = board.candidates[0]
    status = [one.status for one in board.candidates]
    return {
        "rung": float(board.rung),
        "going_on": float(status.count("goes on")),
        "dropped": float(status.count("dropped")),
        "failed": float(status.count("failed")),
        "best": float(best.number),
        "best_loss": best.points[-1].loss["value"],
        "tokens": sum(one.tokens for one in board.candidates),
    }


def _tell(board: SearchBoard) -> None:
    for place, one in enumerate(board.candidates, start=1):
        loss = f"{one.points[-1].loss['value']:.4f}" if one.points else "-"
        why = f": {one.why}" if one.why else ""
        logger.info("%2d. %s  %s  %s%s", place, loss, one.name, one.status, why)


def _forget(checkpoints: str, names: Sequence[str]) -> None:
    """Of trainings that do not go on; a failure is only told."""
    for name in names:
        place = f"{checkpoints.rstrip('/')}/{name}"
        try:
            if is_url(checkpoints):
                ObjectStore(place).remove()
            else:
                delete_unless_held(Path(place))
        except (OSError, UserError) as error:
            logger.warning("checkpoints that nobody needs any more were left: %s", error)
