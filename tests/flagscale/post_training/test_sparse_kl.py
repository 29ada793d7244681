"""The KL from a teacher of whom some tokens are known, against autograd in float64."""

from dataclasses import replace

import pytest
import torch

from flagscale.post_training import linear_divergence as fused_module
from flagscale.post_training.divergences import SparseKL, divergence_of
from flagscale.post_training.divergences.reference import reference_sparse_loss
from flagscale.post_training.linear_divergence import HeadInput, Terms, linear_divergence
from flagscale.post_training.sparse_targets import SparseRows
from flagscale.recipe import DistillationRecipe

TEMPERATURE = 2.0
N = 40


def normal(*size, seed=0, scale=3.0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale


def likeliest(teacher_nv, k, temperature=TEMPERATURE):
    """What a cache of the top k has."""
    p = (teacher_nv.double() / temperature).softmax(-1)
    shares, tokens = p.topk(k, -1)
    tail = 1 - shares.sum(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return SparseRows(tokens, shares.float(), tail.clamp(min=0).float(), entropy.float())


def drawn(teacher_nv, draws, temperature=TEMPERATURE, seed=0):
    """What a cache of draws has: distinct tokens, and fillings."""
    p = (teacher_nv.double() / temperature).softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1).float()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(p, draws, replacement=True, generator=generator)
    counts = torch.zeros_like(p).scatter_add_(-1, tokens, torch.ones_like(tokens, dtype=p.dtype))
    shares, tokens = (counts / draws).topk(min(draws, counts.size(-1)), -1)
    return SparseRows(tokens.masked_fill(shares == 0, 0), shares.float(), None, entropy)


TARGETS = {
    "draws": (lambda t: drawn(t, 12), None),
    "all of the top": (lambda t: likeliest(t, 7), 7),
    "some of the top": (lambda t: likeliest(t, 7), 3),
    "one": (lambda t: likeliest(t, 7), 1),
}
each_kind = pytest.mark.parametrize("kind", TARGETS)


def value_and_gradient(divergence, student, targets):
    leaf = student.clone().requires_grad_()
    loss = divergence(leaf * 1, targets)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def exact(student, targets, top_k, temperature=TEMPERATURE):
    leaf = student.double().requires_grad_()
    loss = reference_sparse_loss(leaf, targets, temperature, top_k)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def error(found, right):
    return ((found.double() - right).norm() / right.norm()).item()


@each_kind
@pytest.mark.parametrize("vocabulary", [8, 300, 200_000])
def test_value_and_gradient_equal_float64(kind, vocabulary):
    make, top_k = TARGETS[kind]
    rows = N if vocabulary < 1000 else 3
    targets = make(normal(rows, vocabulary))
    student = normal(rows, vocabulary, seed=1)
    found, gradient = value_and_gradient(SparseKL(TEMPERATURE, top_k), student, targets)
    loss, right = exact(student, targets, top_k)
    torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=2e-6)
    assert error(gradient, right) < 2e-6


@pytest.mark.parametrize("kind", ["all of the top", "some of the top"])
def test_it_is_top_k_kl_of_the_same_teacher(kind):
    make, top_k = TARGETS[kind]
    teacher, student = normal(N, 300), normal(N, 300, seed=1)
    live = divergence_of(
        DistillationRecipe(divergence="top_k_kl", top_k=top_k, temperature=TEMPERATURE)
    )
    found = value_and_gradient(SparseKL(TEMPERATURE, top_k), student, make(teacher))
    expected = value_and_gradient(live, student, teacher)
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs.double()) < 2e-6


def test_the_mean_over_draws_is_forward_kl():
    """Value and gradient, at 3 standard errors; the student is near, where bias would show."""
    vocabulary, repeats = 50, 4000
    teacher = normal(1, vocabulary, scale=2.0)
    student = teacher + normal(1, vocabulary, seed=1, scale=0.1)
    live = divergence_of(DistillationRecipe(temperature=TEMPERATURE))
    expected = value_and_gradient(live, student, teacher)
    targets = drawn(teacher.expand(repeats, -1), 12)
    found = value_and_gradient(SparseKL(TEMPERATURE), student.expand(repeats, -1), targets)
    loss, gradient = (one.double() for one in found)
    far = (loss.mean() - expected[0]).abs() / (loss.std() / repeats**0.5)
    assert far < 3
    off = (gradient.mean(0) - expected[1][0]) / (gradient.std(0) / repeats**0.5).clamp(min=1e-12)
    # Of 50 columns one or two may be beyond 3 of their own; together they are chi-squared.
    assert off.square().sum() < vocabulary + 3 * (2 * vocabulary) ** 0.5


@each_kind
def test_of_bf16_logits_and_padding(kind):
    make, top_k = TARGETS[kind]
    targets = make(normal(N, 300))
    student = normal(N, 320, seed=1).bfloat16()
    student[:, 300:] = -10000.0
    found, gradient = value_and_gradient(SparseKL(TEMPERATURE, top_k), student, targets)
    loss, right = exact(student[:, :300], targets, top_k)
    torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=2e-6)
    assert error(gradient[:, :300], right) < 2**-8
    assert not gradient[:, 300:].any()


def test_where_everything_is_known_there_is_no_tail():
    """k is the vocabulary: what rounding has left of the tail's mass must not make it infinite."""
    teacher, student = normal(N, 7), normal(N, 7, seed=1)
    targets = likeliest(teacher, 7)
    targets = replace(targets, tail_n=targets.tail_n + 1e-7)
    found, gradient = value_and_gradient(SparseKL(TEMPERATURE, 7), student, targets)
    live = divergence_of(DistillationRecipe(temperature=TEMPERATURE))
    expected = value_and_gradient(live, student, teacher)
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)
    assert error(gradient, expected[1].double()) < 2e-6


def test_other_rows_than_the_students_are_refused():
    with pytest.raises(ValueError, match="40 rows of student logits, but 39"):
        SparseKL()(normal(N, 300), drawn(normal(N, 300), 3)[:39])


@each_kind
def test_fused_with_the_output_layer(kind, monkeypatch):
    """With the cross entropy, in several chunks."""
    monkeypatch.setitem(fused_module.CHUNK_BYTES, "cpu", 5 * 2 * 4 * 320)
    make, top_k = TARGETS[kind]
    targets = make(normal(N, 300))
    hidden, weight = normal(N, 16, scale=1.0), normal(320, 16, seed=1, scale=1.0)
    labels = torch.randint(300, (N,), generator=torch.Generator().manual_seed(2))
    weights = (normal(N, seed=3) > 0).float()
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            terms = Terms(SparseKL(TEMPERATURE, top_k), 0.7, labels)
            loss, lm_loss = linear_divergence(HeadInput(h, w, 300), targets, terms, weights)
        else:
            logits = (h.double() @ w.double().T)[:, :300]
            loss = reference_sparse_loss(logits, targets, TEMPERATURE, top_k)
            lm_loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        (weights * (0.7 * loss + lm_loss)).sum().backward()
        results.append((loss.detach(), lm_loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs.double()) < 3e-6
