"""The compiled pass over rows of logits against float64, and without a compiler."""

import logging
import shutil

import pytest
import torch

from flagscale.post_training.divergences import cpu_kernel, divergence_of
from flagscale.post_training.divergences.divergence import FDivergence
from flagscale.post_training.divergences.forward_kl import ForwardKL
from flagscale.post_training.divergences.reference import reference_gradient, reference_loss
from flagscale.post_training.divergences.rows import merged
from flagscale.post_training.divergences.skew_kl import SkewKL
from flagscale.recipe import DistillationRecipe

OWN = {"jensen_shannon": {"beta": 0.3}, "skew_kl": {"alpha": 0.2}, "top_k_kl": {"top_k": 100}}
NAMES = tuple(
    name
    for name in DistillationRecipe.model_fields["divergence"].annotation.__args__
    if name != "logits_mse"
)
WIDTH = cpu_kernel.MIN_COLUMNS + 5  # no multiple of a vector
each_divergence = pytest.mark.parametrize("name", NAMES)
compiled = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


def recipe_of(name, **fields):
    return DistillationRecipe(divergence=name, **{**OWN.get(name, {}), **fields})


def inputs(distance=None, rows=7, spread=3.0):
    """Student and teacher, the last 9 columns no tokens."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (spread * torch.randn(rows, WIDTH, generator=generator) for _ in range(2))
    if distance is not None:
        student = teacher + distance * student
    for logits in (teacher, student):
        logits[:, -9:] = -torch.inf
    assert cpu_kernel.serves(student, teacher)
    return student, teacher


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@compiled
@each_divergence
@pytest.mark.parametrize(
    ("temperature", "distance", "spread"),
    [
        *((1.0, None, 3.0), (2.0, None, 3.0), (0.25, None, 1.0), (8.0, None, 20.0)),
        (0.25, None, 3.0),  # the models hardly overlap
        (1.0, 1e-3, 3.0),
    ],
)
def test_value_and_gradient_equal_float64(name, temperature, distance, spread):
    recipe = recipe_of(name, temperature=temperature)
    student, teacher = inputs(distance, spread=spread)
    exact = reference_loss(student, teacher, recipe)
    exact_gradient = reference_gradient(student, teacher, recipe)
    found, gradient = divergence_of(recipe).loss_and_gradient(student, teacher)
    limit = 1e-5 if distance is None else 1e-3
    assert error(found, exact) < limit
    assert error(gradient[:, :-9], exact_gradient[:, :-9]) < limit
    assert gradient[:, -9:].abs().max() == 0


@compiled
@each_divergence
@pytest.mark.parametrize("narrow", ["both", "student", "teacher"])
def test_bfloat16(name, narrow):
    recipe = recipe_of(name)
    student, teacher = inputs()
    student = student.bfloat16() if narrow != "teacher" else student
    teacher = teacher.bfloat16() if narrow != "student" else teacher
    exact = reference_loss(student, teacher, recipe)
    exact_gradient = reference_gradient(student, teacher, recipe)
    found, gradient = divergence_of(recipe).loss_and_gradient(student, teacher)
    assert error(found, exact) < 1e-5
    limit = 1e-5 if narrow == "teacher" else 2**-8
    assert error(gradient[:, :-9], exact_gradient[:, :-9]) < limit


@compiled
@each_divergence
def test_equal_logits_give_exactly_zero(name):
    _, same = inputs()
    found, gradient = divergence_of(recipe_of(name)).loss_and_gradient(same.clone(), same)
    assert found.abs().max() == 0
    assert gradient.abs().max() == 0


@compiled
@each_divergence
def test_a_probability_that_is_next_to_nothing_in_one_model_alone(name):
    """Nearly all columns lie where what is too small for float32 becomes 0."""
    recipe = recipe_of(name)
    student, teacher = inputs(distance=0.03)
    for logits in (student, teacher):
        logits[:, 4:-9] -= 87
    exact, exact_gradient = (
        of(student, teacher, recipe) for of in (reference_loss, reference_gradient)
    )
    found, gradient = divergence_of(recipe).loss_and_gradient(student, teacher)
    assert error(found, exact) < 1e-5
    assert error(gradient[:, :-9], exact_gradient[:, :-9]) < 1e-5


@compiled
@each_divergence
def test_what_is_not_finite_does_not_pass_for_finite(name):
    divergence = divergence_of(recipe_of(name))
    for value in (torch.nan, torch.inf):
        for which in range(2):
            logits = inputs(rows=2)
            logits[which][1, 7] = value
            found, gradient = divergence.loss_and_gradient(*logits)
            assert found.isfinite().tolist() == [True, False]
            assert gradient.isfinite().all(-1).tolist() == [True, False]


@compiled
@pytest.mark.parametrize("name", [name for name in NAMES if name != "top_k_kl"])
@pytest.mark.parametrize("temperature", [2.0, 0.25])
def test_slices_of_the_vocabulary_make_the_whole(name, temperature):
    """What tensor-parallel ranks do, the last slice without any token."""
    recipe = recipe_of(name, temperature=temperature)
    divergence = divergence_of(recipe)
    assert isinstance(divergence, FDivergence)
    student, teacher = inputs()
    exact = reference_loss(student, teacher, recipe)
    exact_gradient = reference_gradient(student, teacher, recipe)
    slices = [  # as they lie in the whole: rows are further apart than they are wide
        (student[:, columns], teacher[:, columns])
        for columns in (slice(0, 5000), slice(5000, WIDTH - 9), slice(WIDTH - 9, WIDTH))
    ]
    local = [cpu_kernel.one_pass(divergence, *part, None, None, False, False) for part in slices]
    norms, _ = merged(torch.stack([norms for norms, _ in local]), temperature)
    sums = sum(
        cpu_kernel.one_pass(divergence, *part, norms, None, True, False)[1] for part in slices
    )
    for part in slices:
        cpu_kernel.one_pass(divergence, *part, norms, sums, False, True)
    assert error(sums[0] * temperature**2, exact) < 1e-5
    assert error(student[:, :-9], exact_gradient[:, :-9]) < 1e-5


@compiled
@pytest.mark.parametrize("k", [1, 64, WIDTH - 50, WIDTH])
def test_the_likeliest_tokens_are_the_first_ones_of_equals(k):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randint(-40, 40, (5, WIDTH), generator=generator).float()
    teacher[0] = 1.0
    teacher[1, ::3] = -torch.inf
    tokens, parts = cpu_kernel.top_k_parts(teacher.clone(), teacher, k, 1.0)
    expected = teacher.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
    assert torch.equal(tokens, expected)
    assert torch.equal(parts[:, 4 : 4 + k], teacher.gather(1, expected))


@compiled
@pytest.mark.parametrize("name", ["jensen_shannon", "skew_kl"])
def test_mixtures_of_next_to_nothing(name):
    """Where what is left of a distribution would be rounded away beside 1."""
    field = {"jensen_shannon": "beta", "skew_kl": "alpha"}[name]
    for parameter in (0.01, 0.99):
        recipe = recipe_of(name, **{field: parameter})
        student, teacher = inputs()
        exact = reference_loss(student, teacher, recipe)
        exact_gradient = reference_gradient(student, teacher, recipe)
        found, gradient = divergence_of(recipe).loss_and_gradient(student, teacher)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
        assert error(gradient[:, :-9], exact_gradient[:, :-9]) < 1e-5


@compiled
def test_a_skew_of_nothing_is_forward_kl():
    pairs = (SkewKL(alpha=0), ForwardKL())
    results = [one.loss_and_gradient(*inputs(spread=20)) for one in pairs]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@compiled
def test_a_row_gives_the_same_on_any_number_of_threads():
    divergence, threads = divergence_of(recipe_of("jensen_shannon")), torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(divergence.loss_and_gradient(*inputs()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "did not compile"), ("false", "did not compile")]
)
def test_without_a_compiler_that_works_chunks_do_it_and_it_is_told(
    compiler, said, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(
        cpu_kernel, "compiled", cpu_kernel.functools.cache(cpu_kernel.compiled.__wrapped__)
    )
    recipe = recipe_of("forward_kl")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, WIDTH, generator=generator) for _ in range(2))
    exact = reference_loss(student, teacher, recipe)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found, _ = divergence_of(recipe).loss_and_gradient(student.clone(), teacher)
    assert error(found, exact) < 1e-5
    assert [said in message for message in caplog.messages] == [True]
