"""transformer-engine's user buffers: what `tp_comm_overlap` exchanges through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flagscale.errors import UserError
from flagscale.megatron.arguments import Arguments

BACKEND = "nccl"  # as Megatron-Core's `tp_comm_bootstrap_backend` is by default


@contextmanager
def user_buffers(args: Arguments) -> Iterator[None]:
    """The buffers, while a training with `tp_comm_overlap` lasts; nothing without it.

    transformer-engine has one set a process, of one shape: all tokens of a micro-batch that the
    tensor-parallel ranks share, by the hidden size. All ranks call it, inside `platform.runtime`.

    Args:
        args: of the run, resolved.

    Raises:
        UserError: transformer-engine cannot set them up, in its own words.
    """
    if not args.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    sizes = args.parallelism
    try:
        base.initialize_ub(
            shape=[
                args.seq_length * args.micro_batch_size // sizes.context_parallel_size,
                args.shape.hidden_size,
            ],
            tp_size=sizes.tensor_model_parallel_size,
            quantization_modes=[base.UserBufferQuantizationMode.NONE],
            dtype=args.params_dtype,
            bootstrap_backend=BACKEND,
        )
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"training.tp_comm_overlap=true: transformer-engine cannot set up its user buffers: "
            f"{error}; they need GPUs with CUDA multicast (NVSwitch), all tensor-parallel ranks on "
            "one node; set it to auto"
        ) from error
    try:
        yield
    finally:
        base.destroy_ub()
