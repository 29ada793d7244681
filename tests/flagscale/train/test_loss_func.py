import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flagscale.checkpoint import load_weights
from flagscale.megatron.arguments import with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.recipe import DistillationRecipe
from flagscale.train.train_gpt import forward_step, loss_func, model_provider

RELATIVE = 1e-5  # fp32 against float64


def run(args, student, batch, train=True):
    """The three results of the loss of `batch`, and the model."""
    with use_args(args):
        model = model_provider()
        load_weights(model, student / "weights")
        model.train(train)
        output, loss_of = forward_step(iter([batch]), model)
        return *loss_of(output), model


def lm_reference(model, batch):
    """Float64: the summed LM loss of the unmasked tokens."""
    losses = F.cross_entropy(
        model(batch["tokens"]).logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
    )
    return (losses * batch["loss_mask"].flatten().double()).sum()


def kd_reference(reference, batch, temperature):
    """Float64: the summed T^2 KL(teacher || student) of the unmasked tokens."""
    with torch.no_grad():
        log_p = F.log_softmax(reference.teacher(batch["tokens"]).logits / temperature, -1)
    log_q = F.log_softmax(reference.student(batch["tokens"]).logits / temperature, -1)
    losses = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    return (losses * batch["loss_mask"].double()).sum()


def close(found, expected, relative=RELATIVE):
    torch.testing.assert_close(found.double(), expected.double(), rtol=relative, atol=0)


def test_signature_is_the_contract():
    parameters = inspect.signature(loss_func).parameters
    assert list(parameters) == ["loss_mask", "output_tensor", "model"]
    assert parameters["model"].default is None
    annotations = inspect.get_annotations(loss_func)
    assert annotations["model"] == "Optional[GPTModel]"


def test_lm_loss_equals_float64(args, student, batch, reference):
    loss, num_tokens, report, _ = run(args, student, batch)
    close(loss, lm_reference(reference.student, batch).detach())
    assert num_tokens.dtype == torch.int32
    assert num_tokens == batch["loss_mask"].sum()
    assert set(report) == {"lm loss"}
    assert report["lm loss"].tolist() == [loss.item(), num_tokens.item()]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_loss_equals_float64(args, student, teacher, batch, reference, temperature):
    kd_args = with_teacher(args, teacher, DistillationRecipe(temperature=temperature))
    loss, num_tokens, report, _ = run(kd_args, student, batch)
    expected = kd_reference(reference, batch, temperature).detach()
    close(loss, expected)
    close(report["logits distillation loss"][0], expected)
    assert report["logits distillation loss"][1] == num_tokens == batch["loss_mask"].sum()
    assert set(report) == {"total loss", "logits distillation loss"}


def test_kd_gradients_equal_float64(args, student, teacher, batch, reference):
    kd_args = with_teacher(args, teacher, DistillationRecipe(temperature=2.0))
    loss, _, _, model = run(kd_args, student, batch)
    loss.backward()
    kd_reference(reference, batch, 2.0).backward()
    theirs = dict(reference.student.named_parameters())
    pairs = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "decoder.layers.0.mlp.linear_fc2.weight": "model.layers.0.mlp.down_proj.weight",
        "decoder.layers.1.self_attention.linear_proj.weight": (
            "model.layers.1.self_attn.o_proj.weight"
        ),
    }
    ours = dict(model.named_parameters())
    for name, their_name in pairs.items():
        expected = theirs[their_name].grad
        found = ours[name].grad[: expected.size(0)].double()
        assert (found - expected).norm() <= RELATIVE * expected.norm(), name
    assert all(p.grad is None for p in model.teacher_model.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_kd_loss_does_not_depend_on_the_lm_loss(args, student, teacher, batch, reference, train):
    """In fp32 Megatron-Core's cross entropy overwrites the logits that the KD loss reads."""
    found = [
        run(
            with_teacher(args, teacher, DistillationRecipe(skip_lm_loss=skip)),
            student,
            batch,
            train,
        )[2]["logits distillation loss"][0]
        for skip in (True, False)
    ]
    assert found[0] == found[1]
    close(found[0], kd_reference(reference, batch, 1.0).detach())


def test_lm_and_kd_loss_together(args, student, teacher, batch, reference):
    recipe = DistillationRecipe(skip_lm_loss=False, kd_loss_scale=0.5)
    loss, _, report, model = run(with_teacher(args, teacher, recipe), student, batch)
    lm_loss = lm_reference(reference.student, batch)
    kd_loss = kd_reference(reference, batch, 1.0)
    total = lm_loss + 0.5 * kd_loss
    close(loss, total.detach())
    close(report["total loss"][0], total.detach())
    close(report["lm loss"][0], lm_loss.detach())
    loss.backward()
    total.backward()
    expected = reference.student.model.embed_tokens.weight.grad
    found = model.embedding.word_embeddings.weight.grad[: expected.size(0)].double()
    assert (found - expected).norm() <= RELATIVE * expected.norm()


def test_evaluation_returns_the_lm_loss(args, student, teacher, batch, reference):
    kd_args = with_teacher(args, teacher, DistillationRecipe())
    loss, _, report, _ = run(kd_args, student, batch, train=False)
    expected = lm_reference(reference.student, batch).detach()
    close(loss, expected)
    close(report["lm loss"][0], expected)
    close(report["logits distillation loss"][0], kd_reference(reference, batch, 1.0).detach())


def test_intermediate_loss_equals_float64(args, student, teacher, batch, reference):
    pair = ("decoder.final_layernorm", "decoder.final_layernorm")
    hidden = [
        model.model(batch["tokens"]).last_hidden_state.detach()
        for model in (reference.student, reference.teacher)
    ]
    mask = batch["loss_mask"].double()
    mse = (F.mse_loss(*hidden, reduction="none").mean(-1) * mask).sum()
    recipe = DistillationRecipe(
        intermediate_layer_pairs=((*pair, "mse"),), intermediate_loss_scale=3.0
    )
    loss, _, report, _ = run(with_teacher(args, teacher, recipe), student, batch)
    close(report["intermediate distillation loss"][0], mse)
    close(loss, kd_reference(reference, batch, 1.0).detach() + 3 * mse)


def test_student_equal_to_teacher_has_no_kd_loss(args, teacher, batch):
    from flagscale.megatron.shape import ModelShape

    same = replace(args, shape=ModelShape.load(teacher))
    loss, *_ = run(with_teacher(same, teacher, DistillationRecipe()), teacher, batch)
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("distil", [False, True])
def test_all_masked_batch_gives_zero(args, student, teacher, batch, distil):
    chosen = with_teacher(args, teacher, DistillationRecipe()) if distil else args
    empty = {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}
    loss, num_tokens, report, model = run(chosen, student, empty)
    assert loss == 0
    assert num_tokens == 0
    assert all(value.tolist() == [0, 0] for value in report.values())
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_non_finite_loss_stops(runtime, args, value, word):
    losses = torch.ones(2, 8)
    losses[0, 3] = value
    with use_args(args), pytest.raises(RuntimeError, match=word):
        loss_func(torch.ones(2, 8), losses)
    with use_args(replace(args, check_for_nan_in_loss_and_grad=False)):
        assert not loss_func(torch.ones(2, 8), losses)[0].isfinite()


def test_spiky_loss_warns(runtime, args, caplog):
    caplog.set_level("WARNING", logger="megatron.core.rerun_state_machine")
    with use_args(replace(args, check_for_spiky_loss=True)):
        for _ in range(300):
            loss_func(torch.ones(1, 4), torch.ones(1, 4))
        assert "spiky" not in caplog.text
        loss_func(torch.ones(1, 4), torch.full((1, 4), 50.0))
    assert "spiky loss" in caplog.text


def test_distillation_needs_the_model(runtime, args, teacher):
    with (
        use_args(with_teacher(args, teacher, DistillationRecipe())),
        pytest.raises(ValueError, match="model=None"),
    ):
        loss_func(torch.ones(1, 4), torch.ones(1, 4))
