import json
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
from flagscale.models.hf_import import check_tensors, fill
from flagscale.models.hf_weights import WeightMap
from flagscale.models.megatron import build_model, logits
from flagscale.models.rotary import inverse_frequencies

TOKENS = torch.randint(300, (2, 128), generator=torch.Generator().manual_seed(0))
FILE = "model.safetensors"
UP, O_BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.bias"
EXPERT = "model.layers.2.mlp.experts.3.gate_proj.weight"


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
    ("variant", "changes", "message"),
    [
        ("qwen2 tied", {UP: None}, f"1 weights are missing, first {UP}. They must be"),
        ("qwen2 tied", {O_BIAS: (64,)}, f"1 weights are left over, first {O_BIAS}. They must be"),
        (
            "llama tied",  # attention_bias of its configuration is false
            {f"model.layers.{n}.self_attn.q_proj.bias": (64,) for n in range(3)},
            "3 weights are left over, first model.layers.0.self_attn.q_proj.bias",
        ),
        ("llama tied", {"model.layers.0.mlp.up_proj.weight_scale": (1,)}, "1 weights are left"),
        ("qwen3 untied", {"score.weight": (2, 64)}, "1 weights are left over, first score.weight"),
        (
            "qwen2 tied",
            {f"model.layers.{n}.input_layernorm.weight": (64,) for n in (3, 4, 5)},
            "3 weights are left over.*files have 6 layers, .* says num_hidden_layers=3",
        ),
        ("qwen2 tied", {"lm_head.weight": (300, 64)}, "weight is not .*tie_word_embeddings=true"),
        ("qwen2 tied", {"lm_head.weight": (200, 64)}, "weight is not .*tie_word_embeddings=true"),
        ("qwen2 untied", {"lm_head.weight": None}, "first lm_head.weight.*embeddings=false, which"),
        ("qwen3_moe, one expert a token", {EXPERT: None}, f"1 weights are missing, first {EXPERT}"),
    ],
)
def test_every_tensor_must_be_there_and_used(
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    variant: str,
    changes: dict[str, tuple[int, ...] | None],
    message: str,
) -> None:
    make_model(variant).save_pretrained(tmp_path)
    tensors = {name: None if size is None else torch.ones(size) for name, size in changes.items()}
    with pytest.raises(UserError, match=f"model the source: .*{message}"):
        check_tensors(_with(tmp_path, **tensors), _shape(tmp_path))


def test_what_may_be_stored_besides(qwen: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = load_file(qwen / FILE)["model.embed_tokens.weight"]
    attention = "model.layers.0.self_attn."
    shape = _shape(qwen)
    derived = {
        attention + "rotary_emb.inv_freq": inverse_frequencies(16, shape.rotary_base).bfloat16(),
        attention + "rotary_emb.cos_cached": torch.ones(1, 1, 256, 16),
        attention + "masked_bias": torch.tensor(-1e9),
    }
    source = _with(qwen, **{"lm_head.weight": table}, **derived)
    with caplog.at_level("INFO"):
        check_tensors(source, shape)
    assert "lm_head.weight is model.embed_tokens.weight once more, and left out" in caplog.text
    assert f"3 buffers that follow from the configuration are left out, first {attention}m" in (
        caplog.text
    )
    assert source.dtype() == torch.float32  # whatever they are in


def test_frequencies_that_do_not_follow_from_the_configuration(qwen: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = _with(qwen, **{name: inverse_frequencies(16, 10000.0)})
    with pytest.raises(UserError, match=rf"{name} holds other .*\(rope_theta=1e\+06\)"):
        check_tensors(source, _shape(qwen))


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
def test_another_shape_is_refused(
    qwen: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    source = _with(qwen, **{name: torch.ones(shape)})
    escaped = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(UserError, match=f"1 weights have another shape, first {name}: {escaped}"):
        check_tensors(source, _shape(qwen))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (UP, 0.0, r"set teacher\.allow_zero_weights"),
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
    with pytest.raises(UserError, match=rf"model the source: .*{name}.* {message}"):
        fill(model, source, WeightMap(_shape(qwen)), allow_zero_weights=value != 0)


@pytest.mark.usefixtures("runtime")
def test_a_bias_may_be_zero(qwen: Path) -> None:
    source = _with(qwen, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    assert fill(build_model(_shape(qwen), 8), source, WeightMap(_shape(qwen))) == 0


@pytest.mark.usefixtures("runtime")
def test_zero_weights_can_be_allowed(qwen: Path, caplog: pytest.LogCaptureFixture) -> None:
    inserted = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"
    state = load_file(qwen / FILE)
    source = _with(qwen, **{name: torch.zeros_like(state[name]) for name in inserted})
    weights = WeightMap(_shape(qwen))
    with pytest.raises(UserError, match=f"2 weights are all zero, first {inserted[1]}; if they"):
        fill(build_model(_shape(qwen), 8), source, weights)
    model = build_model(_shape(qwen), 8)
    assert fill(model, source, weights, allow_zero_weights=True) == 2
    assert f"2 weights are all zero, first {inserted[1]}" in caplog.text
    assert not model.decoder.layers[1].mlp.linear_fc2.weight.any()


def test_dtypes_that_differ_or_do_not_train(qwen: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    half = torch.ones(96, 64, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"is stored in .*F32.* in one dtype"):
        _with(qwen, **{name: half}).dtype()
    whole = torch.ones(96, 64, dtype=torch.int8)
    with pytest.raises(UserError, match=f"{name} is stored in I8, which is not supported"):
        _with(qwen, **{name: whole}).dtype()


INDEX = "model.safetensors.index.json"
LAST = "model-00005-of-00005.safetensors"


@pytest.fixture
def shards(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    make_model("llama tied").save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def _index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _once_more(folder: Path) -> None:
    state = load_file(folder / LAST) | {"model.embed_tokens.weight": torch.ones(300, 64)}
    save_file(state, folder / LAST, {"format": "pt"})


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an index that puts a tensor elsewhere": (
        lambda folder: _index(
            folder, lambda places: places.update({"model.norm.weight": LAST.replace("5-", "1-")})
        ),
        "1 tensors are not where .* has them, first model.norm.weight, .* not in model-00001",
    ),
    "an index that does not list a tensor": (
        lambda folder: _index(folder, lambda places: places.pop("model.norm.weight")),
        f"1 tensors of its files are not in {INDEX}, first model.norm.weight of {LAST}",
    ),
    "an index that names what no file has": (
        lambda folder: _index(folder, lambda places: places.update(new=LAST)),
        f"1 tensors are not where .* first new, which is not in {LAST}",
    ),
    "a shard that is not there": (
        lambda folder: (folder / LAST).unlink(),
        f"1 of the 5 files that {INDEX} names are missing, first {LAST}",
    ),
    "a tensor in two shards": (_once_more, "embed_tokens.weight is in two files, model-00001-of.*"),
    "a shard that is cut off": (
        lambda folder: (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-9]),
        rf"cannot be read: {LAST} \(\d+ bytes\)",
    ),
    "a pointer of Git LFS": (
        lambda folder: (folder / LAST).write_text("version https://git-lfs.github.com/spec/v1\n"),
        f"cannot be read: {LAST} is a pointer of Git LFS, not the weights: git lfs pull",
    ),
    "an index that is no JSON": (lambda folder: (folder / INDEX).write_text("{"), "cannot be read"),
    "shards without their index": (
        lambda folder: (folder / INDEX).unlink(),
        "neither .* is there; there is model-00001-of-.*, which is not read; convert them",
    ),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_a_folder_must_be_what_its_index_says(shards: Path, case: str) -> None:
    spoil, message = WRONG_FOLDERS[case]
    spoil(shards)
    with pytest.raises(UserError, match=message):
        HFFolder(shards)


def test_pickled_weights_are_to_be_converted(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "README.md"):
        (tmp_path / name).touch()
    wanted = r"there is pytorch_model.bin, which is not read; convert them: .*\.save_pretrained"
    with pytest.raises(UserError, match=wanted):
        HFFolder(tmp_path)


def test_a_single_file_beside_an_index_is_the_same_model(shards: Path) -> None:
    """transformers reads the single file."""
    state = {
        name: tensor
        for path in sorted(shards.glob("model-*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    single = shards / FILE
    save_file(state, single, {"format": "pt"})
    HFFolder(shards).check_single_file()
    stale = state | {UP: state[UP] + 1e-6}
    fewer = {name: tensor for name, tensor in state.items() if name != UP}
    for other in (stale, fewer, state | {UP: state[UP].bfloat16()}):
        save_file(other, single, {"format": "pt"})
        with pytest.raises(UserError, match=f"two models: they differ in {UP}. Remove"):
            HFFolder(shards).check_single_file()
    _index(shards, lambda places: places.update(dict.fromkeys(places, FILE)))
    save_file(stale, single, {"format": "pt"})
    HFFolder(shards).check_single_file()  # the index names it


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model.safetensors nor .*save_pretrained"):
        HFFolder(tmp_path)
