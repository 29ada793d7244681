"""What a step's ranks do together: one run in MLflow, one artifact, which says what they held.

A step that may need several processes is two functions: the step itself, which checks what can be
checked at once and calls `flagscale.execution.launch.call_on_ranks`, and the work of one rank:

    with (
        tracked("evaluate", recipe, parents=parents) as run,
        platform.runtime(parallelism=models.sizes),
        written(output, "evaluation", recipe, parents, run) as staging,
    ):
        ...

All ranks write their shares of weights into `staging.path`. Small files, facts and figures are the
first rank's (`is_first_rank`): those of the others go nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flagscale import tracking
from flagscale.artifacts import Manifest, Staging, new_artifact, staging_path
from flagscale.execution.launch import is_first_rank
from flagscale.execution.notes import note_run
from flagscale.megatron.energy import energy
from flagscale.megatron.peak_memory import peak_memory


@contextmanager
def tracked(
    step: str,
    recipe: Mapping[str, Any],
    training: str | None = None,
    parents: Mapping[str, Manifest] | None = None,
) -> Iterator[tracking.StepRun]:
    """The step's run in MLflow on the first rank; elsewhere one that tells nobody.

    Args:
        step: its name.
        recipe: see `tracking.step_run`.
        training: see there.
        parents: see there.
    """
    if not is_first_rank():
        yield tracking.StepRun(None)
        return
    with tracking.step_run(step, recipe, training, parents) as run:
        note_run(run.run_id)
        yield run


@contextmanager
def written(
    output: Path,
    kind: str,
    recipe: dict[str, Any],
    parents: dict[str, Manifest],
    run: tracking.StepRun,
) -> Iterator[Staging]:
    """The artifact: the first rank's, into whose folder the others write too.

    All ranks call it, within the runtime. The most memory that each of them held goes into the
    manifest and to MLflow, the energy that they took into the manifest.

    Args:
        output: see `new_artifact`.
        kind: see there.
        recipe: see there.
        parents: see there.
        run: of `tracked`.
    """
    if not is_first_rank():
        torch.distributed.barrier()  # the folder is there
        yield Staging(staging_path(output))
        peak_memory()
        energy()
        return
    with new_artifact(output, kind, recipe, parents, run.log_manifest) as staging:
        torch.distributed.barrier()
        yield staging
        staging.peak_memory, staging.energy = peak_memory(), energy()
