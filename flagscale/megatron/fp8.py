"""What multiplying in FP8 needs, refused before transformer-engine asserts it deep inside."""

from __future__ import annotations

import torch

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments


def check_fp8(args: Arguments) -> None:
    """Make sure of what the recipe's `fp8` needs, if it is on.

    Raises:
        UserError: layers, a GPU or sizes that cannot.
    """
    if args.fp8 == "none":
        return
    if args.transformer_impl != "transformer_engine" or not platform.HAS_GPU:
        raise UserError(
            f"training.fp8={args.fp8} needs training.transformer_impl=transformer_engine on a GPU, "
            f"but it is {args.transformer_impl} on {platform.device()}; set training.fp8=none"
        )
    check_fp8_device(args, torch.cuda.get_device_capability())
    check_fp8_sizes(args)


def check_fp8_device(args: Arguments, capability: tuple[int, int]) -> None:
    """Make sure of a GPU that has the format, which transformer-engine asks for at the first batch.

    Args:
        args: with FP8.
        capability: the GPU's compute capability.

    Raises:
        UserError: it is too old.
    """
    least = {"mxfp8": (10, 0), "blockwise": (9, 0)}.get(args.fp8_recipe, (8, 9))
    if capability < least:
        needed, found = (".".join(map(str, one)) for one in (least, capability))
        raise UserError(
            f"training.fp8_recipe={args.fp8_recipe} needs a GPU of compute capability {needed} "
            f"(Ada 8.9, Hopper 9.0, Blackwell 10.0), but this one has {found}; take delayed or "
            "tensorwise, or set training.fp8=none"
        )


def check_fp8_sizes(args: Arguments) -> None:
    """Make sure of what transformer-engine asserts deep inside a matrix product.

    Its kernels want the columns of every operand to be a multiple of 16 and the rows of 8; blocks
    of `mxfp8` are 32 wide, those of `blockwise` 128 wherever they are gathered, which is with
    sequence parallelism.

    Raises:
        UserError: which size is no such multiple.
    """
    shape, sizes = args.shape, args.parallelism
    tensor = sizes.tensor_model_parallel_size
    columns, rows = {"mxfp8": (32, 32)}.get(args.fp8_recipe, (16, 8))
    if args.fp8_recipe == "blockwise" and sizes.sequence_parallel:
        columns, rows = 128, 128
    shares = sizes.context_parallel_size * (tensor if sizes.sequence_parallel else 1)
    heads = shape.kv_channels * shape.num_attention_heads
    wanted = [
        ("hidden_size", shape.hidden_size, columns),
        ("ffn_hidden_size / TP", shape.ffn_hidden_size // tensor, columns),
        (
            "micro_batch_size x seq_length / ranks that share it",
            args.micro_batch_size * args.seq_length // shares,
            rows,
        ),
    ]
    if not shape.architecture.multi_latent_attention:
        wanted.append(("num_attention_heads x kv_channels / TP", heads // tensor, columns))
    for name, value, multiple in wanted:
        if value % multiple:
            raise UserError(
                f"training.fp8={args.fp8} with fp8_recipe={args.fp8_recipe}: {name} = {value} must "
                f"be a multiple of {multiple}"
            )
