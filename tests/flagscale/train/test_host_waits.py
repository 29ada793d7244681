"""How often a training step waits for the device: counted where it asks for a value of a tensor."""

import traceback

import pytest
import torch

from flagscale.checkpoint import load_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.train.loop import train_step
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training

ASKING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


# On a CPU, of kernels: Apex's, and the divergences' Triton kernel.
STAND_INS = {"local_multi_tensor_applier", "in_chunks"}


class OnHost(torch.Tensor):
    """What has been brought to the host already, and what is computed of it there."""


@pytest.fixture
def waits(monkeypatch):
    """One entry for each time that a value is asked for."""
    found = []
    for name in ASKING:
        original = getattr(torch.Tensor, name)

        def asking(self, *args, _name=name, _original=original):
            # Once where the CPU's adapter calls on; not in what stands in there for a kernel.
            callers = [frame.name for frame in traceback.extract_stack()]
            if callers.count("asking") > 1 or isinstance(self, OnHost) or STAND_INS & {*callers}:
                return _original(self, *args)
            found.append(_name)
            result = _original(self, *args)
            return result.as_subclass(OnHost) if _name == "cpu" else result

        monkeypatch.setattr(torch.Tensor, name, asking)
    return found


def count(waits, micro_batches, teacher, student, dataset, folder) -> int:
    """Waits of a second step, which is like all later ones."""
    training = TrainingRecipe(train_iters=2, lr=1e-3, global_batch_size=micro_batches)
    args = training_arguments(ModelShape.load(student), 64, training)
    args = with_teacher(args, teacher, DistillationRecipe())
    with platform.runtime(), use_args(args):
        chunks = build_model_chunks(args)
        load_weights(chunks, student / "weights")
        trainer = setup_training(chunks, args, training)
        batches = RankBatches(dataset, folder, args, training).train(0)
        train_step(trainer, batches)
        waits.clear()
        train_step(trainer, batches)
        return len(waits)


def test_one_wait_a_micro_batch(waits, teacher, student, dataset, tmp_path):
    two, four = (
        count(waits, number, teacher, student, dataset, tmp_path / "data") for number in (2, 4)
    )
    assert (four - two) / 2 == 1, waits
    assert two - 2 == 4, waits  # a step's own


def test_packed_samples_bring_their_longest_along(waits, student, dataset, tmp_path):
    """Outside of attention, which transformer-engine computes on a GPU."""
    from flagscale.train.batches import get_batch

    training = TrainingRecipe(train_iters=1, lr=1e-3, reset_attention_mask=True)
    args = training_arguments(ModelShape.load(student), 64, training)
    with platform.runtime(), use_args(args):
        (batches,) = RankBatches(dataset, tmp_path / "data", args, training).train(0)
        waits.clear()
        packed = get_batch(batches).packed_seq_params
        assert waits == []
    borders = packed.cu_seqlens_q
    assert packed.max_seqlen_q == int((borders[1:] - borders[:-1]).max())
