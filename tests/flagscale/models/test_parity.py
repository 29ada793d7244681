from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from flagscale.errors import UserError
from flagscale.models.parity import Parity, check_logits, check_weights, compare_logits


def test_comparison_of_logits() -> None:
    first = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    second = torch.tensor([[[0.0, 1.5], [2.0, 3.0]]])
    parity = compare_logits(first, second)
    assert parity == Parity(3.0, 3.5 / 4, 0.5, 2)
    with pytest.raises(ValueError, match="shapes"):
        compare_logits(first, second[:, :1])


@pytest.mark.parametrize("difference", [2e-3, float("nan"), float("inf")])
def test_a_difference_above_the_limit_is_named(difference: float) -> None:
    check_logits(Parity(1e-3, 1e-4, 1.0, 5), 1e-3, "teacher.max_logit_difference")
    with pytest.raises(UserError, match=r"teacher.max_logit_difference=0.001: .* differ by"):
        check_logits(Parity(difference, 1e-4, 1.0, 5), 1e-3, "teacher.max_logit_difference")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.down_proj.weight", 0.0, "all zero"),
        ("model.layers.0.self_attn.q_proj.weight", float("nan"), "not finite"),
        ("model.layers.0.self_attn.q_proj.bias", float("inf"), "not finite"),
    ],
)
def test_weights_that_no_trained_model_has_are_refused(
    make_model: Callable[..., PreTrainedModel], name: str, value: float, message: str
) -> None:
    model = make_model("qwen2 untied")
    check_weights(model, "teacher")
    with torch.no_grad():
        model.get_parameter(name).fill_(value)
    with pytest.raises(UserError, match=f"teacher: {name} .*{message}"):
        check_weights(model, "teacher")


def test_a_bias_may_be_zero(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("qwen2 untied")
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.bias").zero_()
    check_weights(model, "teacher")
