import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from modelopt_import import imported_by_modelopt, knows
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from variants import VARIANTS

from flagscale.errors import UserError
from flagscale.megatron.families import FAMILIES
from flagscale.megatron.shape import ModelShape, from_hf_config
from flagscale.models.hf_folder import HFFolder
from flagscale.models.hf_import import check_names, fill
from flagscale.models.hf_weights import WeightMap
from flagscale.models.megatron import build_model, logits

TOKENS = torch.randint(300, (2, 128), generator=torch.Generator().manual_seed(0))
FILE = "model.safetensors"


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize(
    "family",
    [name for name, values in VARIANTS.items() if knows(FAMILIES[values["model_type"]])],
)
def test_weights_are_those_of_modelopt_s_importer(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
    family: str,
) -> None:
    hf_model = make_model(family)
    hf_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = imported(tmp_path)
    shape = from_hf_config(hf_model.config)
    assert (shape.vocab_size, shape.padded_vocab_size) == (300, 384)
    expected = dict(imported_by_modelopt(hf_model, shape).named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("family", VARIANTS)
def test_logits_are_those_of_transformers(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
    family: str,
) -> None:
    hf_model = make_model(family)
    hf_model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = hf_model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(imported(tmp_path), TOKENS), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("divisor", [1, 256])
def test_padding_neither_changes_logits_nor_is_needed(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, divisor: int
) -> None:
    hf_model = make_model("llama tied")
    hf_model.save_pretrained(tmp_path)
    shape = from_hf_config(hf_model.config, make_vocab_size_divisible_by=divisor)
    model = build_model(shape, 128)
    fill(model, HFFolder(tmp_path), WeightMap(shape))
    table = model.embedding.word_embeddings.weight
    assert table.size(0) == {1: 300, 256: 512}[divisor]
    assert not table[300:].any()
    with torch.no_grad():
        expected = hf_model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(model, TOKENS), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_source_s_dtype_is_kept(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    hf_model = make_model("qwen3 untied").to(dtype)
    hf_model.save_pretrained(tmp_path)
    model = imported(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    table = hf_model.get_input_embeddings().weight
    assert torch.equal(model.embedding.word_embeddings.weight[:300], table)
    projection = hf_model.model.layers[2].mlp.down_proj.weight
    assert torch.equal(model.decoder.layers[2].mlp.linear_fc2.weight, projection)


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_slices_of_ranks_make_up_the_whole(
    make_model: Callable[..., PreTrainedModel], family: str, ranks: int
) -> None:
    """Whatever rows a rank has, they are those rows of the whole tensor."""
    weights = WeightMap(from_hf_config(make_model(family).config))
    for key in ("linear_qkv.weight", "linear_qkv.bias"):
        name = f"decoder.layers.self_attention.{key}"
        if key.endswith("bias") and "qwen2" not in family:
            continue
        whole = weights.locate(name, (1, 0, 0))
        rows = [(part.name, row) for part in whole.parts for row in range(part.start, part.stop)]
        of_ranks = []
        for rank in range(ranks):
            first, last = len(rows) * rank // ranks, len(rows) * (rank + 1) // ranks
            located = weights.locate(name, (1, first, 0))
            at = 0
            for start, part in located.overlaps(last - first):
                assert start == at
                at += len(part)
                of_ranks += [(part.name, row) for row in range(part.start, part.stop)]
            assert at == last - first
        assert of_ranks == rows
        assert len(set(rows)) == len(rows)


def _shape(folder: Path) -> ModelShape:
    return from_hf_config(AutoConfig.from_pretrained(folder))


def _with(folder: Path, **changes: torch.Tensor | None) -> HFFolder:
    """The folder with other weights."""
    state = load_file(folder / FILE)
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / FILE, {"format": "pt"})
    return HFFolder(folder, "the source")


@pytest.fixture
def qwen(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    make_model("qwen2 tied").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "1 weights are missing, first model.layers.1"),
        ("model.layers.1.self_attn.o_proj.bias", torch.ones(64), "are left over, first model.l"),
        (
            "model.layers.3.input_layernorm.weight",
            torch.ones(64),
            "left over, first model.layers.3",
        ),
        ("lm_head.weight", torch.ones(300, 64), "lm_head.weight is not model.embed_tokens.weight"),
        ("lm_head.weight", torch.ones(200, 64), "lm_head.weight is not model.embed_tokens.weight"),
    ],
)
def test_every_tensor_must_be_there_and_used(
    qwen: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    source = _with(qwen, **{name: tensor})
    with pytest.raises(UserError, match=f"model the source: .*{message}"):
        check_names(source, WeightMap(_shape(qwen)))


def test_what_may_be_stored_besides(qwen: Path) -> None:
    table = load_file(qwen / FILE)["model.embed_tokens.weight"]
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    check_names(_with(qwen, **{"lm_head.weight": table}, **derived), WeightMap(_shape(qwen)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (16, 64), "(16, 64), but .* (32, 64)"),
        ("model.layers.0.self_attn.k_proj.weight", (48, 64), "(48, 64), but .* (32, 64)"),
        ("model.layers.2.mlp.down_proj.weight", (64, 90), "(64, 90), but .* (64, 96)"),
        ("model.embed_tokens.weight", (301, 64), "(301, 64), but .* (300, 64)"),
        ("model.norm.weight", (65,), "(65,), but .* (64,)"),
    ],
)
@pytest.mark.usefixtures("runtime")
def test_another_shape_is_refused(
    qwen: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    source = _with(qwen, **{name: torch.ones(shape)})
    model = build_model(_shape(qwen), 8)
    escaped = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(UserError, match=f"model the source: {name} has the shape {escaped}"):
        fill(model, source, WeightMap(_shape(qwen)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", 0.0, "is all zero"),
        ("model.layers.0.self_attn.q_proj.weight", float("nan"), "not finite"),
        ("model.layers.0.self_attn.q_proj.bias", float("inf"), "not finite"),
    ],
)
@pytest.mark.usefixtures("runtime")
def test_weights_that_no_trained_model_has_are_refused(
    qwen: Path, name: str, value: float, message: str
) -> None:
    model = build_model(_shape(qwen), 8)
    tensor = load_file(qwen / FILE)[name]
    source = _with(qwen, **{name: torch.full_like(tensor, value)})
    with pytest.raises(UserError, match=f"model the source: {name} .*{message}"):
        fill(model, source, WeightMap(_shape(qwen)))


@pytest.mark.usefixtures("runtime")
def test_a_bias_may_be_zero(qwen: Path) -> None:
    source = _with(qwen, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    fill(build_model(_shape(qwen), 8), source, WeightMap(_shape(qwen)))


def test_dtypes_that_differ_or_do_not_train(qwen: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    half = torch.ones(96, 64, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"is stored in .*F32.* in one dtype"):
        _with(qwen, **{name: half}).dtype()
    whole = torch.ones(96, 64, dtype=torch.int8)
    with pytest.raises(UserError, match=f"{name} is stored in I8, which is not supported"):
        _with(qwen, **{name: whole}).dtype()


def test_an_index_that_is_wrong(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    make_model("llama tied").save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(
        text.replace('"model.norm.weight": "model-00005', '"model.norm.weight": "model-00001')
    )
    assert index.read_text() != text
    with pytest.raises(UserError, match=r"model.norm.weight is not in model-00001-of-00005"):
        HFFolder(tmp_path)


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model.safetensors nor .*save_pretrained"):
        HFFolder(tmp_path)
