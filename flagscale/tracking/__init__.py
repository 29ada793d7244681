"""MLflow: the only package that talks to it. Tracking may fail and training goes on.

A pipeline run is a parent run, each of its steps a child. Who makes the parent:

* on this machine the runner, with `pipeline_run`; its `environment` goes to the steps' processes;
* on a cluster with KFP's own MLflow plugin, KFP, which injects the same three variables
  (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_ID`, `MLFLOW_RUN_ID`);
* on a cluster without it, whichever step comes first (`flagscale.tracking.kfp_run`).

An injected run belongs to somebody else: a step makes a child of it with `step_run` and never
finishes or renames it. Without `MLFLOW_TRACKING_URI` a step tracks nothing.

Everything goes through `MlflowClient` with explicit run ids: the fluent API would resume, and then
finish, the injected run.
"""

from flagscale.tracking.names import (
    CACHED_TAG,
    KFP_RUN_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    RESUMED_TAG,
    TRAINING_TAG,
    flatten,
)
from flagscale.tracking.pipeline import PipelineRun, pipeline_run, recipe_yaml
from flagscale.tracking.run import StepRun
from flagscale.tracking.server import DEFAULT_EXPERIMENT, connect
from flagscale.tracking.step import step_failed, step_run

__all__ = [
    "CACHED_TAG",
    "DEFAULT_EXPERIMENT",
    "KFP_RUN_TAG",
    "PARENT_TAG",
    "PROCESS_TAG",
    "RESUMED_TAG",
    "TRAINING_TAG",
    "PipelineRun",
    "StepRun",
    "connect",
    "flatten",
    "pipeline_run",
    "recipe_yaml",
    "step_failed",
    "step_run",
]
