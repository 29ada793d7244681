"""The distributed optimiser's state as boxes. Layouts: test_resume_layouts."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch.utils._python_dispatch import TorchDispatchMode

from flagscale.checkpoint.weights import by_chunk, sharded_model
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.recipe import TrainingRecipe
from flagscale.train.checkpoints import sharded_optimizer
from flagscale.train.setup import build_model_chunks, setup_training
from tests.flagscale.checkpoint.checkpoint_shape import SHAPE


@hypothesis.given(strategies.lists(strategies.integers(1, 5), max_size=4), strategies.data())
def test_boxes_are_the_range_in_order(shape, data):
    size = math.prod(shape)
    start = data.draw(strategies.integers(0, size))
    end = data.draw(strategies.integers(start, size))
    whole = torch.arange(size).reshape(shape)
    found = list(sharded_optimizer.boxes(tuple(shape), start, end))
    cut = [
        whole[tuple(map(slice, low, map(sum, zip(low, sizes, strict=True))))]
        for low, sizes in found
    ]
    elements = [element for box in cut for element in box.reshape(-1).tolist()]
    assert elements == list(range(start, end))
    assert len(found) <= max(1, 2 * len(shape) - 1)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations make, not counting views."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.bytes += result.untyped_storage().nbytes()
        return result


@pytest.fixture
def trainer():
    parallelism = {"use_distributed_optimizer": True}
    recipe = TrainingRecipe(train_iters=9, lr=1e-3, parallelism=parallelism)
    args = training_arguments(SHAPE, 16, recipe)
    with platform.runtime(), use_args(args):
        trainer = setup_training(build_model_chunks(args), args, recipe)
        trainer.optimizer.step()
        yield trainer


def test_a_save_gathers_and_copies_nothing(trainer):
    weights = by_chunk(trainer.chunks, sharded_model)
    parameters = sum(p.numel() for p in trainer.chunks[0].parameters())
    with Allocations() as gathered:
        trainer.optimizer.sharded_state_dict(
            weights, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        )
    assert gathered.bytes > 12 * parameters, "does not count what Megatron-Core gathers"
    with Allocations() as ours:
        (state,) = sharded_optimizer.sharded_state(trainer.optimizer, weights)
    assert ours.bytes < parameters / 10
    boxes = [one for one in nested_values(state) if isinstance(one, ShardedTensor)]
    assert sum(box.data.numel() for box in boxes) == 2 * parameters  # fp32: both moments


def test_what_is_read_is_read_in_place(trainer):
    weights = by_chunk(trainer.chunks, sharded_model)
    sharded_optimizer.sharded_state(trainer.optimizer, weights, is_loading=True)
    (state,) = sharded_optimizer.sharded_state(trainer.optimizer, weights)
    for box in nested_values(state):
        if isinstance(box, ShardedTensor):
            box.data.fill_(3.0)
    (inner,) = trainer.optimizer.chained_optimizers
    for moments in inner.optimizer.state.values():
        assert moments["exp_avg"].unique().tolist() == [3.0]
        assert moments["exp_avg_sq"].unique().tolist() == [3.0]
