"""Relations against float64 autograd, written plainly."""

import math

import pytest
import torch

from flagscale.post_training import attention_relations
from flagscale.post_training.attention_relations import Positions, relation_loss

SEQUENCE, BATCH, HEADS = 12, 2, 3
DOCUMENTS = torch.tensor([0] * 5 + [1] * 7)


def parts(width: int, seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {
        name: torch.randn(SEQUENCE, BATCH, width, generator=generator).to(dtype)
        for name in ("query", "key", "value")
    }
    return {name: part.requires_grad_() for name, part in draw.items()}


def in_float64(student, teacher, relations, fit, documents):
    """The same by its definition: one head and one token at a time."""
    losses = []
    for s in range(SEQUENCE):
        seen = [t for t in range(s + 1) if documents is None or documents[t] == documents[s]]
        for b in range(BATCH):
            total = 0.0
            for relation in relations:
                row, column = (relation.split("_") * 2)[:2]
                for head in range(HEADS):
                    scores = []
                    for side in (student, teacher):
                        width = side[row].size(-1) // HEADS
                        here = slice(head * width, (head + 1) * width)
                        vectors = side[column][seen, b, here]
                        scores.append(vectors @ side[row][s, b, here] / math.sqrt(width))
                    ours, theirs = scores[0], scores[1].detach()
                    q, p = ours.softmax(-1), theirs.softmax(-1)
                    total = (
                        total
                        + {
                            "kl": lambda q=q, p=p: (p * (p / q).log()).sum(),
                            "mse": lambda a=ours, b=theirs: (a - b).square().mean(),
                            "cosine": lambda q=q, p=p: 1 - (q @ p) / (q.norm() * p.norm()),
                        }[fit]()
                    )
            losses.append(total / len(relations))
    return torch.stack(losses).view(SEQUENCE, BATCH)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("fit", ["kl", "mse", "cosine"])
@pytest.mark.parametrize("scores_at_a_time", [2**22, 1], ids=["whole", "row by row"])
def test_value_and_gradient_equal_float64(monkeypatch, documents, fit, scores_at_a_time):
    monkeypatch.setattr(attention_relations, "SCORES", scores_at_a_time)
    relations = ("query", "key", "value", "query_key")
    student, teacher = parts(6, 0), parts(15, 1)  # as many heads, of other widths
    positions = Positions([(0, SEQUENCE)], documents)
    found = relation_loss(student, teacher, relations, HEADS, fit, positions)
    exact = {k: v.detach().double().requires_grad_() for k, v in student.items()}
    doubled = {k: v.detach().double() for k, v in teacher.items()}
    expected = in_float64(exact, doubled, relations, fit, documents)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    weights = torch.rand(SEQUENCE, BATCH, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for name, part in student.items():
        error = (part.grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
        assert error <= 1e-5, name
    assert all(part.grad is None for part in teacher.values())


def test_bf16_is_computed_in_fp32():
    student, teacher = parts(6, 0, torch.bfloat16), parts(6, 1, torch.bfloat16)
    wide = [{k: v.detach().float() for k, v in side.items()} for side in (student, teacher)]
    call = (("query", "value"), HEADS, "kl", Positions([(0, SEQUENCE)]))
    assert torch.equal(relation_loss(student, teacher, *call), relation_loss(*wide, *call))


@pytest.mark.parametrize("fit", ["kl", "mse", "cosine"])
def test_equal_models_have_no_loss(fit):
    same = parts(6, 0)
    positions = Positions([(0, SEQUENCE)])
    loss = relation_loss(same, same, ("query", "key", "value"), HEADS, fit, positions)
    assert loss.abs().max() < 1e-6


def test_a_later_token_has_no_influence():
    student, teacher = parts(6, 0), parts(6, 1)
    call = (("query", "query_key"), HEADS, "kl", Positions([(0, SEQUENCE)]))
    before = relation_loss(student, teacher, *call)
    changed = {name: part.detach().clone() for name, part in student.items()}
    for part in changed.values():
        part[-1] += 1
    after = relation_loss(changed, teacher, *call)
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])
