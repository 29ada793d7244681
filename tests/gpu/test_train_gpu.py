"""Training on a GPU beside the layouts: KL, resuming, diagnostics. Not yet run on a GPU."""

import json
import logging
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import resume_worker
import torch
from gpu_machine import skip_on_cpu, skip_without_gpus
from megatron.core.utils import StragglerDetector
from resume_worker import STEPS, Task

from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.divergences.reference import reference_gradient, reference_loss
from flagscale.post_training.linear_divergence import (
    CHUNK_BYTES,
    HeadInput,
    Terms,
    linear_divergence,
)
from flagscale.recipe import DistillationRecipe

pytestmark = pytest.mark.timeout(1800)

FP32 = {"precision": "fp32", "transformer_impl": "local"}
BF16 = {"precision": "bf16", "transformer_impl": "auto"}
# Of all losses of six steps. fp32: kernels may add up in another order each time; bf16: at 2^-9,
# and Adam makes a step of a small gradient's sign. Moments that were lost would show from the
# first step after resuming.
RELATIVE = {"fp32": 1e-4, "bf16": 1e-2}
OUT_OF_MEMORY = """
import sys
from pathlib import Path
import torch
from flagscale.megatron.memory_history import record_memory_history
record_memory_history(Path(sys.argv[1]))
held = torch.empty(2**20, device="cuda")
torch.empty(2**50, dtype=torch.uint8, device="cuda")
"""


@pytest.fixture
def inputs(teacher, dataset):
    return {"teacher": str(teacher), "dataset": str(dataset)}


@pytest.fixture
def choose(monkeypatch):
    """Change the recipe of `resume_worker` in this process."""
    original = resume_worker.recipe

    def change(**choices):
        monkeypatch.setattr(
            resume_worker, "recipe", lambda task: original(task).model_copy(update=choices)
        )

    return change


def train(task: Task, folder: Path, inputs: dict[str, str]) -> dict:
    (folder / task.name).mkdir()
    resume_worker.run(task, folder, inputs)
    return read(task, folder)


def read(task: Task, folder: Path) -> dict:
    return json.loads((folder / task.name / "result.json").read_text())


def assert_same_curve(found: dict, expected: dict, relative: float) -> None:
    for kind in ("training", "validation"):
        ours, theirs = (losses(result[kind]) for result in (found, expected))
        assert ours == [pytest.approx(record, rel=relative) for record in theirs]


def losses(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in one.items() if k != "tokens per second"} for one in records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DistillationRecipe.model_fields["divergence"].annotation.__args__)
def test_a_divergence_equals_float64(name, dtype):
    skip_on_cpu()
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        (3 * torch.randn(64, 49152, generator=generator)).to("cuda", dtype) for _ in range(2)
    )
    recipe = DistillationRecipe(divergence=name)
    exact, exact_gradient = (
        of(student, teacher, recipe) for of in (reference_loss, reference_gradient)
    )
    found, gradient = divergence_of(recipe).loss_and_gradient(student, teacher)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]


@pytest.mark.parametrize("with_lm_loss", [False, True], ids=["alone", "LM loss too"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fused_output_layer_equals_float64(monkeypatch, dtype, with_lm_loss):
    skip_on_cpu()
    monkeypatch.setitem(CHUNK_BYTES, "cuda", 2**24)  # about 40 of the 256 tokens
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to("cuda", dtype)

    student, teacher = (HeadInput(normal(256, 64), normal(49152, 64) / 4, 49100) for _ in range(2))
    labels = torch.randint(49100, (256,), generator=generator).to("cuda")
    leaves = [student.hidden_nh.requires_grad_(), student.weight_vh.requires_grad_()]
    weights = (torch.arange(256, device="cuda") % 3 > 0).float()
    recipe = DistillationRecipe()
    terms = Terms(divergence_of(recipe), 1.0, labels if with_lm_loss else None)
    found = linear_divergence(student, teacher, terms, weights)
    (sum(found[: 1 + with_lm_loss]) * weights).sum().backward()
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = (exact_leaves[0] @ exact_leaves[1].T)[:, :49100]
    targets = (teacher.hidden_nh.double() @ teacher.weight_vh.double().T)[:, :49100]
    exact = reference_loss(logits, targets, recipe)
    if with_lm_loss:
        exact = exact + torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (exact * weights).sum().backward()
    # Logits are fp32; the gradient in them has the models' bits, for the products.
    torch.testing.assert_close(
        sum(found[: 1 + with_lm_loss]).double(), exact.detach(), rtol=1e-4, atol=0
    )
    for leaf, exact_leaf in zip(leaves, exact_leaves, strict=True):
        error = (leaf.grad.double() - exact_leaf.grad).norm() / exact_leaf.grad.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]


@pytest.mark.parametrize("async_save", [False, True], ids=["save", "async save"])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "distributed optimiser"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["distillation", "experts"])
def test_one_process_resumes(tmp_path, inputs, choose, kind, precision, sharded, async_save):
    choose(**precision)
    sizes = {"use_distributed_optimizer": sharded}
    whole = train(Task("whole", kind, 1, sizes), tmp_path, inputs)
    part = Task("part", kind, 1, sizes, stop_after=4, async_save=async_save)
    train(part, tmp_path, inputs)
    rest = train(Task("rest", kind, 1, sizes, resume="part"), tmp_path, inputs)
    assert (rest["first"], rest["step"]) == (5, STEPS)
    assert_same_curve(rest, whole, RELATIVE[precision["precision"]])


@pytest.mark.parametrize("after", ["DP2", "one process"])
def test_two_data_parallel_ranks_resume(tmp_path, inputs, after):
    """In bf16, with the distributed optimiser and asynchronous checkpoints."""
    skip_without_gpus(2)
    whole = train(Task("whole", "distillation", 1), tmp_path, inputs)
    part = Task("part", "distillation", 2, stop_after=3, async_save=True)
    on_two_ranks(part, tmp_path, inputs)
    rest = Task("rest", "distillation", 2 if after == "DP2" else 1, resume="part")
    if rest.processes == 2:
        on_two_ranks(rest, tmp_path, inputs)
    else:
        train(rest, tmp_path, inputs)
    assert read(rest, tmp_path)["first"] == 4
    assert_same_curve(read(rest, tmp_path), whole, RELATIVE["bf16"])


def on_two_ranks(task: Task, folder: Path, inputs: dict[str, str]) -> None:
    (folder / task.name).mkdir()
    (folder / "tasks.json").write_text(json.dumps({"tasks": [asdict(task)], "inputs": inputs}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", resume_worker.__file__, str(folder)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )


def test_timers_and_stragglers_are_told(tmp_path, inputs, choose, caplog):
    skip_on_cpu()
    caplog.set_level(logging.INFO)
    choose(**BF16, timing_log_level=2, log_straggler=True)
    try:
        train(Task("timed", "distillation", 1), tmp_path, inputs)
    finally:
        StragglerDetector()  # which resets the only one
    timed = [text for text in caplog.messages if text.startswith("time a step, in ms")]
    assert len(timed) == 2  # at steps 3 and 6
    assert all("forward-compute" in text for text in timed)
    assert sum("MxRtt/Rnk" in text for text in caplog.messages) == 2


def test_memory_that_runs_out_leaves_a_snapshot(tmp_path):
    skip_on_cpu()
    path = tmp_path / "memory.pickle"
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "OutOfMemoryError" in done.stderr
    snapshot = pickle.loads(path.with_name("memory-rank0.pickle").read_bytes())
    actions = [entry["action"] for trace in snapshot["device_traces"] for entry in trace]
    assert "oom" in actions
    held = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    assert any(block["size"] >= 2**22 for block in held)


def test_fused_gradient_accumulation_changes_rounding_alone(tmp_path, inputs, choose):
    choose(**BF16)
    fused = train(Task("fused", "distillation", 1), tmp_path, inputs)
    choose(**BF16, gradient_accumulation_fusion=False)
    plain = train(Task("plain", "distillation", 1), tmp_path, inputs)
    assert_same_curve(fused, plain, RELATIVE["bf16"])
