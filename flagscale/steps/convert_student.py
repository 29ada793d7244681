"""convert-student: the student's first weights, and proof that distilling into it will work."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoConfig

from flagscale import tracking
from flagscale.artifacts import new_artifact, open_artifact
from flagscale.checkpoint import save_weights
from flagscale.data.loader import validation_batches
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape, hf_config_for
from flagscale.models.distillation_proof import prove_distillation
from flagscale.models.megatron import WEIGHTS, build_model, load_model, logits
from flagscale.models.student import copy_from_teacher
from flagscale.models.student_shape import layers_to_keep, student_shape
from flagscale.recipe import ModelsRecipe, StudentRecipe

logger = logging.getLogger(__name__)


def convert_student(
    student: StudentRecipe,
    teacher: Path,
    dataset: Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
) -> dict[str, float]:
    """Make the student and prove ModelOpt's distillation conversion of it.

    Args:
        student: what it looks like and starts from.
        teacher: a `teacher` artifact.
        dataset: a `dataset` artifact; one validation sample serves the proofs.
        output: the `student` artifact to write.
        models: how the step is spread over processes.

    Returns:
        Layers, parameters, and the proofs' figures.

    Raises:
        UserError: the student does not fit the teacher, the tokenizers differ, or a proof failed.
    """
    parents = {
        "teacher": open_artifact(teacher, "teacher"),
        "dataset": open_artifact(dataset, "dataset"),
    }
    if parents["teacher"].tokenizer_hash != parents["dataset"].tokenizer_hash:
        raise UserError(
            f"{dataset} was tokenized with {parents['dataset'].tokenizer_hash}, but the teacher's "
            f"tokenizer is {parents['teacher'].tokenizer_hash}: prepare the data with the latter"
        )
    teacher_shape = ModelShape.load(teacher)
    shape = student_shape(teacher_shape, student)
    seq_length = parents["dataset"].facts["seq_length"]
    recipe = {"student": student.model_dump(mode="json")}
    with (
        tracking.step_run("convert-student", recipe, parents=parents) as run,
        platform.runtime(student.seed, models.sizes),
        use_args(model_arguments(shape, seq_length)),
        new_artifact(output, "student", recipe, parents, run.log_artifact) as staging,
    ):
        teacher_model = load_model(teacher, seq_length)
        student_model = build_model(shape, seq_length)
        if student.init != "scratch":
            kept = layers_to_keep(teacher_shape.num_layers, student)
            copy_from_teacher(student_model, teacher_model, kept)
            staging.facts["keep_layers"] = list(kept)
            logger.info("keeping layers %s of %d", list(kept), teacher_shape.num_layers)
        batch = _batch(dataset)
        figures = _check_shape(student_model, shape)
        _save(student_model, shape, teacher, staging.path)
        reloaded = load_model(staging.path, seq_length)
        figures["reload_logit_difference"] = _same_logits(student_model, reloaded, batch["tokens"])
        twin = load_model(teacher, seq_length)
        figures |= prove_distillation(reloaded, teacher_model, twin, batch)
        staging.facts.update(figures, seq_length=seq_length)
        staging.tokenizer_hash = parents["teacher"].tokenizer_hash
        run.log_metrics(figures)
        logger.info(
            "student: %d layers, %.1fM parameters; KD loss %.3f nats a token at the start, %.1g "
            "against itself; every parameter learns; reloads to the same logits",
            shape.num_layers,
            figures["parameters"] / 1e6,
            figures["kd_loss_at_start"],
            figures["kd_loss_when_equal"],
        )
    return figures


def _batch(dataset: Path) -> dict[str, torch.Tensor]:
    """One validation sample, on the models' device."""
    with tempfile.TemporaryDirectory(prefix="flagscale-convert-") as cache:
        batches = validation_batches(
            dataset, Path(cache), micro_batch_size=1, global_batch_size=1, eval_iters=1
        )
        return {name: value.to(platform.device()) for name, value in next(iter(batches)).items()}


def _check_shape(model: GPTModel, shape: ModelShape) -> dict[str, float]:
    """What was built must be what the recipe says, counted from the tensors."""
    embedding = model.embedding.word_embeddings.weight
    built = (len(model.decoder.layers), tuple(embedding.shape))
    wanted = (shape.num_layers, (shape.padded_vocab_size, shape.hidden_size))
    if built != wanted:
        raise UserError(f"the student has (layers, embedding) {built}, but must have {wanted}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"layers": float(len(model.decoder.layers)), "parameters": float(parameters)}


def _save(model: GPTModel, shape: ModelShape, teacher: Path, folder: Path) -> None:
    """Write the artifact: the tokenizer and what else the teacher's `hf/` holds go along.

    The configuration does too, as the student's, unless no configuration describes the student.
    """
    shape.save(folder)
    save_weights(model, folder / WEIGHTS)
    if not shape.architecture.is_default:
        configurations = shutil.ignore_patterns("config.json", "generation_config.json")
        shutil.copytree(teacher / "hf", folder / "hf", ignore=configurations)
        return
    shutil.copytree(teacher / "hf", folder / "hf")
    template = AutoConfig.from_pretrained(teacher / "hf")
    hf_config_for(shape, template).save_pretrained(folder / "hf")


def _same_logits(model: GPTModel, reloaded: GPTModel, tokens: torch.Tensor) -> float:
    """Largest difference of the logits; must be none."""
    largest = (logits(reloaded, tokens) - logits(model, tokens)).abs().max().item()
    if largest > 0:
        raise UserError(f"the saved student's logits differ by {largest:.3g} once loaded, not 0")
    return largest
