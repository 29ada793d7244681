"""Narrower models against tensors that are sliced here, in Hugging Face's layout, by the scores."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from variants import VARIANTS

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape, from_hf_config, hf_config_for
from flagscale.models.cut_shape import cut_shape, cut_widths
from flagscale.models.megatron import build_model, forward, logits
from flagscale.models.narrow import narrow_model
from flagscale.post_training.minitron import Scores, move_weights, prune_width

TEXT = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))

pytestmark = pytest.mark.usefixtures("runtime")


def narrower(teacher: ModelShape) -> ModelShape:
    sizes = {"hidden_size": 40, "num_attention_heads": 2}
    if teacher.architecture.num_experts is None:
        return cut_shape(teacher, sizes | {"ffn_hidden_size": 50})
    fewer = max(teacher.architecture.num_experts - 2, teacher.architecture.moe_router_topk)
    return cut_shape(teacher, sizes | {"num_experts": fewer, "moe_ffn_hidden_size": 16})


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.argsort(descending=True)[:count]


def sliced(
    weights: dict[str, torch.Tensor], scores: Scores, wide: ModelShape, narrow: ModelShape
) -> dict[str, torch.Tensor]:
    """What the narrower model should be, tensor by tensor."""
    hidden = top(scores["hidden_size"], narrow.hidden_size)
    found = {"model.norm.weight": weights["model.norm.weight"][hidden]}
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        if table in weights:
            found[table] = weights[table][:, hidden]
    channels = torch.arange(wide.kv_channels)
    each = wide.num_attention_heads // wide.num_query_groups
    for layer in range(wide.num_layers):
        own, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        of_group = scores[own + "self_attention"].view(wide.num_query_groups, each)
        kept = narrow.num_attention_heads // wide.num_query_groups
        heads = torch.cat([each * g + top(of_group[g], kept) for g in range(len(of_group))])
        queries = (heads[:, None] * wide.kv_channels + channels).flatten()
        for name, tensor in weights.items():
            part = name.removeprefix(theirs)
            if part == name or part.startswith("mlp."):
                continue
            if part.endswith("layernorm.weight"):
                found[name] = tensor[hidden]
            elif part.startswith("self_attn.q_proj"):
                found[name] = tensor[queries]
            elif part == "self_attn.o_proj.weight":
                found[name] = tensor[hidden][:, queries]
            else:
                found[name] = tensor
            if part.startswith("self_attn.") and part.endswith(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight")
            ):
                found[name] = found[name][:, hidden]
        experts = [(own + "mlp", theirs + "mlp.", theirs + "mlp.", narrow.ffn_hidden_size)]
        if wide.architecture.num_experts is not None:
            order = top(scores[own + "mlp.experts"], narrow.architecture.num_experts)
            found[theirs + "mlp.gate.weight"] = weights[theirs + "mlp.gate.weight"][order][
                :, hidden
            ]
            experts = [
                (
                    own + f"mlp.experts.local_experts.{old}",
                    theirs + f"mlp.experts.{old}.",
                    theirs + f"mlp.experts.{new}.",
                    narrow.architecture.moe_ffn_hidden_size,
                )
                for new, old in enumerate(order.tolist())
            ]
        for name, old, new, size in experts:
            neurons = top(scores[name], size)
            for projection in ("gate_proj", "up_proj"):
                key = f"{projection}.weight"
                found[new + key] = weights[old + key][neurons][:, hidden]
            found[new + "down_proj.weight"] = weights[old + "down_proj.weight"][hidden][:, neurons]
    return {name: tensor.contiguous() for name, tensor in found.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_most_important_are_kept(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    exported: Callable[..., PreTrainedModel],
    tmp_path: Path,
    variant: str,
) -> None:
    """Narrowed, learning, and written for transformers: the logits of what was sliced by hand."""
    hf_model = make_model(variant)
    hf_model.save_pretrained(tmp_path / "wide")
    wide = from_hf_config(hf_model.config)
    shape = narrower(wide)
    teacher, build = imported(tmp_path / "wide"), partial(build_model, shape, 128)
    model, scores = narrow_model(teacher, build, cut_widths(wide, shape), TEXT.split(1))
    assert all(score.isfinite().all() for score in scores.values())
    weights = load_file(tmp_path / "wide" / "model.safetensors")
    (tmp_path / "sliced").mkdir()
    save_file(
        sliced(weights, scores, wide, shape),
        tmp_path / "sliced" / "model.safetensors",
        {"format": "pt"},
    )
    hf_config_for(shape, hf_model.config).save_pretrained(tmp_path / "sliced")
    by_hand, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sliced", output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        expected = by_hand(TOKENS, use_cache=False).logits
        torch.testing.assert_close(logits(model, TOKENS), expected, atol=1e-5, rtol=0)
    written = exported(model, shape, hf_model.config)
    with torch.no_grad():
        assert torch.equal(written(TOKENS, use_cache=False).logits, expected)
    written.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in written.parameters())


def test_nothing_cut_is_the_teacher(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
) -> None:
    make_model("llama tied").save_pretrained(tmp_path)
    teacher, again = imported(tmp_path), imported(tmp_path)
    shape = from_hf_config(make_model("llama tied").config)
    build = partial(build_model, shape, 128)
    model, scores = narrow_model(again, build, cut_widths(shape, shape), TEXT.split(1))
    assert scores == {}
    assert torch.equal(forward(model, TOKENS), forward(teacher, TOKENS))


def test_an_expert_without_a_token_has_no_importance_and_spoils_no_other(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
) -> None:
    """ModelOpt's own mean over no tokens is NaN, and so is each sum that it goes into."""
    make_model("qwen3_moe, one expert a token").save_pretrained(tmp_path)
    few = TEXT[:1, :6]
    scores = prune_width(
        imported(tmp_path),
        {"moe_ffn_hidden_size": 40},
        lambda model: [forward(model, few[:, :2]), forward(model, few)],
    )
    of_experts = {name: score for name, score in scores.items() if "local_experts" in name}
    assert all(score.isfinite().all() for score in of_experts.values())
    unused = [name for name, score in of_experts.items() if not score.any()]
    assert 0 < len(unused) < len(of_experts)


def test_other_sizes_than_asked_for_are_refused(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
) -> None:
    make_model("llama tied").save_pretrained(tmp_path)
    pruned = imported(tmp_path)
    shape = from_hf_config(make_model("llama tied").config)
    prune_width(pruned, {"ffn_hidden_size": 48}, lambda model: forward(model, TEXT))
    asked = build_model(cut_shape(shape, {"ffn_hidden_size": 50}), 128)
    with pytest.raises(UserError, match=r"linear_fc1.weight has become \[96, 64\].* \[100, 64\]"):
        move_weights(pruned, asked)
