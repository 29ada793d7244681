"""leaderboard: the evaluations of a sweep's variants -> a `leaderboard` artifact, best first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flagscale import tracking
from flagscale.artifacts import Manifest, digest, new_artifact, open_artifact, write_json
from flagscale.errors import UserError
from flagscale.evaluation import LEADERBOARD, REPORT, SUMMARY, TABLE
from flagscale.evaluation.boards.leaderboard import Candidate, Failed, Leaderboard, rank
from flagscale.evaluation.boards.leaderboard_page import headline, render, summary_markdown
from flagscale.evaluation.compare import read_evaluation
from flagscale.evaluation.fidelity import FIGURES
from flagscale.evaluation.figures import scalars
from flagscale.execution.absent import KIND as ABSENT
from flagscale.execution.absent import absent, reason
from flagscale.recipe import parse_section
from flagscale.recipe.decisive import decisive
from flagscale.recipe.sweep import VARIED
from flagscale.tracking.variants import log_variants

logger = logging.getLogger(__name__)

_SPEED = "median tokens per second"


def rank_variants(
    variants: Sequence[Mapping[str, Any]],
    metric: str,
    results: Sequence[Path],
    output: Path,
) -> dict[str, float]:
    """Rank the variants of a sweep; make each a child of the sweep's run in MLflow.

    Args:
        variants: of each `name`, and the sections `student`, `distillation` and `training`.
        metric: figure that decides: kl, lm_loss, top1_agreement or accuracy.
        results: the `evaluation` artifact of each variant, in any order, or one that says why there
            is none (`flagscale.execution.absent`): each says itself which sections its student was
            made and trained with. Variants that failed come last, with their errors.
        output: folder of the `leaderboard` artifact: leaderboard.json, leaderboard.csv,
            report.html, summary.md.

    Returns:
        The winner's figures as its evaluation has them, `winner`: its number in the sweep, from
        1, and the number of `variants`.

    Raises:
        UserError: a variant has no evaluation, or two, or an evaluation is of no variant, they
            cannot be compared, or every variant failed.
    """
    if metric not in FIGURES:
        raise UserError(f"metric={metric!r}: must be one of {', '.join(FIGURES)}")
    wanted = _sections(variants)
    found = _by_variant(wanted, results)
    errors = {name: reason(one) for name, (_, one) in found.items() if one.kind == ABSENT}
    evaluations = {name: one for name, one in found.items() if name not in errors}
    if not evaluations:
        told = "".join(f"\n  {name}: {error}" for name, error in errors.items())
        raise UserError(f"every variant failed:{told}")
    recipe = {"sweep": {"metric": metric, "variants": [wanted[name] for name in wanted]}}
    parents = {name: manifest for name, (_, manifest) in evaluations.items()}
    with (
        tracking.step_run("leaderboard", {"sweep": {"metric": metric}}, parents=parents) as run,
        new_artifact(output, "leaderboard", recipe, parents, run.log_manifest) as staging,
    ):
        varied = changes(wanted)
        candidates = [
            _candidate(number, name, varied[name], *evaluations[name])
            for number, name in enumerate(wanted, start=1)
            if name in evaluations
        ]
        failed = [
            Failed(number, name, varied[name], errors[name])
            for number, name in enumerate(wanted, start=1)
            if name in errors
        ]
        board = rank(candidates, metric, failed)
        _write(staging.path, board)
        staging.facts = {"winner": board.winner.name, "digests": board.winner.digests}
        winner = next(one for one in candidates if one.number == board.winner.number)
        figures = scalars(winner.metrics)
        figures |= {"winner": float(board.winner.number), "variants": float(len(board.rows))}
        figures |= {"failed": float(len(failed))}
        run.log_headline(figures)
        run.describe((staging.path / SUMMARY).read_text(encoding="utf-8"), pipeline=True)
        for name in (REPORT, LEADERBOARD, TABLE):
            run.log_artifact(staging.path / name)
    log_variants(board.as_json())
    logger.info("%s", headline(board))
    return figures


def _sections(variants: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> the sections as the steps saw them: validated, with every default."""
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        name = str(variant.get("name", ""))
        if not name or name in found:
            raise UserError(f"variants: name={name!r}: each needs a name of its own")
        if {*variant} != {"name", *VARIED}:
            raise UserError(
                f"variants: {name!r} holds {', '.join(sorted(variant))}: must hold name, "
                f"{', '.join(VARIED)}, and nothing else"
            )
        found[name] = {
            section: parse_section(
                kind, variant[section], f"variant {name!r}: {section}"
            ).model_dump(mode="json")
            for section, kind in VARIED.items()
        }
    return found


def _by_variant(
    wanted: Mapping[str, Mapping[str, Any]], results: Sequence[Path]
) -> dict[str, tuple[Path, Manifest]]:
    """Find each variant's evaluation by what its student was made and trained with."""
    names: dict[str, str] = {}
    for name, sections in wanted.items():
        same = names.setdefault(_known_by(sections), name)
        if same != name:
            raise UserError(f"variants: {same!r} and {name!r} are the same; leave one out")
    found: dict[str, tuple[Path, Manifest]] = {}
    for path in results:
        failed = absent(path)
        manifest = failed or open_artifact(path, "evaluation")
        measured = (
            manifest.recipe if failed else manifest.facts.get("measured", {}).get("recipe", {})
        )
        variant = names.get(_known_by(measured)) if {*VARIED} <= {*measured} else None
        if variant is None:
            raise UserError(f"{path}: is the evaluation of no variant of this sweep: {measured}")
        if variant in found:
            raise UserError(f"{path} and {found[variant][0]}: are both of variant {variant!r}")
        found[variant] = (path, manifest)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(f"no evaluation of variant {', '.join(map(repr, missing))} was given")
    return {name: found[name] for name in wanted}  # in the sweep's order, whatever the results'


def _known_by(sections: Mapping[str, Any]) -> str:
    """Digest of what decides on the student: the rest, e.g. fusions, is as each machine has it."""
    return digest(decisive({name: sections.get(name) for name in VARIED}))


def changes(wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> the fields that are not the same in all variants, `section.field` -> value."""
    flat = {name: tracking.flatten(sections) for name, sections in wanted.items()}
    fields = list(dict.fromkeys(field for values in flat.values() for field in values))
    varied = [f for f in fields if len({values.get(f) for values in flat.values()}) > 1]
    return {name: {f: values.get(f, "none") for f in varied} for name, values in flat.items()}


def _candidate(
    number: int, name: str, changes: Mapping[str, Any], path: Path, manifest: Manifest
) -> Candidate:
    metrics, fidelity = read_evaluation(path)
    measured = manifest.facts["measured"]
    return Candidate(
        number=number,
        name=name,
        changes=changes,
        origin=digest(measured["recipe"]["student"]),
        metrics=metrics,
        fidelity=fidelity,
        tokens_per_second=float(measured["training"].get(_SPEED, 0)),
        source=path,
        digests={"evaluation": manifest.digest, "distilled": manifest.parents["distilled"]},
    )


def _write(folder: Path, board: Leaderboard) -> None:
    write_json(folder / LEADERBOARD, board.as_json())
    (folder / TABLE).write_text(board.csv(), encoding="utf-8")
    (folder / REPORT).write_text(render(board), encoding="utf-8")
    (folder / SUMMARY).write_text(summary_markdown(board), encoding="utf-8")
