"""Environment variables by which a pipeline on a cluster tells its steps where they are."""

ACCELERATORS = "FLAGSCALE_ACCELERATOR_COUNT"  # that the pod was given, and must be able to use
KFP_RUN = "KFP_RUN_ID"  # id of the KFP run
RUN_NAME = "FLAGSCALE_RUN_NAME"  # what MLflow's parent run is called; default: the KFP run's id
SECRETS = "FLAGSCALE_SECRET_VARIABLES"  # names of variables that hold secrets, with commas
SHARED = "FLAGSCALE_SHARED"  # folder or URL that all steps share

ALL = (ACCELERATORS, KFP_RUN, RUN_NAME, SECRETS, SHARED)

# The platform's MLflow server, where KFP's plugin has injected none. MLflow's own names are the
# plugin's: Kubernetes refuses a pod that is given a value and a secret for one variable.
MLFLOW_URI = "FLAGSCALE_MLFLOW_TRACKING_URI"
MLFLOW_USERNAME = "FLAGSCALE_MLFLOW_TRACKING_USERNAME"
MLFLOW_PASSWORD = "FLAGSCALE_MLFLOW_TRACKING_PASSWORD"  # noqa: S105 - its name
