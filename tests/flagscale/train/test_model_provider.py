import inspect
import sys
from dataclasses import replace
from typing import Optional, Union

import modelopt.torch.distill as mtd
import modelopt.torch.opt as mto
import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from flagscale.checkpoint import load_weights
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import with_teacher
from flagscale.megatron.global_vars import get_args, get_timers, use_args
from flagscale.megatron.layer_specs import layer_spec
from flagscale.megatron.shape import ModelShape
from flagscale.megatron.transformer_config import transformer_config
from flagscale.models.megatron import build_model, logits
from flagscale.post_training.model_provider import _build_teacher
from flagscale.recipe import ArchitectureRecipe, DistillationRecipe, ParallelismRecipe
from flagscale.train import train_gpt
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


def test_fp8_is_the_students_alone(runtime, args, teacher):
    fp8 = replace(args, export_kd_teacher_load=teacher, fp8="hybrid")
    shape = ModelShape.load(teacher)
    assert _build_teacher(fp8, shape, True, True).config.fp8 is None


def test_without_modelopt_arguments_the_model_is_plain(runtime, args):
    with use_args(args):
        assert type(model_provider()) is GPTModel


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ({"vp_stage": 1}, "vp_stage=1.*must be None"),
        ({"is_dualpipev_first_chunk": True}, "is_dualpipev_first_chunk=True.*must be"),
    ],
)
def test_what_modelopt_cannot_honour_is_refused(runtime, args, teacher, call, names):
    with (
        use_args(with_teacher(args, teacher, DistillationRecipe())),
        pytest.raises(ValueError, match=names),
    ):
        model_provider(**call)


MLA = {
    "multi_latent_attention": True,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
BLOCKS = [
    {"attention": {"num_query_groups": 4}, "mlp": {"replace_with_linear": True}},
    {"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 48}},
]


def with_architecture(args, **architecture):
    shape = replace(args.shape, architecture=ArchitectureRecipe(**architecture))
    if shape.architecture.multi_latent_attention:
        shape = replace(shape, num_query_groups=shape.num_attention_heads)
    return replace(args, shape=shape)


@pytest.mark.parametrize("skip_lm_loss", [True, False])
@pytest.mark.parametrize(
    "architecture",
    [
        {"num_experts": 4, "moe_layer_freq": 2},
        {"num_experts": 2, "moe_shared_expert_intermediate_size": 32},
        MLA,
        {"num_experts": 2, **MLA},
        {"heterogeneous_layers_config": {"block_configs": BLOCKS}},
        {"normalization": "LayerNorm"},
    ],
    ids=["experts", "shared expert", "latent attention", "both", "heterogeneous", "LayerNorm"],
)
def test_students_of_other_architectures_learn_from_a_dense_teacher(
    runtime, args, teacher, batch, architecture, skip_lm_loss
):
    recipe = DistillationRecipe(temperature=2.0, skip_lm_loss=skip_lm_loss)
    with use_args(with_teacher(with_architecture(args, **architecture), teacher, recipe)):
        model = model_provider()
        inputs = batch["tokens"], batch["position_ids"], None
        mask, labels = batch["loss_mask"], batch["labels"]
        model.eval()
        with torch.no_grad():
            logits_s, logits_t = (m(*inputs).double() for m in (model, model.teacher_model))
        model.train()
        output = model(*inputs, labels=labels, loss_mask=mask)
        loss, _, report = train_gpt.loss_func(mask, output, model=model)
    log_s, log_t = ((x / 2).log_softmax(-1) for x in (logits_s, logits_t))
    kd_loss = (4 * (log_t.exp() * (log_t - log_s)).sum(-1) * mask).sum()
    lm_loss = (F.cross_entropy(logits_s.transpose(1, 2), labels, reduction="none") * mask).sum()
    found = report["logits distillation loss"][0].double()
    torch.testing.assert_close(found, kd_loss, rtol=1e-5, atol=0)
    total = kd_loss if skip_lm_loss else kd_loss + lm_loss
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("_teacher_model."):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {"mtp_num_layers": 1}}, "mtp_num_layers=1 with distillation.loss=logits"),
        ({"architecture": {"spec": "a:b"}}, "spec=a:b with distillation.loss=logits"),
        ({"use_legacy_models": True}, "use_legacy_models=true with distillation.loss=logits"),
        ({"use_dualpipev": True}, "use_dualpipev=True"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm=True"),
        (
            {
                "parallelism": ParallelismRecipe(
                    pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
                )
            },
            "virtual_pipeline_model_parallel_size=2 with distillation.loss=logits",
        ),
    ],
)
def test_arguments_that_modelopt_cannot_honour_are_refused(
    runtime, args, teacher, changes, message
):
    args = with_architecture(args, **changes.pop("architecture", {}))
    with (
        use_args(with_teacher(replace(args, **changes), teacher, DistillationRecipe())),
        pytest.raises(ValueError, match=message),
    ):
        model_provider()


def test_virtual_stages_have_their_layers(runtime, args):
    """Two pipeline ranks, one after the other in this process, with two chunks each.

    Real processes run them in test_layouts.py.
    """
    sizes = ParallelismRecipe(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    shape = replace(args.shape, num_layers=8)
    built = {}
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    try:
        for rank in range(2):
            parallel_state.set_pipeline_model_parallel_rank(rank)
            for stage in range(2):
                with use_args(replace(args, shape=shape, parallelism=sizes)):
                    config = transformer_config(get_args())
                    chunk = layer_spec(get_args(), config, stage)
                first = get_transformer_layer_offset(config, stage, rank)
                built[rank, stage] = list(range(first, first + len(chunk.layer_specs)))
    finally:
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    assert built == {(0, 0): [0, 1], (1, 0): [2, 3], (0, 1): [4, 5], (1, 1): [6, 7]}


LEGACY = """
class GPTModel:
    def __init__(self, config, **arguments):
        self.config, self.arguments = config, arguments
"""


@pytest.fixture
def legacy_package(tmp_path, monkeypatch):
    """A stand-in for Megatron-LM's checkout, which merges with the wheel's namespace package."""
    package = tmp_path / "megatron" / "legacy" / "model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(LEGACY)
    (package.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("megatron.legacy")]:
        del sys.modules[name]


def test_legacy_model_is_built_as_megatron_lm_builds_it(runtime, args, legacy_package):
    with use_args(replace(args, use_legacy_models=True)):
        model = model_provider(pre_process=True, post_process=False)
    assert type(model).__module__ == "megatron.legacy.model"
    assert model.arguments == {
        "num_tokentypes": 0,
        "parallel_output": True,
        "pre_process": True,
        "post_process": False,
    }
    assert model.config.num_layers == args.shape.num_layers


def test_legacy_model_takes_no_stage_and_no_architecture(runtime, args, legacy_package):
    args = replace(args, use_legacy_models=True)
    with use_args(args), pytest.raises(ValueError, match="vp_stage=1 with use_legacy_models=True"):
        model_provider(vp_stage=1)
    with (
        use_args(with_architecture(args, num_experts=2)),
        pytest.raises(ValueError, match=r"use_legacy_models=true with student\.architecture"),
    ):
        model_provider()
    with (
        use_args(replace(args, reset_attention_mask=True)),
        pytest.raises(ValueError, match="use_legacy_models=true with reset_attention_mask=true"),
    ):
        model_provider()


@pytest.mark.skipif(platform.HAS_GPU, reason="there is a GPU")
def test_memory_history_without_a_gpu_is_refused(runtime, args, teacher):
    args = replace(args, record_memory_history=True)
    for arguments in (args, with_teacher(args, teacher, DistillationRecipe())):
        with use_args(arguments), pytest.raises(UserError, match="record_memory_history=true"):
            model_provider()


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


@pytest.mark.parametrize("getter", [get_args, get_timers])
def test_unset_run_state_raises(getter):
    with pytest.raises(RuntimeError, match="not set"):
        getter()


def test_distillation_has_no_modelopt_state_to_save(runtime, args, teacher):
    """So a checkpoint needs none: the recipe rebuilds the mode. Another mode would show up here."""
    with use_args(with_teacher(args, teacher, DistillationRecipe())):
        model = model_provider()
    assert mto.ModeloptStateManager.is_converted(model)
    assert mto.modelopt_state(model)["modelopt_state_dict"] == []
