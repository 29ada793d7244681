"""Importance of layers against transformers in float64, and on ranks against one process."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser
from importance_worker import importance_on_rank
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from flagscale.evaluation.measure.layer_importance import (
    LayerImportance,
    Removal,
    measure_importance,
)
from flagscale.evaluation.pages.student import render
from flagscale.execution.launch import call_on_ranks
from flagscale.megatron import platform
from flagscale.models.megatron import load_model
from flagscale.recipe import LayoutRecipe, ModelsRecipe, TeacherRecipe
from flagscale.steps.prepare_teacher import prepare_teacher

LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP4": {"pipeline_model_parallel_size": 4},
    "TP2 x PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    """Two micro-batches; some tokens have no loss."""
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "tokens": torch.randint(1000, (2, 24), generator=draw).tolist(),
            "labels": torch.randint(1000, (2, 24), generator=draw).tolist(),
            "loss_mask": torch.randint(2, (2, 24), generator=draw).float().tolist(),
        }
        for _ in range(2)
    ]


def measured(
    artifact: Path, batches: list[Any], criterion: str, count: int, **layout: int
) -> dict[str, Any]:
    models = ModelsRecipe(parallelism=LayoutRecipe(**layout))
    if models.processes == 1:
        return importance_on_rank(artifact, models, batches, criterion, count)
    return call_on_ranks(
        "test",
        importance_on_rank,
        models.processes,
        artifact=artifact,
        models=models,
        batches=batches,
        criterion=criterion,
        count=count,
    )


@torch.no_grad()
def by_transformers(folder: Path, batches: list[Any], kept: list[int]) -> tuple[float, float]:
    """KL and agreement of a model of these layers with the whole one."""
    whole, cut = (AutoModelForCausalLM.from_pretrained(folder).double().eval() for _ in "12")
    cut.model.layers = torch.nn.ModuleList([cut.model.layers[i] for i in kept])
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0
    for batch in batches:
        mask = torch.tensor(batch["loss_mask"]).bool()
        ids = torch.tensor(batch["tokens"])
        p, q = (m(ids, use_cache=False).logits.log_softmax(-1)[mask] for m in (whole, cut))
        agree = p.argmax(-1) == q.argmax(-1)
        sums += torch.stack([(p.exp() * (p - q)).sum(), agree.double().sum()])
        tokens += int(mask.sum())
    return tuple((sums / tokens).tolist())


def test_layers_go_greedily_by_kl_as_in_transformers(
    teacher: Path, tiny_teacher: Path, batches: list[Any]
) -> None:
    found = measured(teacher, batches, "kl", 3)
    kept = [0, 1, 2, 3]
    for removal in found["removals"]:
        every = {
            i: by_transformers(tiny_teacher, batches, [k for k in kept if k != i]) for i in kept
        }
        if len(kept) == 4:
            assert found["scores"] == pytest.approx([kl for kl, _ in every.values()], rel=1e-4)
        best = min(every, key=lambda i: every[i][0])
        assert removal["layer"] == best
        assert (removal["kl"], removal["top1_agreement"]) == pytest.approx(every[best], rel=1e-4)
        kept.remove(best)
    assert found["tokens"] == sum(int(sum(map(sum, b["loss_mask"]))) for b in batches)


@torch.no_grad()
def test_block_influence_is_shortgpts(
    teacher: Path, tiny_teacher: Path, batches: list[Any]
) -> None:
    found = measured(teacher, batches, "block_influence", 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).double().eval()
    into: list[list[torch.Tensor]] = [[] for _ in range(5)]
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, inputs, n=number: into[n].append(inputs[0]))
    # The last of transformers' hidden states has gone through the final norm.
    model.model.norm.register_forward_pre_hook(lambda _, inputs: into[4].append(inputs[0]))
    for batch in batches:
        model(torch.tensor(batch["tokens"]), use_cache=False)
    mask = torch.cat([torch.tensor(b["loss_mask"]).bool() for b in batches])
    states = [torch.cat(values)[mask] for values in into]
    expected = [
        (1 - torch.cosine_similarity(a, b, dim=-1)).mean().item()
        for a, b in itertools.pairwise(states)
    ]
    assert found["scores"] == pytest.approx(expected, rel=1e-4)
    order = sorted(range(4), key=expected.__getitem__)[:2]
    assert [removal["layer"] for removal in found["removals"]] == order
    for number, removal in enumerate(found["removals"], start=1):
        kept = [i for i in range(4) if i not in order[:number]]
        kl, agreement = by_transformers(tiny_teacher, batches, kept)
        assert removal["kl"] == pytest.approx(kl, rel=1e-4)
        assert removal["top1_agreement"] == pytest.approx(agreement)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_on_ranks_it_is_that_of_one_process(
    layout: dict[str, int], teacher: Path, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    for criterion in ("kl", "block_influence") if "PP2" in str(layout) else ("kl",):
        alone = measured(teacher, batches, criterion, 3)
        ranks = measured(teacher, batches, criterion, 3, **layout)
        assert ranks["scores"] == pytest.approx(alone["scores"], rel=1e-4)
        assert _layers(ranks) == _layers(alone)
        for ours, theirs in zip(ranks["removals"], alone["removals"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("criterion", ["kl", "block_influence"])
def test_an_attempt_goes_on_with_what_another_has_measured(
    teacher: Path, batches: list[Any], criterion: str
) -> None:
    """Wherever that one was killed; and it tells all that both know."""
    told: list[dict[str, Any]] = []
    made = [{name: torch.tensor(values) for name, values in b.items()} for b in batches]
    with platform.runtime():
        model = load_model(teacher, made[0]["tokens"].size(1))
        call = (model, made, criterion, 3)
        whole = measure_importance(*call, tell=lambda known: told.append(dict(known)))
        for number, known in enumerate(told, start=1):
            more: list[dict[str, Any]] = []
            again = measure_importance(*call, known, tell=lambda x, to=more: to.append(dict(x)))
            assert again == whole
            assert len(more) == len(told) - number
            assert not more or more[-1] == told[-1]


def test_experts_on_two_ranks(
    tiny_teacher: Path,
    dataset: Path,
    batches: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    source = moe_teacher(tiny_teacher, tmp_path / "source")
    recipe = TeacherRecipe(source=str(source), max_validation_loss=20)
    prepare_teacher(recipe, dataset, tmp_path / "teacher")
    alone = measured(tmp_path / "teacher", batches, "kl", 1)
    ranks = measured(tmp_path / "teacher", batches, "kl", 1, expert_model_parallel_size=2)
    assert ranks["scores"] == pytest.approx(alone["scores"], rel=1e-4)
    assert _layers(ranks) == _layers(alone)


def moe_teacher(tiny_teacher: Path, folder: Path) -> Path:
    from transformers import AutoTokenizer

    torch.manual_seed(5)
    config = Qwen3MoeConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


def _layers(found: dict[str, Any]) -> list[int]:
    return [removal["layer"] for removal in found["removals"]]


def test_page_shows_order_and_figures(browser: Browser) -> None:
    removals = (Removal(2, 0.125, 0.81), Removal(0, 0.5, 0.62))
    found = LayerImportance("kl", (0.4, 3.0, 0.125), removals, 512)
    assert found.kept == (1,)
    facts = {"shape": {"num_layers": 1}, "parameters": 1.5e6, "kd_loss_at_start": 0.6}
    page = render(facts, found)
    assert page == render(facts, found)
    assert "A student of 1 layers, 1.5M parameters" in page
    assert "2 of the teacher&#39;s 3 layers removed; before training KL 0.5 nats a token" in page
    assert '<th scope="row">2</th><td>2</td><td>0.125</td><td>81.0%</td>' in page
    assert page.count("<svg") == 2
    cut = facts | {"width_importance": {"sizes": {"hidden_size": 2, "ffn_hidden_size": 1}}}
    shares = {"hidden_size": [0.5, 0.9, 1.0], "ffn_hidden_size": [0.75, 1.0]}
    narrower = render(cut, None, shares)
    assert "Which channels went" in narrower
    assert "2 of 3 hidden_size have 90.0%; 1 of 2 ffn_hidden_size have 75.0%" in narrower
    for shown in (page, narrower):
        browser.check(shown)
    plain = render(facts, None)
    assert "<svg" not in plain
    assert "Which layers went" not in plain
