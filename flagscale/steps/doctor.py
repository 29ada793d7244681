"""The audit alone, of artifacts that are there, with the recipe's own loss and precision.

What convert-student cannot afford, or is not told, is done here: the chosen divergence, the dtype
that training computes in, and the same figures on two tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.execution.launch import call_on_ranks
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.layout import check_layout, sizes_to_train
from flagscale.megatron.paired_layers import check_paired_layers
from flagscale.megatron.quantized import check_quantized
from flagscale.megatron.shape import ModelShape
from flagscale.models.audit_artifacts import audited_batch
from flagscale.models.distillation_proof import PROOF_LOSS
from flagscale.models.student_audit import Artifacts, audit_student, load_pair
from flagscale.post_training.findings import Finding, not_run, within
from flagscale.recipe import (
    DistillationRecipe,
    LayoutRecipe,
    ModelsRecipe,
    ParallelismRecipe,
    TrainingRecipe,
)
from flagscale.recipe.layer_pairs import check_layer_pairs

_TP = "TP1 equals TP2"
# Of the order of sums: a share of the figure.
_SAME_ON_RANKS, _SAME_ON_RANKS_16_BITS = 1e-4, 0.03


class Paths(NamedTuple):
    """The artifacts of one run."""

    teacher: Path
    student: Path
    dataset: Path


def doctor(
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    paths: Paths,
    models: ModelsRecipe = ModelsRecipe(),
) -> list[Finding]:
    """Audit a student with the recipe's own loss.

    Args:
        distillation: the recipe's section; of `loss: none` the default loss is audited.
        training: the recipe's section: its precision is computed in.
        paths: a `teacher`, a `student` made of it, and the `dataset`.
        models: how the work is spread over processes.

    Returns:
        What was found, whatever it is.

    Raises:
        UserError: an artifact is missing or damaged.
    """
    for kind, path in paths._asdict().items():
        open_artifact(path, kind)
    common: dict[str, Any] = {"distillation": distillation, "training": training, "paths": paths}
    alone = call_on_ranks("doctor", audit_on_rank, models.processes, **common, models=models)
    findings = [Finding(**finding) for finding in alone["findings"]]
    return [*findings, _on_two_ranks(common, models, alone["figures"])]


def audit_on_rank(
    distillation: DistillationRecipe, training: TrainingRecipe, paths: Paths, models: ModelsRecipe
) -> dict[str, Any]:
    """The work of one rank: `findings`, and the `figures` that no layout may change."""
    manifests = {kind: open_artifact(path, kind, False) for kind, path in paths._asdict().items()}
    shape = ModelShape.load(paths.student)
    seq_length = manifests["dataset"].facts["seq_length"]
    dtype = platform.training_dtype(training.precision)
    sizes = sizes_to_train(models.sizes, shape, ModelShape.load(paths.teacher))
    args = model_arguments(shape, seq_length, parallelism=sizes, params_dtype=dtype)
    if shape.quantization is not None:
        args = replace(args, export_quant_load=paths.student)
    facts = manifests["student"].facts
    with (
        platform.runtime(training.seed, models.sizes),
        use_args(with_teacher(args, paths.teacher, PROOF_LOSS)),
    ):
        batch, unigram = audited_batch(paths.dataset, shape.vocab_size)
        stored = getattr(torch, facts["dtype"])
        artifacts = Artifacts(
            paths.student, paths.teacher, paths.dataset, manifests, facts["copied_layers"], stored
        )
        student, teacher = load_pair(artifacts, args)
        audited = audit_student(artifacts, student, teacher, batch, unigram, distillation)
    return {
        "findings": [asdict(finding) for finding in audited.findings],
        "figures": audited.figures,
    }


def _on_two_ranks(
    common: dict[str, Any], models: ModelsRecipe, expected: dict[str, float]
) -> Finding:
    """The same figures with the vocabulary, and every matrix, over two ranks."""
    paths, training = common["paths"], common["training"]
    if not expected:
        return not_run(_TP, "there are no figures of one rank to compare with")
    if models.processes > 1:
        return not_run(_TP, f"the models are over {models.processes} processes already")
    if platform.HAS_GPU and torch.cuda.device_count() < 2:
        return not_run(_TP, "this machine has one GPU")
    shapes = [ModelShape.load(paths.teacher), ModelShape.load(paths.student)]
    has_experts = any(shape.architecture.num_experts is not None for shape in shapes)
    halves = ModelsRecipe(
        parallelism=LayoutRecipe(
            tensor_model_parallel_size=2, expert_model_parallel_size=2 if has_experts else 1
        )
    )
    try:
        _check_halves(common["distillation"], training, paths, halves.sizes)
    except (UserError, ValueError) as error:
        return not_run(_TP, f"the models do not divide by two: {error}")
    found = call_on_ranks("doctor", audit_on_rank, halves.processes, **common, models=halves)
    share, worst = 0.0, ""
    for name, value in expected.items():
        # As of a loss against float64: small ones are what is left of large logits.
        change = (found["figures"][name] - value) / (abs(value) + 0.1)
        if not abs(change) <= abs(share):
            share, worst = change, name
    wide = platform.training_dtype(training.precision).itemsize > 2
    return within(
        _TP,
        share,
        _SAME_ON_RANKS if wide else _SAME_ON_RANKS_16_BITS,
        "largest change of a loss or of its gradient's size on two ranks, as a share",
        f"the {worst} differs by {share:.3g} of itself on two tensor-parallel ranks",
    )


def _check_halves(
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    paths: Paths,
    sizes: ParallelismRecipe,
) -> None:
    """Refuse what two ranks cannot share: models, quantised blocks, layers that are paired."""
    teacher, student = ModelShape.load(paths.teacher), ModelShape.load(paths.student)
    for shape in (teacher, student):
        check_layout(shape, sizes, _seq_length(paths), section="models")
    if student.quantization is not None:
        check_quantized(student, student.quantization, sizes, calibrates=False)
    shared = training.model_copy(update={"parallelism": sizes})
    check_layer_pairs(distillation, shared, student.architecture)
    check_paired_layers(distillation, student, teacher, sizes)


def _seq_length(paths: Paths) -> int:
    return int(open_artifact(paths.dataset, "dataset", False).facts["seq_length"])
