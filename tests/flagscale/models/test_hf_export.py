from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from variants import VARIANTS

from flagscale.checkpoint import save_weights
from flagscale.checkpoint.stored import StoredTensors
from flagscale.errors import UserError
from flagscale.megatron.shape import from_hf_config
from flagscale.models import hf_export
from flagscale.models.hf_export import round_weights, write_weights
from flagscale.models.hf_weights import WeightMap

FILE = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    return folder


def _checkpoint(
    hf_model: PreTrainedModel, source: Path, imported: Callable[[Path], GPTModel]
) -> tuple[StoredTensors, WeightMap]:
    """The model as Megatron-Core's checkpoint."""
    hf_model.save_pretrained(source)
    save_weights(imported(source), source / "weights")
    shape = from_hf_config(AutoConfig.from_pretrained(source))
    return StoredTensors(source / "weights"), WeightMap(shape)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("family", VARIANTS)
def test_the_round_trip_gives_back_every_byte(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    source: Path,
    folder: Path,
    family: str,
) -> None:
    """transformers wrote the source with safetensors' own writer."""
    write_weights(*_checkpoint(make_model(family), source, imported), folder, torch.float32)
    assert (folder / FILE).read_bytes() == (source / FILE).read_bytes()
    assert [path.name for path in folder.iterdir()] == [FILE]


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_shards_are_those_of_transformers_whoever_writes_them(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    source: Path,
    folder: Path,
    world_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hf_export, "_MAX_SHARD_SIZE", "100KB")
    hf_model = make_model("qwen2 untied")
    stored, weights = _checkpoint(hf_model, source, imported)
    for rank in range(world_size):
        write_weights(stored, weights, folder, torch.float32, rank, world_size)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert sum(path.stat().st_size > 120_000 for path in shards) == 0
    (folder / "config.json").write_text((source / "config.json").read_text())
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in hf_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.usefixtures("runtime")
def test_bfloat16_is_the_model_with_rounded_weights(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    source: Path,
    folder: Path,
) -> None:
    hf_model = make_model("qwen2 tied")
    write_weights(*_checkpoint(hf_model, source, imported), folder, torch.bfloat16)
    written = load_file(folder / FILE)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    model = imported(source)
    before = model.decoder.layers[1].mlp.linear_fc2.weight.clone()
    round_weights(model, torch.bfloat16)
    rounded = model.decoder.layers[1].mlp.linear_fc2.weight
    assert torch.equal(rounded, written["model.layers.1.mlp.down_proj.weight"].float())
    assert not torch.equal(rounded, before)


@pytest.mark.usefixtures("runtime")
def test_the_order_of_safetensors_own_writer(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    source: Path,
    folder: Path,
) -> None:
    checkpoint = _checkpoint(make_model("qwen3 untied").bfloat16(), source, imported)
    write_weights(*checkpoint, folder, torch.float32)
    tensors = {name: tensor.float() for name, tensor in load_file(source / FILE).items()}
    save_file(tensors, source / "float.safetensors", {"format": "pt"})
    assert (folder / FILE).read_bytes() == (source / "float.safetensors").read_bytes()


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama tied", {"num_hidden_layers": 4}, "the checkpoint cannot be read: .* has no part"),
        (
            "llama tied",
            {"intermediate_size": 128},
            "192 rows, but the model's shape makes it 25",
        ),
        (
            "llama tied",
            {"tie_word_embeddings": False},
            r"lacks output_layer\.weight",
        ),
        (
            "llama untied, llama3 rope",
            {"tie_word_embeddings": True},
            r"has not, output_layer\.weight",
        ),
    ],
)
def test_a_checkpoint_of_another_model(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    source: Path,
    folder: Path,
    family: str,
    changes: dict[str, int],
    message: str,
) -> None:
    stored, _ = _checkpoint(make_model(family), source, imported)
    weights = WeightMap(from_hf_config(make_model(family, **changes).config))
    with pytest.raises(UserError, match=message):
        write_weights(stored, weights, folder, torch.float32)


@pytest.mark.usefixtures("runtime")
def test_any_part_of_a_tensor(
    make_model: Callable[..., PreTrainedModel], imported: Callable[[Path], GPTModel], source: Path
) -> None:
    stored, _ = _checkpoint(make_model("llama tied"), source, imported)
    key = "decoder.layers.mlp.linear_fc1.weight"
    assert stored.tensors[key].shape == (3, 192, 64)
    assert stored.tensors[key].dtype == torch.float32
    whole = stored.read(key, (0, 0, 0), (3, 192, 64))
    # Gate and up projection are stored apart: this is of both, and of two layers.
    assert torch.equal(stored.read(key, (1, 90, 5), (2, 20, 7)), whole[1:, 90:110, 5:12])
    with pytest.raises(UserError, match=r"has no part of \(1, 20, 64\) at \(2, 180, 0\)"):
        stored.read(key, (2, 180, 0), (1, 20, 64))
    with pytest.raises(UserError, match=r"it lacks nothing\.weight"):
        stored.read("nothing.weight", (0,), (1,))


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: the checkpoint cannot be read"):
        StoredTensors(tmp_path)
