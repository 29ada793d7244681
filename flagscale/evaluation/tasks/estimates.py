"""Tasks' figures as estimates: the bootstrap over a task's examples.

All metrics and models of a task share the draws of its examples, so whatever is computed from them
is paired. Two tasks are two samples of examples: their draws are independent of each other, and of
those of the test split's documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from flagscale.errors import UserError
from flagscale.evaluation.bootstrap import Estimate, ratios
from flagscale.evaluation.tasks.scores import TaskScores, figure_names


def task_estimates(
    scores: Sequence[TaskScores], samples: int, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Figure of a task -> model -> estimate.

    A task's first metric is both `<task>` and `<task>:<metric>`, the others are the latter alone.

    A metric that is no mean over examples has none, and is left out.

    Args:
        scores: of `load_scores`.
        samples: resamples of each task's examples.
        seed: of the draws; equal seeds and examples draw the same examples.

    Raises:
        UserError: a task has fewer than two examples.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for name, score in zip(figure_names(scores), scores, strict=True):
        if not score.values:
            continue
        if len(score.examples) < 2:
            raise UserError(
                f"task {score.task} has {len(score.examples)} example(s), intervals need at least "
                "2: raise tasks.limit, or leave the task out"
            )
        ones = np.ones(len(score.examples))
        own = ratios(dict(score.values), ones, samples, _seed(score.examples, seed))
        found[name] = found[f"{score.task}:{score.metric}"] = own
    return found


def _seed(examples: Sequence[str], seed: int) -> int:
    """Of the draws of these examples: numpy mixes its bits."""
    told = "\n".join([str(seed), *examples])
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:16], "big")
