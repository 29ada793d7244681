import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flagscale.artifacts import open_artifact
from flagscale.checkpoint.stored import StoredTensors
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.hf_export import write_weights
from flagscale.models.hf_weights import WeightMap
from flagscale.models.megatron import load_model, logits
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import DataRecipe, LayoutRecipe, ModelsRecipe, TeacherRecipe
from flagscale.steps.prepare_data import prepare_data
from flagscale.steps.prepare_teacher import prepare_teacher

SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("text")
    for name in sorted(topics)[:40]:
        (folder / f"{name.replace('/', '-')}.txt").write_text(topics[name], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dataset(tiny_teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _prepare_data(tiny_teacher, text, tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def source(tiny_teacher: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the teacher to spoil; afterwards nothing may be left of the artifact."""
    yield Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _prepare_data(tokenizer: Path, text: Path, output: Path) -> Path:
    recipe = DataRecipe(
        source=str(text),
        tokenizer=str(tokenizer),
        seq_length=SEQ_LENGTH,
        validation_fraction=0.2,
        test_fraction=0.2,
        workers=1,
    )
    prepare_data(recipe, output)
    return output


def test_teacher_artifact(tiny_teacher: Path, dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "teacher"
    figures = prepare_teacher(TeacherRecipe(source=str(tiny_teacher)), dataset, output)
    assert figures["max_logit_difference"] <= 1e-5
    assert figures["max_layer_difference"] <= 1e-5
    assert figures["kl_divergence"] <= 1e-9
    assert figures["logit_spread"] > 1
    assert figures["top1_agreement"] == 1
    assert 3 < figures["validation_loss"] < 5.5  # ln(1000) is 6.9
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    assert figures["parameters"] == hf_model.num_parameters()
    manifest = open_artifact(output, "teacher")
    assert manifest.facts.items() >= figures.items()
    assert manifest.facts["origin"] == {
        "source": str(tiny_teacher),
        "base_model": None,
        "license": None,
        "license_name": None,
        "license_link": None,
    }
    data = open_artifact(dataset, "dataset")
    assert manifest.tokenizer_hash == data.tokenizer_hash
    assert manifest.parents == {"dataset": data.digest}
    shape = ModelShape.load(output)
    assert (shape.vocab_size, shape.padded_vocab_size) == (1000, 1024)
    assert not list((output / "hf").glob("*.safetensors"))
    with platform.runtime():
        tokens = torch.arange(SEQ_LENGTH)[None]
        found = logits(load_model(output, SEQ_LENGTH), tokens)
    with torch.no_grad():
        expected = hf_model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert manifest.facts["dtype"] == "float32"
    assert load_tokenizer(output / "hf")("a list")["input_ids"]


def test_the_loss_is_that_of_transformers(
    tiny_teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """The validation loss, computed again with transformers on the same samples."""
    from flagscale.data.loader import validation_batches

    figures = prepare_teacher(
        TeacherRecipe(source=str(tiny_teacher)), dataset, tmp_path / "teacher"
    )
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    batches = validation_batches(
        dataset, tmp_path / "cache", micro_batch_size=1, global_batch_size=1, eval_iters=8
    )
    losses = [
        torch.nn.functional.cross_entropy(
            hf_model(batch["tokens"], use_cache=False).logits[0].double(), batch["labels"][0]
        )
        for batch in batches
    ]
    assert figures["validation_loss"] == pytest.approx(float(sum(losses) / 8), rel=1e-5)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_make_the_same_teacher(
    tiny_teacher: Path, dataset: Path, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    alone = prepare_teacher(TeacherRecipe(source=str(tiny_teacher)), dataset, tmp_path / "alone")
    layout = LayoutRecipe(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    models = ModelsRecipe(parallelism=layout)
    output = tmp_path / "teacher"
    figures = prepare_teacher(TeacherRecipe(source=str(tiny_teacher)), dataset, output, models)
    assert figures == pytest.approx(alone, abs=1e-5)
    stored = StoredTensors(output / "weights")
    expected = StoredTensors(tmp_path / "alone" / "weights")
    assert stored.tensors == expected.tensors
    for key, one in expected.tensors.items():
        whole = [0] * len(one.shape), one.shape
        assert torch.equal(stored.read(key, *whole), expected.read(key, *whole)), key
    # And back: a checkpoint of any layout becomes the source's own bytes.
    (tmp_path / "back").mkdir()
    weights = WeightMap(ModelShape.load(output))
    write_weights(stored, weights, tmp_path / "back", torch.float32)
    written = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert written == (tiny_teacher / "model.safetensors").read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "origin.json"):
        found, wanted = (tmp_path / folder / "hf" / name for folder in ("teacher", "alone"))
        assert found.read_bytes() == wanted.read_bytes()
    assert len(open_artifact(output, "teacher").peak_memory["host"]) == tensor * pipeline


def test_rows_that_are_no_tokens_are_left_out(
    tiny_teacher: Path, source: Path, dataset: Path
) -> None:
    """Whatever they hold: everything is as if the source had none of them."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 1100}))
    weights = load_file(source / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, 9 * torch.ones(100, table.size(1))])
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    output, plain = source.with_name("teacher"), source.with_name("plain")
    figures = prepare_teacher(TeacherRecipe(source=str(source)), dataset, output)
    assert figures == prepare_teacher(TeacherRecipe(source=str(tiny_teacher)), dataset, plain)
    assert ModelShape.load(output) == ModelShape.load(plain)
    found = [
        open_artifact(one, "teacher").facts["vocabulary_rows_left_out"] for one in (output, plain)
    ]
    assert found == [100, 0]
    assert json.loads((output / "hf" / "config.json").read_text())["vocab_size"] == 1000
    with platform.runtime():
        ours, theirs = (load_model(one, SEQ_LENGTH) for one in (output, plain))
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name
    shutil.rmtree(output)
    shutil.rmtree(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_16_bits_takes_half_the_room(
    tiny_teacher: Path, source: Path, dataset: Path, dtype: torch.dtype
) -> None:
    output = source.with_name("teacher")
    prepare_teacher(TeacherRecipe(source=str(source)), dataset, output)
    large = _size(output / "weights")
    weights = load_file(tiny_teacher / "model.safetensors")
    half = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(half, source / "model.safetensors", {"format": "pt"})
    prepare_teacher(TeacherRecipe(source=str(source)), dataset, output)
    assert _size(output / "weights") == pytest.approx(large / 2, rel=0.1)
    name = str(dtype).removeprefix("torch.")
    assert open_artifact(output, "teacher").facts["dtype"] == name
    assert json.loads((output / "hf/config.json").read_text())["dtype"] == name
    with platform.runtime():
        model = load_model(output, SEQ_LENGTH)
    table = model.embedding.word_embeddings.weight
    assert table.dtype == torch.float32
    assert torch.equal(table[:1000], half["model.embed_tokens.weight"].float())
    shutil.rmtree(output)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.distcp"))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_that_are_zero_or_not_finite(source: Path, dataset: Path, value: float) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(value)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, source.with_name("teacher"))


def test_what_the_user_knows_to_be_right(source: Path, dataset: Path) -> None:
    """Blocks that were inserted and do nothing yet, and a field that is nobody's business."""
    weights = load_file(source / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"].zero_()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"of_tomorrow": 1}))
    output = source.with_name("teacher")
    with pytest.raises(UserError, match=r"ignored_config_fields=.'of_tomorrow'"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, output)
    recipe = {"source": str(source), "ignored_config_fields": ["of_tomorrow"]}
    with pytest.raises(UserError, match=r"2 weights are all zero, first .*allow_zero_weights"):
        prepare_teacher(TeacherRecipe(**recipe), dataset, output)
    prepare_teacher(TeacherRecipe(**recipe, allow_zero_weights=True), dataset, output)
    assert open_artifact(output, "teacher").facts["zero_weights"] == 2
    assert "of_tomorrow" not in json.loads((output / "hf" / "config.json").read_text())
    shutil.rmtree(output)


def test_corrupt_weights(source: Path, dataset: Path) -> None:
    (source / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=f"model of {source} cannot be read"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, source.with_name("teacher"))


def test_a_weight_that_the_model_does_not_have(source: Path, dataset: Path) -> None:
    weights = load_file(source / "model.safetensors")
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    path = source / "other.safetensors"
    save_file(weights | extra, path, {"format": "pt"})
    path.rename(source / "model.safetensors")
    with pytest.raises(UserError, match=r"1 weights are left over, first .*q_proj.bias"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, source.with_name("teacher"))


def test_missing_teacher(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/no/such/model: no such folder"):
        prepare_teacher(TeacherRecipe(source="/no/such/model"), dataset, tmp_path / "teacher")


def test_a_model_that_was_never_trained(source: Path, dataset: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source)
    config.initializer_range = 0.5
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    with pytest.raises(UserError, match=r"LM loss .* above the limit of 6.908 \(what guessing"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, source.with_name("teacher"))


def test_limits_of_the_recipe(source: Path, dataset: Path) -> None:
    output = source.with_name("teacher")
    strict = TeacherRecipe(source=str(source), max_validation_loss=1.0)
    with pytest.raises(UserError, match=r"above the limit of 1.000; set teacher.max_validation"):
        prepare_teacher(strict, dataset, output)


def test_a_tokenizer_that_does_not_match(source: Path, dataset: Path) -> None:
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(source)
    with pytest.raises(UserError, match="tokenizer that does not match the teacher"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, source.with_name("teacher"))


def test_a_template_that_the_teacher_lacks(tiny_teacher: Path, tmp_path: Path) -> None:
    """A base model, and of its instruct model tokenizer or template: the student gets it."""
    base = Path(shutil.copytree(tiny_teacher, tmp_path / "base"))
    tokenizer = load_tokenizer(base)
    end = max(filter(str.isalpha, filter(str.isascii, tokenizer.get_vocab())), key=len)
    assert tokenizer.chat_template is None
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.save_pretrained(base)
    base_end, tokenizer.eos_token = tokenizer.eos_token, end
    tokenizer.save_pretrained(tmp_path / "instruct")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
    talk = [{"role": "user", "content": "for"}, {"role": "assistant", "content": "in"}]
    rows = [{"messages": [*talk, {"role": "user", "content": f"{i}"}, talk[1]]} for i in range(90)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = DataRecipe(
        source=str(tmp_path / "talk.jsonl"),
        format="chat",
        tokenizer=str(tmp_path / "instruct"),
        chat_template=template,
        seq_length=SEQ_LENGTH,
        validation_fraction=0.2,
        test_fraction=0.2,
    )
    prepare_data(recipe, tmp_path / "dataset")
    teacher = TeacherRecipe(source=str(base), max_validation_loss=20)
    prepare_teacher(teacher, tmp_path / "dataset", tmp_path / "teacher")
    stored = load_tokenizer(tmp_path / "teacher" / "hf")
    assert (stored.chat_template, stored.eos_token) == (template, end)
    generation = json.loads((tmp_path / "teacher" / "hf" / "generation_config.json").read_text())
    wanted = tokenizer.convert_tokens_to_ids([base_end, end])
    assert generation["eos_token_id"] == wanted


def test_a_tokenizer_with_more_tokens_than_the_model(
    tiny_teacher: Path, text: Path, tmp_path: Path
) -> None:
    """It is refused if a text holds one of these."""
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(source)
    recipe = TeacherRecipe(source=str(source))
    dataset = _prepare_data(source, text, tmp_path / "dataset")
    with pytest.raises(UserError, match=r"data.seq_length=32 is more than"):  # what is checked next
        prepare_teacher(recipe, dataset, tmp_path / "teacher")
    texts = Path(shutil.copytree(text, tmp_path / "texts"))
    (texts / "one-more.txt").write_text("That is <extra>.")
    dataset = _prepare_data(source, texts, tmp_path / "another")
    with pytest.raises(UserError, match="has token 1000, the model's vocab_size=1000"):
        prepare_teacher(recipe, dataset, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_sequences_longer_than_the_model_knows(source: Path, dataset: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = 16
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"data.seq_length=32 is more than .*=16"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, source.with_name("teacher"))


def test_an_unsupported_family(source: Path, dataset: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with pytest.raises(UserError, match="model_type='gemma' is not supported; supported: llama"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, source.with_name("teacher"))


def test_a_tokenizer_that_others_would_not_load(
    tiny_teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """Of a Qwen2 folder transformers 5 makes Qwen2's: told before the weights are imported."""
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01  # biases are 0 otherwise
    model.save_pretrained(source)
    with pytest.raises(UserError, match=r"AutoTokenizer does not make the model's own tokens: "):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, tmp_path / "teacher")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
