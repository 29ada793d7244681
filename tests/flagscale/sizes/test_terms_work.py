"""What intermediate and attention terms cost in time, against what their code is seen to do."""

from dataclasses import replace

import pytest
import torch
from shapes import STUDENT, TEACHER
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flagscale.megatron.paired_layers import HiddenPair, PairedLayer
from flagscale.post_training.attention_relations import Positions, relation_loss
from flagscale.post_training.hidden_states import hidden_loss
from flagscale.recipe import DistillationRecipe
from flagscale.sizes.intermediate import Terms
from flagscale.sizes.layout import Layout
from flagscale.sizes.machine import ACCELERATORS, Machine
from flagscale.sizes.steps import StepPlan

TOKENS, HEADS = 48, 4
COPIES = (torch.ops.aten._unsafe_view, torch.ops.aten._to_copy)
NARROW = replace(STUDENT, hidden_size=128, num_attention_heads=4, num_query_groups=4)


class Passes(TorchDispatchMode):
    """Counts how often something of a size is read or written; views are not."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aliases = [one.alias_info for one in (*func._schema.arguments, *func._schema.returns)]
        is_view = any(one is not None and not one.is_write for one in aliases)
        if not is_view and func.overloadpacket not in COPIES:
            tensors = [one for one in tree_leaves((args, kwargs, result)) if torch.is_tensor(one)]
            self.count += sum(
                one.numel() == self.size and one.is_floating_point() for one in tensors
            )
        return result


def terms(**values):
    recipe = DistillationRecipe.model_validate(values)
    return Terms(recipe, NARROW, TEACHER, Layout(), 4)


@pytest.mark.parametrize("trains", [False, True], ids=["validation", "training"])
@pytest.mark.parametrize("fit", ["kl", "mse", "cosine"])
def test_attention(fit, trains):
    heads = {"attention_relation_heads": HEADS, "attention_relations": ["query"]}
    estimated = terms(attention_layer_pairs=[[0, 0]], attention_fit=fit, **heads)
    ours, theirs = (
        {"query": torch.randn(TOKENS, 1, shape.num_attention_heads * shape.kv_channels)}
        for shape in (NARROW, TEACHER)
    )
    ours["query"].requires_grad_(trains)
    with Passes(HEADS * TOKENS * TOKENS) as passes, FlopCounterMode(display=False) as operations:
        positions = Positions([(0, TOKENS)])
        loss = relation_loss(ours, theirs, ["query"], HEADS, fit, positions)
        if trains:
            loss.sum().backward()
    found = estimated.flops(TOKENS, 1, TOKENS, trains=trains)
    assert found == operations.get_total_flops()
    touched = estimated.touched(TOKENS, 1, TOKENS, trains=trains)
    assert touched == 4 * passes.size * passes.count


@pytest.mark.parametrize("trains", [False, True], ids=["validation", "training"])
def test_projections(trains):
    estimated = terms(intermediate_layer_pairs=[["decoder.layers.0", "decoder.layers.0", "mse"]])
    sides = [PairedLayer("decoder.layers.0", 0, "", one.hidden_size) for one in (NARROW, TEACHER)]
    pair, linear = HiddenPair(0, *sides, "mse"), torch.nn.Linear(128, 256)
    ours, theirs = torch.randn(TOKENS, 1, 128, requires_grad=True), torch.randn(TOKENS, 1, 256)
    with FlopCounterMode(display=False) as operations:
        loss = hidden_loss(pair, ours, theirs, linear)
        if trains:
            loss.sum().backward()
    found = estimated.flops(TOKENS, 1, TOKENS, trains=trains)
    assert found == operations.get_total_flops()
    assert estimated.touched(TOKENS, 1, TOKENS, trains=trains) == 0


def test_long_sequences_leave_later_tokens_out():
    """Blocks of rows, whose columns end with their last row: half of the square at most."""
    estimated = terms(attention_layer_pairs=[[0, 0]], attention_relations=["query"])
    a_token = [
        estimated.touched(1, 1, length, trains=True) / length for length in (64, 2048, 65536)
    ]
    assert a_token[0] > a_token[1] > a_token[2]
    assert a_token[2] == pytest.approx(a_token[0] / 2, rel=0.01)


def test_time_of_scores_is_that_of_memory():
    known = ACCELERATORS["H100-80GB"]
    unknown = replace(known, bandwidth=None)
    plan = StepPlan("", Machine(None, 1, known), Layout(), {}, *[0.0] * 7, 0.4)
    scores = replace(plan, touched=0.7 * 3.35e12)
    assert plan.seconds == 0
    assert scores.seconds == pytest.approx(1)
    guessed = replace(scores, machine=Machine(None, 1, unknown))
    assert guessed.seconds == pytest.approx(1, rel=0.05)
