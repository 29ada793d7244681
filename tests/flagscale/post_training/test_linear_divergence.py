"""Output layer and losses in one, against autograd in float64; what it holds; what it refuses."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flagscale.post_training import linear_divergence as module
from flagscale.post_training.cross_entropy import cross_entropy_and_gradient
from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.divergences.reference import reference_loss
from flagscale.post_training.linear_divergence import HeadInput, Terms, linear_divergence
from flagscale.recipe import DistillationRecipe

TEMPERATURE = 2.0
DIVERGENCE = divergence_of(DistillationRecipe(temperature=TEMPERATURE))
RECIPES = [
    DistillationRecipe(divergence=name, temperature=1 if name == "logits_mse" else TEMPERATURE)
    for name in DistillationRecipe.model_fields["divergence"].annotation.__args__
]
TOKENS, VOCABULARY, PADDED = 37, 480, 500
SCALE = 0.7


def memory(work) -> tuple[int, int]:
    """Bytes that torch's allocator has given out more than got back, at the most and at the end."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    held = list(itertools.accumulate(changes))
    return max(held), held[-1]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Of five tokens, or of three with the cross entropy's logits."""
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 5 * 2 * 4 * PADDED)


def heads(dtype=torch.float32, weight_learns=True):
    """Student and teacher, of different widths; labels; weights of tokens, a third of them 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    student = HeadInput(
        normal(TOKENS, 16).requires_grad_(),
        normal(PADDED, 16).requires_grad_(weight_learns),
        VOCABULARY,
    )
    teacher = HeadInput(normal(TOKENS, 24), normal(PADDED, 24), VOCABULARY)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator)
    return student, teacher, labels, weights * (torch.rand(TOKENS, generator=generator) > 1 / 3)


def in_float64(student, teacher, labels, with_cross_entropy):
    """Both losses a token by autograd, and the leaves that get gradients."""
    leaves = [t.detach().double().requires_grad_() for t in (student.hidden_nh, student.weight_vh)]
    logits = (leaves[0] @ leaves[1].T)[:, :VOCABULARY]
    targets = (teacher.hidden_nh.double() @ teacher.weight_vh.double().T)[:, :VOCABULARY]
    log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (logits, targets))
    divergence = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    cross_entropy = F.cross_entropy(logits, labels, reduction="none") * with_cross_entropy
    return divergence, cross_entropy, leaves


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


# In bf16 logits and sums are fp32 all the same: what is left is the gradients' own rounding, 2^-9.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("with_cross_entropy", [False, True])
def test_values_and_gradients_equal_float64(dtype, bound, with_cross_entropy):
    student, teacher, labels, weights = heads(dtype)
    terms = Terms(DIVERGENCE, SCALE, labels if with_cross_entropy else None)
    divergence, cross_entropy = linear_divergence(student, teacher, terms, weights)
    exact_d, exact_c, exact = in_float64(student, teacher, labels, with_cross_entropy)
    assert error(divergence, exact_d) < 1e-6
    torch.testing.assert_close(cross_entropy.double(), exact_c, rtol=1e-6, atol=0)
    for d, c in ((divergence, cross_entropy), (exact_d, exact_c)):
        total = SCALE * d + c if with_cross_entropy else d
        (3 * (total * weights).sum()).backward()
    for found, leaf in zip((student.hidden_nh, student.weight_vh), exact, strict=True):
        assert found.grad.dtype == dtype
        assert error(found.grad, leaf.grad) < bound


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.divergence)
def test_every_divergence(recipe):
    student, teacher, _, weights = heads()
    found, _ = linear_divergence(student, teacher, Terms(divergence_of(recipe)), weights)
    (found * weights).sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (student.hidden_nh, student.weight_vh)]
    targets = teacher.hidden_nh.double() @ teacher.weight_vh.double().T
    exact = reference_loss(
        (leaves[0] @ leaves[1].T)[:, :VOCABULARY], targets[:, :VOCABULARY], recipe
    )
    (exact * weights).sum().backward()
    assert error(found, exact) < 1e-6
    for tensor, leaf in zip((student.hidden_nh, student.weight_vh), leaves, strict=True):
        assert error(tensor.grad, leaf.grad) < 2e-6
        assert tensor.grad.isfinite().all()


def test_a_weight_that_does_not_learn_gets_no_gradient():
    student, teacher, labels, weights = heads(weight_learns=False)
    divergence, _ = linear_divergence(student, teacher, Terms(DIVERGENCE), weights)
    (divergence * weights).sum().backward()
    exact, _, leaves = in_float64(student, teacher, labels, False)
    (exact * weights).sum().backward()
    assert student.weight_vh.grad is None
    assert error(student.hidden_nh.grad, leaves[0].grad) < 1e-6


@pytest.mark.parametrize(
    "loss",
    [
        lambda d, c, w: (SCALE * d + c).sum(),  # without the weights
        lambda d, c, w: ((SCALE * d + c) * w.flip(0)).sum(),  # with others
        lambda d, c, w: ((d + c) * w).sum(),  # with another scale
        lambda d, c, w: (d * w).sum(),  # of one of two terms
        lambda d, c, w: (c * w).sum(),
        lambda d, c, w: ((SCALE * d + c).square() * w).sum(),
    ],
)
def test_another_loss_than_was_computed_stops(loss):
    student, teacher, labels, weights = heads()
    terms = Terms(DIVERGENCE, SCALE, labels)
    total = loss(*linear_divergence(student, teacher, terms, weights), weights)
    with pytest.raises(RuntimeError, match="differentiated in another way"):
        total.backward()


def test_a_second_backward_pass_stops():
    student, teacher, _, weights = heads()
    divergence, _ = linear_divergence(student, teacher, Terms(DIVERGENCE), weights)
    total = (divergence * weights).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_masked_tokens_give_zeros_whatever_they_are():
    student, teacher, labels, weights = heads()
    terms = Terms(DIVERGENCE, SCALE, torch.full_like(labels, -100))  # no label of any token
    divergence, cross_entropy = linear_divergence(student, teacher, terms, 0 * weights)
    assert not cross_entropy.any()
    ((SCALE * divergence + cross_entropy) * 0).sum().backward()
    assert torch.equal(student.weight_vh.grad, torch.zeros_like(student.weight_vh))
    assert torch.equal(student.hidden_nh.grad, torch.zeros_like(student.hidden_nh))


def test_what_is_not_finite_shows():
    logits = torch.zeros(2, 8)
    logits[1, 3] = torch.nan
    assert cross_entropy_and_gradient(logits, torch.zeros(2, dtype=torch.int64)).isnan()[1]
    student, teacher, labels, weights = heads()
    broken = replace(student, hidden_nh=torch.full_like(student.hidden_nh, torch.nan))
    for loss in linear_divergence(broken, teacher, Terms(DIVERGENCE, 1.0, labels), weights):
        assert loss.isnan().all()


@pytest.mark.parametrize("with_cross_entropy", [False, True])
def test_memory(monkeypatch, with_cross_entropy):
    """Beside inputs and gradients at most 32 MiB; the logits of both models alone are 192."""
    monkeypatch.undo()
    tokens, vocabulary, width = 512, 49152, 16
    student, teacher = (
        HeadInput(torch.randn(tokens, width), torch.randn(vocabulary, width) / 4, vocabulary)
        for _ in range(2)
    )
    student.hidden_nh.requires_grad_()
    student.weight_vh.requires_grad_()
    labels = torch.randint(vocabulary, (tokens,)) if with_cross_entropy else None
    weights = torch.ones(tokens)

    def step():
        losses = linear_divergence(student, teacher, Terms(DIVERGENCE, 1.0, labels), weights)
        sum(losses[: 1 + with_cross_entropy]).sum().backward()

    gradients = 4 * width * (tokens + vocabulary)
    most, left = memory(step)
    assert most - gradients <= 32 * 2**20
    assert left == gradients


def test_evaluation_holds_no_gradients():
    student, teacher, labels, weights = heads()
    terms = Terms(DIVERGENCE, SCALE, labels)
    found, trained = [], []
    with torch.no_grad():
        most, _ = memory(lambda: found.extend(linear_divergence(student, teacher, terms, weights)))
    with_gradients, _ = memory(
        lambda: trained.extend(linear_divergence(student, teacher, terms, weights))
    )
    assert not any(loss.requires_grad for loss in found)
    assert all(torch.equal(a, b) for a, b in zip(found, trained, strict=True))
    gradients = student.hidden_nh.nbytes + student.weight_vh.nbytes
    assert with_gradients - most == pytest.approx(gradients, rel=0.1)
