"""The Triton kernel of the divergences against float64: on a GPU, or by Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
pytest.importorskip("triton")

from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.divergences.jensen_shannon import JensenShannon
from flagscale.post_training.divergences.reference import reference_gradient, reference_loss
from flagscale.post_training.divergences.rows import merged
from flagscale.post_training.divergences.skew_kl import SkewKL
from flagscale.post_training.divergences.triton_kernel import one_pass, scale_rows
from flagscale.recipe import DistillationRecipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN = {"jensen_shannon": {"beta": 0.3}, "skew_kl": {"alpha": 0.2}}
NAMES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "total_variation")


def inputs(name: str, temperature: float, distance: float | None) -> tuple:
    """Recipe, student and teacher [5, 5000], the last 9 columns no tokens."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(5, 5000, generator=generator) for _ in range(2))
    if distance is not None:
        student = teacher + distance * student
    for logits in (teacher, student):
        logits[:, -9:] = -torch.inf
    recipe = DistillationRecipe(divergence=name, temperature=temperature, **OWN.get(name, {}))
    return recipe, student.to(DEVICE), teacher.to(DEVICE)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("distance", [None, 0.01])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.25])  # of the last they hardly overlap
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_float64(name, temperature, distance):
    recipe, student, teacher = inputs(name, temperature, distance)
    exact = reference_loss(student, teacher, recipe)
    exact_gradient = reference_gradient(student, teacher, recipe)
    _, sums = one_pass(divergence_of(recipe), student, teacher, None, None, True, True)
    assert error(sums[0] * temperature**2, exact) < (1e-5 if distance is None else 1e-4)
    if distance is None or name != "total_variation":  # whose gradient jumps where p is q
        assert error(student[:, :-9], exact_gradient[:, :-9]) < (1e-5 if distance is None else 1e-4)
    assert student[:, -9:].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_equal_logits_give_exactly_zero(name):
    recipe, _, teacher = inputs(name, 1.0, None)
    student = teacher.clone()
    _, sums = one_pass(divergence_of(recipe), student, teacher, None, None, True, True)
    assert sums[0].abs().max() == 0
    assert student.abs().max() == 0


@pytest.mark.parametrize(
    ("divergence", "same"),
    [
        (SkewKL(1.0, alpha=0.0), {"divergence": "forward_kl"}),
        (SkewKL(1.0, alpha=0.01), {"divergence": "skew_kl", "alpha": 0.01}),
        (JensenShannon(1.0, beta=0.99), {"divergence": "jensen_shannon", "beta": 0.99}),
    ],
)
def test_a_mixture_that_is_nearly_one_of_the_two_loses_no_digits(divergence, same):
    _, student, teacher = inputs("forward_kl", 1.0, None)
    student *= 2  # ratios of up to exp(30)
    recipe = DistillationRecipe.model_validate(same)
    exact = reference_loss(student, teacher, recipe)
    exact_gradient = reference_gradient(student, teacher, recipe)
    _, sums = one_pass(divergence, student, teacher, None, None, True, True)
    assert error(sums[0], exact) < 1e-6
    assert error(student[:, :-9], exact_gradient[:, :-9]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    recipe, student, teacher = inputs(name, 1.0, None)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    exact = reference_loss(student, teacher, recipe)
    exact_gradient = reference_gradient(student, teacher, recipe)
    _, sums = one_pass(divergence_of(recipe), student, teacher, None, None, True, True)
    assert error(sums[0], exact) < 1e-5
    # The interpreter cuts bf16 off where a GPU rounds it.
    limit = 2**-8 if DEVICE == "cuda" else 2**-7
    assert error(student[:, :-9], exact_gradient[:, :-9]) < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [2.0, 0.25])
def test_slices_of_the_vocabulary_make_the_whole(name, temperature):
    """What tensor-parallel ranks do, the last slice without any token."""
    recipe, student, teacher = inputs(name, temperature, None)
    exact = reference_loss(student, teacher, recipe)
    exact_gradient = reference_gradient(student, teacher, recipe)
    divergence = divergence_of(recipe)
    slices = [
        tuple(logits[:, columns].contiguous() for logits in (student, teacher))
        for columns in (slice(0, 2000), slice(2000, 4991), slice(4991, 5000))
    ]
    local = [one_pass(divergence, *part, None, None, False, False)[0] for part in slices]
    norms, _ = merged(torch.stack(local), temperature)
    sums = sum(one_pass(divergence, *part, norms, None, True, False)[1] for part in slices)
    for part in slices:
        one_pass(divergence, *part, norms, sums, False, True)
    assert error(sums[0] * temperature**2, exact) < 1e-5
    gradient = torch.cat([student_part for student_part, _ in slices], 1)
    assert error(gradient[:, :-9], exact_gradient[:, :-9]) < 1e-5


def test_rows_are_scaled():
    gradient = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scales = torch.tensor([1.0, 0.0, 0.5, 1.0], device=DEVICE)
    expected = gradient * scales[:, None]
    scale_rows(gradient, scales)
    assert torch.equal(gradient, expected)
