"""The model provider where ModelOpt has a part: the student with its teacher inside."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint import load_weights
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.global_vars import get_args
from flagscale.megatron.gpt_builder import build_gpt_model
from flagscale.megatron.layout import sizes_for
from flagscale.megatron.memory_history import record_memory_history
from flagscale.megatron.paired_layers import check_paired_layers
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe
from flagscale.recipe.combinations import check_combination
from flagscale.recipe.quantized_training import check_quantized_training
from flagscale.recipe.served import check_served

if TYPE_CHECKING:
    from flagscale.post_training.upstream import mtd


def model_provider(pre_process: bool = True, post_process: bool = True) -> mtd.DistillationModel:
    """Build the student, with random weights, converted for distillation from the run's teacher.

    Raises:
        UserError: the teacher's artifact is missing or damaged, or memory is to be recorded without
            a GPU.
        ValueError: the two vocabularies differ, or an option cannot be distilled with.
    """
    # Steps that only run a model get it from the same function, and need no ModelOpt.
    from flagscale.post_training.cached_teacher import CachedTeacher
    from flagscale.post_training.conversion import convert_for_distillation
    from flagscale.teacher_outputs import TeacherOutputs

    args = get_args()
    distillation = args.export_kd_cfg or DistillationRecipe()
    # Also when the recipe is read; arguments may come from elsewhere.
    check_combination(distillation, args, args.shape.architecture)
    if args.use_dualpipev or args.overlap_moe_expert_parallel_comm:
        raise ValueError(
            f"use_dualpipev={args.use_dualpipev}, overlap_moe_expert_parallel_comm="
            f"{args.overlap_moe_expert_parallel_comm} with ModelOpt's distillation: both must be "
            "False, its forward pass is one call of the model"
        )
    folder = args.export_kd_teacher_load
    assert folder is not None, "called without ModelOpt arguments"
    teacher_shape = ModelShape.load(folder)
    if args.record_memory_history:
        record_memory_history(args.memory_snapshot_path)
    if args.export_kd_teacher_outputs is not None:
        outputs = TeacherOutputs.open(args.export_kd_teacher_outputs)
        check_served(distillation, outputs.codec.options)
        student = with_quantizers(build_gpt_model(args, pre_process, post_process), args)
        cached = CachedTeacher(teacher_shape, outputs, student.config, pre_process, post_process)
        tied = not teacher_shape.untie_embeddings_and_output_weights
        cached.load_output_layer(folder / "weights", tied=tied)
        return convert_for_distillation(student, cached, distillation, args.seed)
    check_paired_layers(distillation, args.shape, teacher_shape, args.parallelism)
    teacher = live_teacher(args, pre_process, post_process)
    student = with_quantizers(build_gpt_model(args, pre_process, post_process), args)
    return convert_for_distillation(student, teacher, distillation, args.seed)


def with_quantizers(model: GPTModel, args: Arguments) -> GPTModel:
    """The model, in place, quantised as its shape says; one that is not quantised stays itself.

    Args:
        model: from `build_gpt_model`.
        args: that it was built with; `export_quant_load` is needed.

    Raises:
        UserError: what the quantisers know cannot be read.
        ValueError: it is trained in a way that quantised layers cannot be.
    """
    quantization = args.shape.quantization
    if quantization is None:
        return model
    from flagscale.post_training.quantizers import load_quantizers

    # Also when the recipe is read; arguments may come from elsewhere.
    check_quantized_training(quantization, args)
    if args.export_quant_load is None:
        raise ValueError(f"shape.quantization={quantization}: needs export_quant_load")
    load_quantizers(model, quantization, args.export_quant_load)
    return model


def live_teacher(args: Arguments, pre_process: bool = True, post_process: bool = True) -> GPTModel:
    """The teacher itself, with its weights, frozen, in evaluation mode.

    Args:
        args: of the run, which name its artifact.
        pre_process: the chunk computes the embedding.
        post_process: the chunk computes the output layer.

    Raises:
        UserError: its artifact is missing or damaged, or it does not fit the layout.
    """
    folder = args.export_kd_teacher_load
    assert folder is not None, "called without ModelOpt arguments"
    teacher = _build_teacher(args, ModelShape.load(folder), pre_process, post_process)
    load_weights(teacher, folder / "weights")
    return teacher


def _build_teacher(
    args: Arguments, shape: ModelShape, pre_process: bool, post_process: bool
) -> GPTModel:
    sizes = sizes_for(shape, args.parallelism)  # the student's experts may be spread over ranks
    # Never in FP8: it is what the student is held to. And the scales of `delayed`, which no
    # checkpoint has of a teacher, would start anew whenever training is resumed.
    teacher_args = replace(
        args,
        shape=shape,
        parallelism=sizes,
        recompute_granularity="none",
        fp8="none",
        # User buffers have the student's width; only one set of them can be.
        tp_comm_overlap=args.tp_comm_overlap
        and shape.hidden_size == args.shape.hidden_size
        and shape.architecture.is_default,
    )
    teacher = build_gpt_model(teacher_args, pre_process, post_process)
    return teacher.requires_grad_(False).eval()
