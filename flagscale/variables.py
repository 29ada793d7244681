"""Environment variables by which a pipeline on a cluster tells its steps where they are."""

KFP_RUN = "KFP_RUN_ID"  # id of the KFP run
LAST_STEP = "FLAGSCALE_LAST_STEP"  # 1 on the step that all others come before
RUN_NAME = "FLAGSCALE_RUN_NAME"  # what MLflow's parent run is called; default: the KFP run's id
SECRETS = "FLAGSCALE_SECRET_VARIABLES"  # names of variables that hold secrets, with commas
SHARED = "FLAGSCALE_SHARED"  # folder or URL that all steps share

ALL = (KFP_RUN, LAST_STEP, RUN_NAME, SECRETS, SHARED)
