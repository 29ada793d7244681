import inspect
from dataclasses import replace
from typing import Optional, Union

import modelopt.torch.distill as mtd
import pytest
import torch
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint import load_weights
from flagscale.errors import UserError
from flagscale.models.megatron import build_model, logits
from flagscale.models.shape import ModelShape
from flagscale.recipe import DistillationRecipe
from flagscale.train import train_gpt
from flagscale.train.arguments import with_teacher
from flagscale.train.global_vars import get_args, get_timers, use_args
from flagscale.train.train_gpt import model_provider


def test_signature_is_the_contract():
    parameters = inspect.signature(model_provider).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "pre_process": True,
        "post_process": True,
        "vp_stage": None,
        "is_dualpipev_first_chunk": False,
    }
    annotations = inspect.get_annotations(model_provider)
    assert annotations["vp_stage"] == "Optional[int]"
    assert annotations["is_dualpipev_first_chunk"] == "Optional[bool]"
    assert annotations["return"] == "Union[GPTModel, megatron.legacy.model.GPTModel]"
    assert train_gpt.Optional is Optional
    assert train_gpt.Union is Union


def test_standard_model_computes_what_transformers_computes(args, student, batch, reference):
    with use_args(args):
        model = model_provider().eval()
    load_weights(model, student / "weights")
    expected = reference.student(batch["tokens"]).logits
    torch.testing.assert_close(logits(model, batch["tokens"]).double(), expected, rtol=0, atol=1e-5)


def test_first_and_last_chunk_have_only_their_parts(runtime, args):
    with use_args(args):
        first = model_provider(post_process=False)
        last = model_provider(pre_process=False)
    assert hasattr(first, "embedding")
    assert not hasattr(first, "output_layer")
    assert first.decoder.final_layernorm is None
    assert hasattr(last, "output_layer")
    assert last.decoder.final_layernorm is not None


def test_modelopt_arguments_give_a_distillation_model(runtime, args, teacher):
    with use_args(with_teacher(args, teacher, DistillationRecipe())):
        model = model_provider()
    assert isinstance(model, mtd.DistillationModel)
    original = build_model(ModelShape.load(teacher), args.seq_length)
    load_weights(original, teacher / "weights")
    for (name, ours), theirs in zip(
        model.teacher_model.named_parameters(), original.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert not ours.requires_grad
    assert not any("teacher" in name for name in model.state_dict())
    assert not any("teacher" in name for name in model.sharded_state_dict())


def test_without_modelopt_arguments_the_model_is_plain(runtime, args):
    with use_args(args):
        assert type(model_provider()) is GPTModel


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ({"vp_stage": 1}, "vp_stage=1.*must be None"),
        ({"is_dualpipev_first_chunk": True}, "is_dualpipev_first_chunk=True"),
    ],
)
def test_what_modelopt_cannot_honour_is_refused(runtime, args, teacher, call, names):
    with (
        use_args(with_teacher(args, teacher, DistillationRecipe())),
        pytest.raises(ValueError, match=names),
    ):
        model_provider(**call)


def test_missing_legacy_package_says_how_to_get_it(runtime, args):
    with (
        use_args(replace(args, use_legacy_models=True)),
        pytest.raises(UserError, match=r"use_legacy_models=True.*core_v0\.16\.1.*PYTHONPATH"),
    ):
        model_provider()


def test_teacher_with_another_vocabulary_is_refused(runtime, args, teacher):
    shape = replace(args.shape, padded_vocab_size=args.shape.padded_vocab_size + 128)
    with (
        use_args(with_teacher(replace(args, shape=shape), teacher, DistillationRecipe())),
        pytest.raises(ValueError, match=r"student's vocabulary.*must be the teacher's"),
    ):
        model_provider()


def test_missing_teacher_is_named(runtime, args, tmp_path):
    with (
        use_args(with_teacher(args, tmp_path / "nothing", DistillationRecipe())),
        pytest.raises(UserError, match="nothing"),
    ):
        model_provider()


def test_padded_vocabulary_changes_no_probability(runtime, args, batch):
    padded_size = args.shape.padded_vocab_size + 256
    narrow = build_model(args.shape, args.seq_length)
    wide = build_model(replace(args.shape, padded_vocab_size=padded_size), args.seq_length)
    state = narrow.state_dict()
    name = "embedding.word_embeddings.weight"
    # Padding rows that would be the likeliest tokens, were they counted.
    state[name] = torch.cat([state[name], torch.full((256, args.shape.hidden_size), 10.0)])
    wide.load_state_dict(state)
    labels = batch["labels"]
    with torch.no_grad():
        expected, found = (
            model(batch["tokens"], batch["position_ids"], None, labels=labels)
            for model in (narrow, wide)
        )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert logits(wide, batch["tokens"]).size(-1) == args.shape.vocab_size


def test_upstream_seams(monkeypatch):
    """Tests written for upstream's module replace these names and expect these calls."""
    calls = []
    monkeypatch.setattr(train_gpt, "get_args", lambda: "the arguments")
    monkeypatch.setattr(train_gpt, "modelopt_args_enabled", lambda args: args == "the arguments")
    monkeypatch.setattr(
        train_gpt, "model_provider_modelopt", lambda *args: calls.append(args) or "the model"
    )
    assert model_provider(True, False) == "the model"
    assert calls == [(True, False)]


@pytest.mark.parametrize("getter", [get_args, get_timers])
def test_unset_run_state_raises(getter):
    with pytest.raises(RuntimeError, match="not set"):
        getter()
