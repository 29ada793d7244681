"""A distillation model whose output layers are fused with the losses: what it holds and gives."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flagscale.checkpoint import load_weights
from flagscale.errors import UserError
from flagscale.megatron.arguments import with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.post_training import linear_divergence
from flagscale.post_training.conversion import convert_for_distillation
from flagscale.post_training.export import plain_student
from flagscale.post_training.quantization import insert_quantizers
from flagscale.recipe import DistillationRecipe
from flagscale.train.train_gpt import forward_step, model_provider

CHUNK = 4  # tokens, of the batch's 128


def build(args, student, teacher, **recipe):
    """Arguments and model."""
    args = with_teacher(args, teacher, DistillationRecipe(**recipe))
    with use_args(args):
        model = model_provider()
        load_weights(model, student / "weights")
    return args, model


def losses(args, model, batch):
    """Loss and report of a batch."""
    with use_args(args):
        output, loss_of = forward_step(iter([batch]), model)
        loss, _, report = loss_of(output)
    return loss, report


class Widest(TorchDispatchMode):
    """The most numbers in a tensor whose last dimension is the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.numbers = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.shape[-1:] == (self.vocabulary,):
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize("skip_lm_loss", [True, False])
def test_logits_are_never_held(monkeypatch, args, student, teacher, batch, skip_lm_loss):
    vocabulary = args.shape.padded_vocab_size
    monkeypatch.setitem(linear_divergence.CHUNK_BYTES, "cpu", CHUNK * 3 * 4 * vocabulary)
    of_logits = batch["tokens"].numel() * vocabulary
    found = {}
    for fuse in (True, False):
        args, model = build(
            args, student, teacher, skip_lm_loss=skip_lm_loss, fuse_output_layer=fuse
        )
        with Widest(vocabulary) as seen:
            model.train()
            loss, report = losses(args, model, batch)
            loss.backward()
            model.eval()
            with torch.no_grad():
                _, validation = losses(args, model, batch)
        # Transposed, a weight looks like the logits of as many tokens as hidden states are wide.
        assert (seen.numbers < of_logits) if fuse else (seen.numbers >= of_logits)
        found[fuse] = loss, report, validation, dict(model.named_parameters())
    (loss, *reports, ours), (expected, *their_reports, theirs) = found[True], found[False]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for report, their_report in zip(reports, their_reports, strict=True):
        assert report.keys() == their_report.keys()
        for name, value in report.items():
            torch.testing.assert_close(value, their_report[name], rtol=1e-6, atol=0)
    for name, parameter in theirs.items():
        if parameter.grad is not None:
            error = (ours[name].grad - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, name


@pytest.mark.parametrize("train", [True, False])
def test_without_labels_the_model_gives_logits(args, student, teacher, batch, train):
    _, model = build(args, student, teacher)
    model.train(train)
    inputs = batch["tokens"], batch["position_ids"], None
    for part in (model, model.teacher_model):
        assert part(*inputs).shape[-1] == args.shape.padded_vocab_size


def test_evaluation_can_be_differentiated(args, student, teacher, batch):
    """The loss is another then: the LM loss."""
    args, model = build(args, student, teacher)
    model.eval()
    loss, report = losses(args, model, batch)
    loss.backward()
    torch.testing.assert_close(loss, report["lm loss"][0])
    assert model.embedding.word_embeddings.weight.grad.any()


def test_another_mask_than_the_models_stops(args, student, teacher, batch):
    args, model = build(args, student, teacher)
    model.train()
    with use_args(args):
        _, loss_of = forward_step(iter([batch]), model)
        loss, *_ = loss_of.func(1 - batch["loss_mask"], torch.zeros_like(batch["loss_mask"]), model)
    with pytest.raises(RuntimeError, match="differentiated in another way"):
        loss.backward()


def test_export_leaves_nothing(args, student, teacher, batch):
    _, model = build(args, student, teacher)
    teacher_model = model.teacher_model
    layers = model.output_layer, teacher_model.output_layer
    assert all("forward" in vars(layer) for layer in layers)
    plain = plain_student(model)
    assert not any("forward" in vars(layer) for layer in (*layers, plain, teacher_model))


def test_quantised_students_output_layers_are_fused(args, student, teacher, batch):
    """ModelOpt replaces them too, but leaves their quantisers off."""
    with use_args(replace(args, export_kd_teacher_load=None)):
        models = [model_provider() for _ in range(2)]
    insert_quantizers(models[0], "fp8")
    layer = models[0].output_layer
    assert type(layer) is not type(models[1].output_layer)
    model = convert_for_distillation(*models, DistillationRecipe(fuse_output_layer=True))
    assert "forward" in vars(layer)
    plain_student(model)
    layer.weight_quantizer.enable()
    with pytest.raises(UserError, match="fuse_output_layer=true: the student's output layer is a"):
        convert_for_distillation(*models, DistillationRecipe(fuse_output_layer=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.register_forward_hook(lambda *_: None), "has a hook"),
        (lambda layer: layer.register_forward_pre_hook(lambda *_: None), "has a hook"),
        (lambda layer: setattr(layer, "bias", torch.nn.Parameter(torch.zeros(1))), "has a bias"),
        (
            lambda layer: setattr(layer, "__class__", type("Quantised", (type(layer),), {})),
            "is a Quantised",
        ),
    ],
)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_does_more_than_multiply_is_refused(args, student, teacher, change, message, whose):
    with use_args(replace(args, export_kd_teacher_load=None)):
        models = {"student": model_provider(), "teacher": model_provider()}
    change(models[whose].output_layer)
    recipe = DistillationRecipe(fuse_output_layer=True)
    with pytest.raises(UserError, match=f"fuse_output_layer=true: the {whose}'s .* {message}"):
        convert_for_distillation(models["student"], models["teacher"], recipe)
