"""A cluster of one machine, and this process as a launcher's pod in it."""

import pytest
import trainer
from launcher_pods import launcher_pod
from trainjob_nodes import SECRET

RANKS = """
import logging, os, signal, sys, time
from pathlib import Path
from flagscale.errors import Interrupted, UserError
from flagscale.stop import deferred_stop, stop_requested

def run(what):
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    is_last = int(rank) + 1 == int(ranks)
    works = Path(os.environ["FLAGSCALE_SHARED"], f"{rank}-works")
    for number in range(20):
        logging.getLogger(__name__).info("line %d of rank %s", number, rank)
    if what == "environment":
        names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "KFP_RUN_ID", "NCCL_DEBUG",
                 "MLFLOW_EXPERIMENT_NAME", "KFP_POD_NAME", "FLAGSCALE_SHARED")
        found = {name: os.environ.get(name) for name in names}
        return {**found, "secret": os.environ["MLFLOW_TRACKING_PASSWORD"][::-1]}
    if what == "error" and is_last:
        os.write(2, f"rank {rank} dies; {os.environ['MLFLOW_TRACKING_PASSWORD']}\\n".encode())
        raise UserError("the last node says what is wrong")
    if what == "kill" and is_last:
        os.kill(os.getpid(), 9)
    if what == "save":
        with deferred_stop():  # takes long to save
            works.touch()
            time.sleep(600)
    if what == "twice":  # is stopped the first time, and then goes on
        if works.exists():
            return "went on"
        works.touch()
        with deferred_stop():
            while not stop_requested():
                time.sleep(0.05)
        raise Interrupted("saved step 3")
    time.sleep(600)
"""


@pytest.fixture(scope="module", autouse=True)
def forked_ranks():
    """None: here it is torchrun that is tried."""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster with a launcher's pod, whose environment this process has."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "ranks.py").write_text(RANKS)
    found = trainer.Cluster(tmp_path)
    pod = launcher_pod(shared)
    found.pods[pod["metadata"]["name"]] = pod
    # Empty: no server. A database would take longer to be made than all else here.
    found.secrets["mlflow"] = {"tracking-uri": "", "password": SECRET}
    for name, value in {
        "KUBECONFIG": str(found.kubeconfig),
        "KFP_POD_NAME": pod["metadata"]["name"],
        "KFP_RUN_ID": "run-1",
        "FLAGSCALE_PATIENCE_SECONDS": "5",
        "FLAGSCALE_SHARED": str(shared),
        "MLFLOW_EXPERIMENT_NAME": "distillation",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "PYTHONPATH": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()
