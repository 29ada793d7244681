"""convert-student: the student's first weights, and proof that distilling into it will work."""

from __future__ import annotations

import logging
import math
import shutil
from functools import partial
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_pipeline_model_parallel_group

from flagscale.artifacts import Manifest, open_artifact
from flagscale.checkpoint import load_layers, save_weights
from flagscale.checkpoint.weights import count_parameters
from flagscale.errors import UserError
from flagscale.evaluation.audit_report import AUDIT, render
from flagscale.execution.launch import call_on_ranks, is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments, model_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.layout import check_layout
from flagscale.megatron.shape import ModelShape, hf_config_for
from flagscale.models.audit_artifacts import audited_batch
from flagscale.models.distillation_proof import PROOF_LOSS
from flagscale.models.hf_description import write_config
from flagscale.models.megatron import WEIGHTS, build_model, forward
from flagscale.models.random_weights import with_random_weights
from flagscale.models.source import load_hf_config
from flagscale.models.student_audit import Artifacts, audit_student, load_pair
from flagscale.models.student_shape import layers_to_keep, student_shape
from flagscale.post_training.findings import (
    Finding,
    as_text,
    failures,
    not_run,
    within,
)
from flagscale.recipe import ModelsRecipe, StudentRecipe
from flagscale.steps.on_ranks import tracked, written

logger = logging.getLogger(__name__)


def convert_student(
    student: StudentRecipe,
    teacher: Path,
    dataset: Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
) -> dict[str, float]:
    """Make the student and prove ModelOpt's distillation conversion of it.

    Its layers are cut out of the teacher's checkpoint; the teacher is there for the proofs alone,
    beside one student.

    Args:
        student: what it looks like and starts from.
        teacher: a `teacher` artifact.
        dataset: a `dataset` artifact; one validation sample serves the proofs.
        output: the `student` artifact to write.
        models: how the step is spread over processes.

    Returns:
        Layers, parameters, and the proofs' figures.

    Raises:
        UserError: the student does not fit the teacher or the processes, the tokenizers differ, or
            a proof failed.
    """
    parents = _parents(teacher, dataset, check_files=True)
    if parents["teacher"].tokenizer_hash != parents["dataset"].tokenizer_hash:
        raise UserError(
            f"{dataset} was tokenized with {parents['dataset'].tokenizer_hash}, but the teacher's "
            f"tokenizer is {parents['teacher'].tokenizer_hash}: prepare the data with the latter"
        )
    teacher_shape = ModelShape.load(teacher)
    for shape in (teacher_shape, student_shape(teacher_shape, student)):
        seq_length = parents["dataset"].facts["seq_length"]
        check_layout(shape, models.sizes, seq_length, section="models")
    return call_on_ranks(
        "convert-student",
        convert_on_rank,
        models.processes,
        student=student,
        teacher=teacher,
        dataset=dataset,
        output=output,
        models=models,
    )


def convert_on_rank(
    student: StudentRecipe, teacher: Path, dataset: Path, output: Path, models: ModelsRecipe
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `convert_student`."""
    parents = _parents(teacher, dataset, check_files=False)
    shape = student_shape(ModelShape.load(teacher), student)
    seq_length = parents["dataset"].facts["seq_length"]
    stored = getattr(torch, parents["teacher"].facts.get("dtype", "float32"))
    dtype = platform.inference_dtype(stored)
    args = model_arguments(shape, seq_length, parallelism=models.sizes, params_dtype=dtype)
    recipe = {"student": student.model_dump(mode="json")}
    with (
        tracked("convert-student", recipe, parents=parents) as run,
        platform.runtime(student.seed, models.sizes),
        use_args(with_teacher(args, teacher, PROOF_LOSS)),
        written(output, "student", recipe, parents, run) as staging,
    ):
        batch, unigram = audited_batch(dataset, shape.vocab_size)
        model = _build(student, shape, teacher, args, stored)
        if student.init != "scratch":
            staging.facts["keep_layers"] = _kept(student, teacher)
        figures = {"layers": _check_layers(model, shape)}
        logits_bsv = forward(model, batch["tokens"])
        if is_first_rank():
            _save_description(shape, teacher, staging.path)
        save_weights(model, staging.path / WEIGHTS, stored)
        figures["parameters"] = float(count_parameters(staging.path / WEIGHTS))
        del model  # what is proven is the artifact
        kept = staging.facts.get("keep_layers")
        artifacts = Artifacts(staging.path, teacher, dataset, parents, kept, stored)
        proven, findings = _prove(artifacts, args, batch, unigram, logits_bsv)
        figures |= proven
        staging.facts["audit"] = audited = [finding.values() for finding in findings]
        if is_first_rank():
            told = f"{shape.num_layers} layers, {figures['parameters'] / 1e6:.1f}M parameters"
            (staging.path / AUDIT).write_text(render(audited, told), encoding="utf-8")
            run.log_artifact(staging.path / AUDIT)
        staging.facts.update(figures, seq_length=seq_length, dtype=str(stored).split(".")[-1])
        staging.tokenizer_hash = parents["teacher"].tokenizer_hash
        run.log_metrics(figures)
        if is_first_rank():
            logger.info(
                "student: %d layers, %.1fM parameters; KD loss %.3f nats a token at the start, "
                "%.1g against itself; every parameter learns; reloads to the same logits",
                shape.num_layers,
                figures["parameters"] / 1e6,
                figures["kd_loss_at_start"],
                figures["kd_loss_when_equal"],
            )
    return figures


def _parents(teacher: Path, dataset: Path, *, check_files: bool) -> dict[str, Manifest]:
    return {
        "teacher": open_artifact(teacher, "teacher", check_files),
        "dataset": open_artifact(dataset, "dataset", check_files),
    }


def _kept(student: StudentRecipe, teacher: Path) -> list[int]:
    return list(layers_to_keep(ModelShape.load(teacher).num_layers, student))


def _build(
    student: StudentRecipe, shape: ModelShape, teacher: Path, args: Arguments, stored: torch.dtype
) -> GPTModel:
    """This rank's part of the student, with weights that lose nothing when they are stored.

    A teacher's own weights do not anyway: the student is stored as the teacher is.
    """
    build = partial(build_model, shape, args.seq_length, args.parallelism, args.params_dtype)
    if student.init == "scratch":
        model = with_random_weights(build, student.seed)
    else:
        model, kept = build(), _kept(student, teacher)
        num_layers = ModelShape.load(teacher).num_layers
        logger.info("keeping layers %s of %d", kept, num_layers)
        load_layers(model, teacher / WEIGHTS, kept, num_layers)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(stored))
    return model


def _check_layers(model: GPTModel, shape: ModelShape) -> float:
    """What was built must be what the recipe says; all stages of the pipeline know how many."""
    layers = torch.tensor(float(len(model.decoder.layers)), device=platform.device())
    torch.distributed.all_reduce(layers, group=get_pipeline_model_parallel_group())
    if layers != shape.num_layers:
        raise UserError(f"the student has {layers:.0f} layers, but must have {shape.num_layers}")
    return layers.item()


def _save_description(shape: ModelShape, teacher: Path, folder: Path) -> None:
    """All of the artifact but weights: the tokenizer and what else the teacher's `hf/` holds.

    The configuration goes along too, as the student's, unless none describes the student.
    """
    shape.save(folder)
    if not shape.fits_hugging_face:
        configurations = shutil.ignore_patterns("config.json", "generation_config.json")
        shutil.copytree(teacher / "hf", folder / "hf", ignore=configurations)
        return
    shutil.copytree(teacher / "hf", folder / "hf")
    template = load_hf_config(teacher / "hf")
    write_config(hf_config_for(shape, template), folder / "hf")


def _prove(
    artifacts: Artifacts,
    args: Arguments,
    batch: dict[str, torch.Tensor],
    unigram: float,
    logits_bsv: torch.Tensor | None,
) -> tuple[dict[str, float], list[Finding]]:
    """The audit of the artifacts as they are stored; raises what it finds wrong.

    Args:
        artifacts: the student's, and what it was made of.
        args: that it was built with.
        batch: see `audited_batch`.
        unigram: see there.
        logits_bsv: this rank's part of what the student predicted before it was stored.
    """
    student, teacher = load_pair(artifacts, args)
    reloaded = _reloaded(forward(student, batch["tokens"]), logits_bsv)
    audited = audit_student(artifacts, student, teacher, batch, unigram)
    findings = [
        reloaded,
        *audited.findings,
        not_run("TP1 equals TP2", "it takes more processes: `make doctor` runs it"),
    ]
    if is_first_rank():
        logger.info("audit of the conversion:\n%s", as_text(findings))
    if wrong := failures(findings):
        raise UserError("the audit of the conversion failed: " + "; ".join(wrong))
    return {
        "reload_logit_difference": reloaded.figure or 0.0,
        "kd_loss_when_equal": audited.kd_loss_when_equal,
        "kd_loss_at_start": audited.kd_loss_at_start,
    }, findings


def _reloaded(reloaded: torch.Tensor | None, before: torch.Tensor | None) -> Finding:
    """Largest difference of the logits on any rank; must be none."""
    largest = torch.zeros((), device=platform.device())
    if reloaded is not None and before is not None:
        largest = (reloaded - before).abs().max().float().nan_to_num(math.inf)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return within(
        "saved and loaded",
        largest.item(),
        0,
        "largest difference of the student's logits",
        f"the saved student's logits differ by {largest:.3g} once loaded, not 0",
    )
