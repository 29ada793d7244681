import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.divergences.jensen_shannon import JensenShannon
from flagscale.post_training.divergences.passing import in_chunks
from flagscale.post_training.divergences.reference import reference_gradient, reference_loss
from flagscale.post_training.divergences.rows import merged
from flagscale.post_training.divergences.skew_kl import SkewKL
from flagscale.post_training.divergences.top_k_kl import TopKKL
from flagscale.recipe import DistillationRecipe

NAMES = DistillationRecipe.model_fields["divergence"].annotation.__args__
OWN = {"jensen_shannon": {"beta": 0.3}, "skew_kl": {"alpha": 0.2}, "top_k_kl": {"top_k": 5}}
each_divergence = pytest.mark.parametrize("name", NAMES)


def recipe_of(name, **fields):
    if name == "logits_mse":
        fields.pop("temperature", None)
    return DistillationRecipe(divergence=name, **OWN.get(name, {}) | fields)


def logits(shape, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


def value_and_gradient(divergence, student, teacher):
    """Through autograd, as an output layer would have it."""
    leaf = student.clone().requires_grad_()
    loss = divergence(leaf * 1, teacher)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@each_divergence
@pytest.mark.parametrize(
    ("scale", "temperature"), [(0.1, 1.0), (3, 1.0), (3, 8.0), (3, 0.25), (20, 8.0), (20, 1.0)]
)
def test_value_and_gradient_equal_float64(name, scale, temperature):
    """To 1e-5, or to what float32 rounds the scaled logits to, at their exponentials' size."""
    recipe = recipe_of(name, temperature=temperature)
    rounding = 1e-7 * max(1, scale / temperature)
    for vocabulary in (2, 17, 300):
        teacher, student = (logits((50, vocabulary), scale, seed) for seed in (0, 1))
        found, gradient = value_and_gradient(divergence_of(recipe), student, teacher)
        exact = reference_loss(student, teacher, recipe)
        exact_gradient = reference_gradient(student, teacher, recipe)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=rounding * temperature**2)
        # The reverse KL's gradient is a difference of numbers of the KL's size.
        floor = 5 * rounding * (temperature + exact / temperature)
        far = (gradient.double() - exact_gradient).norm(dim=-1)
        assert (far < 1e-5 * exact_gradient.norm(dim=-1) + floor).all()
        if scale <= 3 * temperature:
            assert error(gradient, exact_gradient) < 1e-5


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_vocabulary(name, dtype):
    teacher, student = (logits((2, 8, 49152), 3, i).to(dtype) for i in (0, 1))
    recipe = recipe_of(name, temperature=2.0)
    found, gradient = value_and_gradient(divergence_of(recipe), student, teacher)
    exact = reference_loss(student, teacher, recipe)
    assert gradient.dtype == dtype
    assert found.shape == (2, 8)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    limit = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert error(gradient, reference_gradient(student, teacher, recipe)) < limit


@each_divergence
def test_equal_logits_give_exactly_zero(name):
    same = logits((8, 1000), 10, 0)
    found, gradient = value_and_gradient(divergence_of(recipe_of(name)), same, same)
    assert found.abs().max() == 0
    assert gradient.abs().max() == 0


@each_divergence
@pytest.mark.parametrize("distance", [0.1, 0.01, 0.001])
def test_a_student_near_its_teacher(name, distance):
    teacher = logits((16, 5000), 3, 0)
    student = teacher + logits((16, 5000), distance, 1)
    recipe = recipe_of(name)
    found, gradient = value_and_gradient(divergence_of(recipe), student, teacher)
    exact = reference_loss(student, teacher, recipe)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)
    assert error(gradient, reference_gradient(student, teacher, recipe)) < 1e-3


@pytest.mark.parametrize("name", ["jensen_shannon", "skew_kl", "total_variation"])
@pytest.mark.parametrize("slices", [1, 3])
def test_models_that_hardly_overlap(name, slices):
    """Gradients of 1e-8 where probabilities are 1; slices are what tensor-parallel ranks have."""
    teacher, student = (logits((16, 5000), 3, seed) for seed in (0, 1))
    recipe = recipe_of(name, temperature=0.25)
    divergence = divergence_of(recipe)
    exact = reference_loss(student, teacher, recipe)
    exact_gradient = reference_gradient(student, teacher, recipe)
    parts = list(zip(student.chunk(slices, 1), teacher.chunk(slices, 1), strict=True))
    local = [in_chunks(divergence, *part, None, None, False, False)[0] for part in parts]
    norms, _ = merged(torch.stack(local), 0.25)
    sums = sum(in_chunks(divergence, *part, norms, None, True, False)[1] for part in parts)
    for part in parts:
        in_chunks(divergence, *part, norms, sums, False, True)
    torch.testing.assert_close(sums[0].double() / 16, exact, rtol=1e-5, atol=0)
    assert error(student, exact_gradient) < 1e-5


@each_divergence
@pytest.mark.parametrize("value", [-torch.inf, -1e4])
def test_columns_that_are_no_token_change_nothing(name, value):
    teacher, student = logits((4, 100), 3, 0), logits((4, 100), 3, 1)
    padding = torch.full((4, 28), value)
    recipe = recipe_of(name, temperature=2.0)
    divergence = divergence_of(recipe)
    whole, gradient = value_and_gradient(divergence, student, teacher)
    padded, padded_gradient = value_and_gradient(
        divergence, *(torch.cat([part, padding], -1) for part in (student, teacher))
    )
    torch.testing.assert_close(padded, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(padded_gradient[:, :100], gradient, rtol=1e-5, atol=1e-8)
    assert padded_gradient[:, 100:].abs().max() == 0


@pytest.mark.parametrize("name", ["forward_kl", "top_k_kl", "logits_mse"])
def test_what_only_the_student_excludes_is_infinitely_far(name):
    teacher, student = logits((4, 100), 3, 0), logits((4, 100), 3, 1)
    student.scatter_(1, teacher.argmax(-1, keepdim=True), -torch.inf)
    found, _ = divergence_of(recipe_of(name)).loss_and_gradient(student, teacher)
    assert found.isinf().all()


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "skew_kl", "total_variation"])
def test_what_only_the_student_excludes_is_no_obstacle(name):
    teacher, student = logits((4, 100), 3, 0), logits((4, 100), 3, 1)
    student[:, 7] = -torch.inf
    recipe = recipe_of(name)
    exact = reference_loss(student, teacher, recipe)
    found, gradient = divergence_of(recipe).loss_and_gradient(student, teacher)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    assert gradient.isfinite().all()


@each_divergence
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_pass_for_finite(name, value):
    divergence = divergence_of(recipe_of(name))
    for which in range(2):
        pair = [logits((2, 50), 3, seed) for seed in range(2)]
        pair[which][1, 7] = value
        found, _ = divergence.loss_and_gradient(*pair)
        assert found.isfinite().tolist() == [True, False]


def test_identities():
    teacher, student = logits((8, 500), 3, 0), logits((8, 500), 3, 1)

    def of(divergence, student=student, teacher=teacher):
        return value_and_gradient(divergence, student, teacher)[0]

    forward, reverse = (divergence_of(recipe_of(f"{way}_kl")) for way in ("forward", "reverse"))
    torch.testing.assert_close(of(reverse, student, teacher), of(forward, teacher, student))
    for same in (SkewKL(alpha=0), TopKKL(top_k=500)):
        for found, expected in zip(
            value_and_gradient(same, student, teacher),
            value_and_gradient(forward, student, teacher),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    symmetric = JensenShannon(beta=0.5)
    torch.testing.assert_close(of(symmetric), of(symmetric, teacher, student))
    swapped = JensenShannon(beta=0.8)
    torch.testing.assert_close(of(JensenShannon(beta=0.2)), of(swapped, teacher, student))
    near = (student / 10, teacher / 10)
    for ends in ((forward, 1e-4, 1e-4), (reverse, 1 - 1e-4, 1e-4)):
        kl, beta, share = ends
        torch.testing.assert_close(
            of(JensenShannon(beta=beta), *near) / share, of(kl, *near), rtol=2e-3, atol=0
        )
    coarser = [of(TopKKL(top_k=k)) for k in (1, 5, 50, 500)]
    assert all((one < other).all() for one, other in itertools.pairwise(coarser))


def test_high_temperatures_leave_the_gradient_its_size():
    teacher, student = logits((8, 500), 1, 0), logits((8, 500), 1, 1)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl"):
        sizes = [
            value_and_gradient(divergence_of(recipe_of(name, temperature=t)), student, teacher)[
                1
            ].norm()
            for t in (20.0, 80.0)
        ]
        torch.testing.assert_close(*sizes, rtol=0.1, atol=0)


class LargestBuffer(TorchDispatchMode):
    """Bytes of the largest buffer that any operation works on, `known` ones aside."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        result = function(*arguments, **more or {})
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.bytes = max(self.bytes, storage.nbytes())
        return result


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_buffer_of_the_logits_size(name, dtype):
    teacher, student = (logits((1000, 3000), 3, i).to(dtype) for i in (0, 1))
    with LargestBuffer(student, teacher) as largest:
        divergence_of(recipe_of(name)).loss_and_gradient(student, teacher)
    assert 0 < largest.bytes <= 2**18 * 4 * 6


def test_rows_that_do_not_count_get_no_gradient():
    teacher, student = logits((8, 50), 3, 0), logits((8, 50), 3, 1).requires_grad_()
    weights = torch.tensor([1, 0, 0.5, 1, 0, 0, 2, 1])
    exact = reference_gradient(student, teacher, DistillationRecipe()) * weights[:, None]
    (divergence_of(DistillationRecipe())(student * 1, teacher) * weights).sum().backward()
    torch.testing.assert_close(student.grad.double(), exact, rtol=1e-5, atol=1e-8)


def test_without_a_gradient_the_logits_stay():
    teacher, student = logits((8, 50), 3, 0), logits((8, 50), 3, 1).requires_grad_()
    before = student.detach().clone()
    with torch.no_grad():
        divergence_of(DistillationRecipe())(student, teacher)
    assert torch.equal(student, before)


def test_no_rows():
    student = torch.empty(0, 3, 7, requires_grad=True)
    for name in NAMES:
        loss = divergence_of(recipe_of(name))(student * 1, torch.empty(0, 3, 7))
        loss.sum().backward()
        assert loss.shape == (0, 3)


def test_second_backward_raises_instead_of_lying():
    loss = divergence_of(DistillationRecipe())(
        logits((4, 50), 1, 0).requires_grad_() * 1, logits((4, 50), 1, 1)
    ).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward pass"):
        loss.backward()


def test_who_kept_the_logits_for_a_backward_pass_is_told():
    student = logits((4, 50), 1, 0).requires_grad_() * 1
    other = student.square().sum()
    loss = divergence_of(DistillationRecipe())(student, logits((4, 50), 1, 1)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_bad_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        divergence_of(DistillationRecipe())(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="beta=1"):
        JensenShannon(beta=1)
    with pytest.raises(ValueError, match="temperature=0"):
        SkewKL(temperature=0)
