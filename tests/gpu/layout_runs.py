"""Runs layouts on this machine's GPUs: one torchrun a precision and number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_machine import (
    skip_without_gpus,
    skip_without_multicast,
    skip_without_transformer_engine,
)
from layout_cases import CASES, KINDS, ON_GPU, Case

WORKER = Path(__file__).parents[1] / "flagscale" / "train" / "layout_worker.py"
SECONDS = 1500  # of one torchrun
TRANSFORMER_ENGINE = {"precision": "bf16", "transformer_impl": "transformer_engine"}
FP8_RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise")
# Names of precisions -> more of the recipe's section `training`.
PRECISIONS = {
    "fp32": {"precision": "fp32", "transformer_impl": "local"},
    "bf16": TRANSFORMER_ENGINE,
    **{
        f"fp8 {recipe}": {**TRANSFORMER_ENGINE, "fp8": "hybrid", "fp8_recipe": recipe}
        for recipe in FP8_RECIPES
    },
}
FP8_CASES = ("one process", "TP2", "TP2, sequence parallel")


def cases_of(precision: str) -> list[Case]:
    """What is tried in it."""
    if precision == "fp32":
        return CASES
    if precision == "bf16":
        return [*CASES, *ON_GPU]
    return [case for case in CASES if case.name in FP8_CASES]


class LayoutRuns:
    """Folders of what every case left, made when they are asked for."""

    def __init__(self, folder: Path, inputs: dict[str, str]) -> None:
        """Use `folder`.

        Args:
            folder: gets a folder for each precision, and the first weights that all share.
            inputs: the artifacts `teacher`, `student`, `dataset`.
        """
        self._folder, self._inputs = folder, inputs
        self._done: set[tuple[str, int]] = set()

    def result(self, precision: str, case: Case, kind: str) -> dict:
        """What a case left: `records` and `validation`, or `error`. Skips what cannot be here."""
        skip_without(precision, case.processes)
        if case.training.get("tp_comm_overlap"):
            skip_without_multicast()
        self._train("fp32", 1)  # it makes the first weights that have none
        self._train(precision, case.processes)
        return json.loads((self.folder(precision, case.name, kind) / "result.json").read_text())

    def folder(self, precision: str, name: str, kind: str) -> Path:
        return self._folder / precision / name / kind

    def _train(self, precision: str, processes: int) -> None:
        if (precision, processes) in self._done:
            return
        self._done.add((precision, processes))
        names = [case.name for case in cases_of(precision) if case.processes == processes]
        while names:
            code, said = self._torchrun(precision, processes, names)
            if code == 0:
                return
            # One case that ends its processes must not hide the others.
            failed = next((name for name in names if self._missing(precision, name)), names[-1])
            for folder in self._missing(precision, failed):
                folder.mkdir(parents=True, exist_ok=True)
                error = {"error": f"torchrun ended with {code}: {said[-4000:]}"}
                (folder / "result.json").write_text(json.dumps(error))
            names = names[names.index(failed) + 1 :]

    def _missing(self, precision: str, name: str) -> list[Path]:
        folders = [self.folder(precision, name, kind) for kind in KINDS]
        return [folder for folder in folders if not (folder / "result.json").exists()]

    def _torchrun(self, precision: str, processes: int, names: list[str]) -> tuple[int, str]:
        folder = self._folder / precision
        folder.mkdir(exist_ok=True)
        more = {"training": PRECISIONS[precision], "weights": str(self._folder / "weights")}
        inputs = {**self._inputs, **more, "cases": names}
        (folder / "inputs.json").write_text(json.dumps(inputs))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # As flagscale.execution.launch starts ranks.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        try:
            done = subprocess.run(
                [*torchrun, "--nproc-per-node", str(processes), str(WORKER), str(folder)],
                check=False,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            # run() has killed torchrun, not its ranks: they find their agent gone.
            return -1, f"no end after {SECONDS} s: {error.stdout!r}"
        sys.stdout.write(done.stdout)
        return done.returncode, done.stdout


def skip_without(precision: str, processes: int) -> None:
    """Skip the test if this machine lacks what it needs, with what that is."""
    skip_without_gpus(processes)
    if precision == "fp32":
        return
    skip_without_transformer_engine()
    if not precision.startswith("fp8"):
        return
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    asked = {
        "fp8 mxfp8": FP8GlobalStateManager.is_mxfp8_available,
        "fp8 blockwise": FP8GlobalStateManager.is_fp8_block_scaling_available,
    }.get(precision, FP8GlobalStateManager.is_fp8_available)
    available, reason = asked()
    if not available:
        pytest.skip(f"{precision}: {reason}")
