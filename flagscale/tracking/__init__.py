"""MLflow: the only package that talks to it. Tracking may fail and training goes on.

A pipeline run is a parent run, each of its steps a child. Who makes the parent:

* on this machine the runner, with `pipeline_run`; its `environment` goes to the steps' processes;
* on a cluster with KFP's own MLflow plugin, KFP; if it injects variables, then the same three
  (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_ID`, `MLFLOW_RUN_ID`), else a step finds its run
  (`flagscale.tracking.plugin`);
* on a cluster without it, whichever step comes first (`flagscale.tracking.kfp_run`).

A run that somebody else has made belongs to them: a step makes a child of it with `step_run` and
never finishes or renames it. A step tracks to the server in `MLFLOW_TRACKING_URI`, else to the
platform's in `FLAGSCALE_MLFLOW_TRACKING_URI`, else nowhere.

Everything goes through `MlflowClient` with explicit run ids: the fluent API would resume, and then
finish, the injected run.
"""

from flagscale.tracking.curves import MOST_POINTS
from flagscale.tracking.ended import close_ended
from flagscale.tracking.failed import keep_files, step_failed
from flagscale.tracking.inputs import Split
from flagscale.tracking.letters import Point
from flagscale.tracking.models import Model
from flagscale.tracking.names import (
    CACHED_TAG,
    KFP_RUN_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    RESUMED_TAG,
    TRAINING_TAG,
    flatten,
    own_kfp_run,
)
from flagscale.tracking.pipeline import PipelineRun, pipeline_run, recipe_yaml
from flagscale.tracking.record import Reported, record_run
from flagscale.tracking.run import StepRun
from flagscale.tracking.server import DEFAULT_EXPERIMENT, connect
from flagscale.tracking.step import attached, note_run_of_ranks, run_id_of_process, step_run
from flagscale.tracking.system_metrics import is_nodes_first_rank, system_metrics
from flagscale.tracking.training import TrackedTraining

__all__ = [
    "CACHED_TAG",
    "DEFAULT_EXPERIMENT",
    "KFP_RUN_TAG",
    "MOST_POINTS",
    "PARENT_TAG",
    "PROCESS_TAG",
    "RESUMED_TAG",
    "TRAINING_TAG",
    "Model",
    "PipelineRun",
    "Point",
    "Reported",
    "Split",
    "StepRun",
    "TrackedTraining",
    "attached",
    "close_ended",
    "connect",
    "flatten",
    "is_nodes_first_rank",
    "keep_files",
    "note_run_of_ranks",
    "own_kfp_run",
    "pipeline_run",
    "recipe_yaml",
    "record_run",
    "run_id_of_process",
    "step_failed",
    "step_run",
    "system_metrics",
]
