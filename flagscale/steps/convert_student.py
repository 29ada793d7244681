"""convert-student: the student's first weights, and proof that distilling into it will work."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_pipeline_model_parallel_group

from flagscale.artifacts import Manifest, open_artifact
from flagscale.checkpoint import save_weights
from flagscale.checkpoint.agreement import on_first_rank
from flagscale.checkpoint.weights import count_parameters
from flagscale.errors import UserError
from flagscale.execution.launch import call_on_ranks, is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.layout import check_layout
from flagscale.megatron.shape import ModelShape
from flagscale.models import pretrained
from flagscale.models.audit_artifacts import audited_batch
from flagscale.models.distillation_proof import PROOF_LOSS
from flagscale.models.megatron import WEIGHTS, forward
from flagscale.models.student_audit import Artifacts
from flagscale.models.student_shape import student_shape
from flagscale.models.targets import meet_targets
from flagscale.recipe import ModelsRecipe, StudentRecipe
from flagscale.recipe.quantization import FORMATS
from flagscale.steps.on_ranks import tracked, written
from flagscale.steps.student.audit import prove, record_audit
from flagscale.steps.student.describe import describe_student
from flagscale.steps.student.layer_choice import needs, record
from flagscale.steps.student.make import make_student
from flagscale.steps.student.narrowing import check_pruning, record_narrowing
from flagscale.steps.student.pretrained import check_pretrained, open_student, pretrained_folder
from flagscale.steps.student.quantize import check_quantization, quantization_figures, quantize
from flagscale.tracking import Split

logger = logging.getLogger(__name__)


def convert_student(
    student: StudentRecipe,
    teacher: Path,
    dataset: Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
    importance: Path | None = None,
) -> dict[str, float]:
    """Make the student and prove ModelOpt's distillation conversion of it.

    Its layers are cut out of the teacher's checkpoint, or it is a Hugging Face model of its own,
    imported and proven as the teacher was. The teacher is there for the proofs alone, beside one
    student.

    Args:
        student: what it looks like and starts from.
        teacher: a `teacher` artifact.
        dataset: a `dataset` artifact; one validation sample serves the proofs, a few more those of
            a model of its own.
        output: the `student` artifact to write.
        models: how the step is spread over processes.
        importance: the `layer-importance` artifact, where layers were measured for all students of
            a run; a student whose measurement it lacks is measured for here.

    Returns:
        Layers, parameters, and the proofs' figures; of a model of its own also those of
        `flagscale.models.pretrained.prove`.

    Raises:
        UserError: the student does not fit the teacher or the processes, the tokenizers differ, its
            source cannot be read or is not supported, or a proof failed.
    """
    parents = _parents(teacher, dataset, check_files=True)
    if parents["teacher"].tokenizer_hash != parents["dataset"].tokenizer_hash:
        raise UserError(
            f"{dataset} was tokenized with {parents['dataset'].tokenizer_hash}, but the teacher's "
            f"tokenizer is {parents['teacher'].tokenizer_hash}: prepare the data with the latter"
        )
    check_pruning(student, models)
    _check_shapes(student, ModelShape.load(teacher), dataset, parents["dataset"].facts, models)
    with pretrained_folder(student.pretrained) as folder:
        return call_on_ranks(
            "convert-student",
            convert_on_rank,
            models.processes,
            student=student,
            folder=folder,
            teacher=teacher,
            dataset=dataset,
            output=output,
            models=models,
            importance=importance,
        )


def convert_on_rank(
    student: StudentRecipe,
    folder: Path | None,
    teacher: Path,
    dataset: Path,
    output: Path,
    models: ModelsRecipe,
    importance: Path | None = None,
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `convert_student`.

    Args:
        student: see there.
        folder: of the model that the student is, if it is one of its own.
        teacher: see there.
        dataset: see there.
        output: see there.
        models: see there.
        importance: see there.
    """
    parents = _parents(teacher, dataset, check_files=False)
    recipe = {"student": student.model_dump(mode="json")}
    seq_length = parents["dataset"].facts["seq_length"]
    stored = getattr(torch, parents["teacher"].facts.get("dtype", "float32"))
    teacher_shape, source = ModelShape.load(teacher), None
    if student.pretrained is not None and folder is not None:
        facts = parents["dataset"].facts
        source = open_student(student.pretrained, folder, teacher_shape, facts)
        shape, stored = source.shape, source.source.dtype()
    else:
        student = meet_targets(teacher_shape, student)
        shape = student_shape(teacher_shape, student)
    dtype = platform.inference_dtype(stored)
    if student.quantization is not None:
        check_quantization(shape, student.quantization, models.sizes)
    args = model_arguments(shape, seq_length, parallelism=models.sizes, params_dtype=dtype)
    with (
        tracked("convert-student", recipe, parents=parents) as run,
        platform.runtime(student.seed, models.sizes),
        use_args(with_teacher(args, teacher, PROOF_LOSS)),
        written(output, "student", recipe, parents, run) as staging,
    ):
        splits = [Split.of(parents["dataset"], name) for name in ("train", "validation")]
        run.log_inputs(splits, ["calibration", "validation"])
        batch, unigram = audited_batch(dataset, shape.vocab_size)
        made = make_student(student, source, teacher, dataset, args, stored, importance)
        figures = {"layers": _check_layers(made.model, shape)}
        logits_bsv = forward(made.model, batch["tokens"])
        describe = partial(describe_student, source, shape, teacher, dataset, staging.path)
        on_first_rank(staging.path, "could not be described", describe)
        save_weights(made.model, staging.path / WEIGHTS, stored)
        figures["parameters"] = float(count_parameters(staging.path / WEIGHTS))
        del made.model  # what is proven is the artifact
        if source is not None:
            staging.facts |= source.facts() | {"zero_weights": made.zero_weights}
            figures |= pretrained.prove(source, staging.path, dataset, models.sizes)
        is_changed = made.choice.fits or made.narrowing is not None
        copied = None if is_changed else list(made.choice.kept) or None
        if student.quantization is not None:
            quantized, logits_bsv = quantize(
                student.quantization, (teacher, dataset), args, stored, staging.path, batch
            )
            staging.facts["quantization"] = quantized
            figures |= quantization_figures(quantized)
            args = replace(
                args, shape=ModelShape.load(staging.path), export_quant_load=staging.path
            )
            if FORMATS[student.quantization.recipe].scales_inputs:
                copied = None  # weights that were divided by scales are the student's own
        staging.facts["copied_layers"] = copied
        artifacts = Artifacts(staging.path, teacher, dataset, parents, copied, stored)
        proven, findings = prove(artifacts, args, batch, unigram, logits_bsv)
        figures |= proven
        figures |= needs(shape, seq_length, stored)
        staging.facts.update(figures, seq_length=seq_length, dtype=str(stored).split(".")[-1])
        staging.tokenizer_hash = parents["teacher"].tokenizer_hash
        run.log_metrics(figures)
        if is_first_rank():
            record_narrowing(made.narrowing, staging, run)
            widths = made.narrowing.shares if made.narrowing is not None else {}
            record(made.choice, widths, shape, staging, run)
            record_audit(findings, shape, figures["parameters"], staging, run)
            logger.info(
                "student: %d layers, %.1fM parameters; KD loss %.3f nats a token at the start, "
                "%.1g against itself; every parameter learns; reloads to the same logits",
                shape.num_layers,
                figures["parameters"] / 1e6,
                figures["kd_loss_at_start"],
                figures["kd_loss_when_equal"],
            )
    return figures


def _check_shapes(
    student: StudentRecipe,
    teacher: ModelShape,
    dataset: Path,
    facts: Mapping[str, Any],
    models: ModelsRecipe,
) -> None:
    """Refuse what the processes cannot share, or what is not the teacher's, before long work."""
    check_layout(teacher, models.sizes, facts["seq_length"], section="models")
    if student.pretrained is not None:
        check_pretrained(student.pretrained, teacher, dataset, facts, models.sizes)
        return
    shape = student_shape(teacher, student)
    check_layout(shape, models.sizes, facts["seq_length"], section="models")
    if student.quantization is not None:
        check_quantization(shape, student.quantization, models.sizes)


def _parents(teacher: Path, dataset: Path, *, check_files: bool) -> dict[str, Manifest]:
    return {
        "teacher": open_artifact(teacher, "teacher", check_files),
        "dataset": open_artifact(dataset, "dataset", check_files),
    }


def _check_layers(model: GPTModel, shape: ModelShape) -> float:
    """What was built must be what the recipe says; all stages of the pipeline know how many."""
    layers = torch.tensor(float(len(model.decoder.layers)), device=platform.device())
    torch.distributed.all_reduce(layers, group=get_pipeline_model_parallel_group())
    if layers != shape.num_layers:
        raise UserError(f"the student has {layers:.0f} layers, but must have {shape.num_layers}")
    return layers.item()
