"""Packed samples, padding included: each document's loss is what it would be alone, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.checkpoint import load_weights
from flagscale.megatron.arguments import with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.recipe import DistillationRecipe
from flagscale.train.train_gpt import forward_step, model_provider

ROWS, LENGTH = 2, 64
TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def models(args, student, teacher):
    """(arguments, model) of standard training and of distillation."""
    packed = replace(args, reset_attention_mask=True)
    found = {}
    for kind, chosen in (
        ("standard", packed),
        (
            "distillation",
            with_teacher(packed, teacher, DistillationRecipe(temperature=TEMPERATURE)),
        ),
    ):
        with use_args(chosen):
            model = model_provider()
            load_weights(model, student / "weights")
        found[kind] = chosen, model
    return found


@st.composite
def packings(draw):
    """Where documents begin in two rows, how much of each is padding, which positions count."""
    seed = draw(st.integers(0, 2**32 - 1))
    borders = {0, ROWS * LENGTH}
    for row in range(ROWS):
        inside = draw(st.sets(st.integers(1, LENGTH - 1), max_size=6))
        borders |= {row * LENGTH} | {row * LENGTH + place for place in inside}
    density = draw(st.sampled_from([0.0, 0.3, 1.0]))
    padded = draw(st.integers(0, LENGTH // 2))
    return sorted(borders), density, padded, seed


def micro_batch(packing):
    borders, density, padded, seed = packing
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1000, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(1000, (ROWS, LENGTH), generator=generator)
    mask = (torch.rand(ROWS, LENGTH, generator=generator) < density).float()
    if padded:
        tokens[:, -padded:] = 0
        mask[:, -padded:] = 0
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(borders)])
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": mask,
        "position_ids": positions.view(ROWS, LENGTH),
        "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
        "max_seqlen": max(b - a for a, b in itertools.pairwise(borders)),
    }


def expected_sum(reference, values, kind):
    """The masked sum over documents, each run by itself."""
    flat = {name: values[name].view(-1) for name in ("tokens", "labels", "loss_mask")}
    total = torch.zeros((), dtype=torch.float64)
    borders = values["cu_seqlens"].tolist()
    for start, end in itertools.pairwise(borders):
        tokens = flat["tokens"][None, start:end]
        logits = reference.student(tokens).logits[0]
        if kind == "standard":
            losses = F.cross_entropy(logits, flat["labels"][start:end], reduction="none")
        else:
            log_q = F.log_softmax(logits / TEMPERATURE, -1)
            log_p = F.log_softmax(reference.teacher(tokens).logits[0] / TEMPERATURE, -1)
            losses = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        total += (losses * flat["loss_mask"][start:end].double()).sum()
    return total


@pytest.mark.parametrize("kind", ["standard", "distillation"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packing=packings())
def test_packed_loss_equals_documents_alone(models, reference, kind, packing):
    values = micro_batch(packing)
    chosen, model = models[kind]
    model.train()
    with use_args(chosen), torch.no_grad():
        output, loss_of = forward_step(iter([values]), model)
        loss, num_tokens, _ = loss_of(output)
        expected = expected_sum(reference, values, kind)
    assert num_tokens == values["loss_mask"].sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-9)
