"""convert-student with a model of its own: another family, its vocabulary padded otherwise."""

import json
import shutil
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
from flagscale.models.megatron import load_model, logits
from flagscale.models.origin import Origin
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import (
    DistillationRecipe,
    EvaluationRecipe,
    ExportRecipe,
    LayoutRecipe,
    ModelsRecipe,
    ParallelismRecipe,
    StudentRecipe,
    TrainingRecipe,
)
from flagscale.steps.convert_student import convert_student
from flagscale.steps.distil_student import distil_student
from flagscale.steps.evaluate import evaluate
from flagscale.steps.export_student import export_student

TOKENS = torch.arange(64)[None]
ROWS = 1100  # the tokenizer has 1000


def recipe(source: Path, **more: object) -> StudentRecipe:
    # It has learnt nothing: guessing costs ln(1000) = 6.9.
    values = {"init": "pretrained", "source": str(source), "max_validation_loss": 9}
    return StudentRecipe(**values | more)


@pytest.fixture(scope="module")
def qwen(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of the teacher's tokenizer; rows of padding would win every prediction."""
    folder = tmp_path_factory.mktemp("qwen3")
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[1000:] *= 100
        model.lm_head.weight[1000:] *= 100
    model.save_pretrained(folder)
    load_tokenizer(tiny_teacher).save_pretrained(folder)
    return folder


@pytest.fixture
def source(qwen: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(qwen, tmp_path / "source"))


@pytest.fixture(scope="module")
def converted(
    qwen: Path, teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("converted") / "student"
    convert_student(recipe(qwen), teacher, dataset, output)
    return output


def test_it_is_the_source_s_model_without_padding(converted: Path, qwen: Path) -> None:
    facts = open_artifact(converted, "student").facts
    hf_model = AutoModelForCausalLM.from_pretrained(qwen)
    with torch.no_grad():
        expected = hf_model(TOKENS, use_cache=False).logits
    assert (expected.argmax(-1) >= 1000).float().mean() > 0.5
    with platform.runtime():
        found = logits(load_model(converted, 64), TOKENS)
    torch.testing.assert_close(found, expected[..., :1000], atol=1e-5, rtol=0)
    shape = ModelShape.load(converted)
    assert (shape.model_type, shape.vocab_size, shape.padded_vocab_size) == ("qwen3", 1000, 1024)
    assert facts["vocabulary_rows_left_out"] == ROWS - 1000
    assert facts["max_logit_difference"] <= 1e-4
    assert facts["kl_divergence"] <= 1e-9
    assert facts["max_layer_difference"] <= 1e-5
    assert facts["reload_logit_difference"] == facts["kd_loss_when_equal"] == 0
    assert 0 < facts["kd_loss_at_start"] < 9
    assert facts["layers"] == 2
    assert "keep_layers" not in facts


def test_its_folder_describes_it(converted: Path, qwen: Path, teacher: Path) -> None:
    """Configuration of its own, the data's tokenizer, and where both models come from."""
    config = AutoConfig.from_pretrained(converted / "hf")
    assert (config.model_type, config.vocab_size, config.num_hidden_layers) == ("qwen3", 1000, 2)
    assert config.rope_parameters["rope_theta"] == 1e6
    for name in ("tokenizer.json", "origin.json"):
        assert (converted / "hf" / name).read_bytes() == (teacher / "hf" / name).read_bytes()
    assert Origin.load(converted / "hf" / "pretrained").source == str(qwen)


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_ranks_make_the_same(
    converted: Path, qwen: Path, teacher: Path, dataset: Path, tmp_path: Path, layout: str
) -> None:
    models = ModelsRecipe(parallelism=LayoutRecipe(**{f"{layout}_model_parallel_size": 2}))
    figures = convert_student(recipe(qwen), teacher, dataset, tmp_path / "student", models)
    facts = open_artifact(converted, "student").facts
    assert figures == pytest.approx({name: facts[name] for name in figures}, rel=1e-4, abs=1e-5)
    with platform.runtime():
        ours, alone = (load_model(folder, 64) for folder in (tmp_path / "student", converted))
    for (name, one), other in zip(ours.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_it_is_trained_and_comes_out_in_transformers(
    converted: Path, qwen: Path, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """On two ranks, which share a vocabulary: of what no text has, nothing is left."""
    distilled, evaluation, exported = (tmp_path / name for name in ("distilled", "eval", "export"))
    layout = ParallelismRecipe(tensor_model_parallel_size=2)
    training = TrainingRecipe(
        train_iters=4,
        global_batch_size=4,
        lr=1e-3,
        lr_warmup_iters=1,
        eval_interval=4,
        eval_iters=1,
        parallelism=layout,
    )
    loss = DistillationRecipe(skip_lm_loss=False)
    distil_student(loss, training, teacher, converted, dataset, tmp_path / "c", distilled)
    lines = (distilled / "validation.jsonl").read_text().splitlines()
    losses = [json.loads(line)["logits distillation loss"] for line in lines]
    assert losses[-1] < losses[0]
    measured = EvaluationRecipe(
        max_documents=4, max_document_tokens=128, bootstrap_samples=100, prompts=("The",)
    )
    evaluate(measured, teacher, converted, distilled, dataset, evaluation)
    figures = export_student(ExportRecipe(), distilled, evaluation, exported)
    assert figures["max_logit_difference"] <= 1e-5
    hf_model, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values())
    assert (hf_model.config.model_type, hf_model.config.vocab_size) == ("qwen3", 1000)
    with torch.no_grad(), platform.runtime():
        expected = hf_model(TOKENS, use_cache=False).logits
        found = logits(load_model(distilled, 64), TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    stored = StoredTensors(distilled / "weights")
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        height, width = stored.tensors[key].shape
        assert height == 1024
        assert not stored.read(key, (1000, 0), (height - 1000, width)).any()
    card = (exported / "README.md").read_text()
    assert f"that was `{qwen}`, distilled from `" in card


def other_tokenizer(source: Path, change: str) -> None:
    path = source / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if change == "ids":
        vocabulary = values["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    elif change == "added":
        tokenizer = load_tokenizer(source)
        tokenizer.add_tokens(["<extra>"])
        tokenizer.save_pretrained(source)
        return
    elif change == "merges":
        merges = values["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]
    elif change == "splitting":
        values["pre_tokenizer"]["use_regex"] = False
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "difference"),
    {
        "ids": r"2 tokens differ, first 'A', which is \d+, and \d+ in the teacher's",
        "added": r"1 tokens differ, first '<extra>', which is 1000, and not in the teacher's",
        "merges": r"its merge 0 is .* in the teacher's",
        "splitting": r"becomes \[.*\], and \[.*\] in the teacher's",
    }.items(),
)
def test_another_tokenizer_is_refused_by_name(
    source: Path, teacher: Path, dataset: Path, tmp_path: Path, change: str, difference: str
) -> None:
    other_tokenizer(source, change)
    with pytest.raises(UserError, match=f"student.source={source}: .*{difference}"):
        convert_student(recipe(source), teacher, dataset, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_the_same_tokenizer_in_other_words(
    source: Path, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """Another EOS, a special token's flags, a field that says nothing: the ids are the same."""
    path = source / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["post_processor"] = {"type": "Sequence", "processors": []}
    path.write_text(json.dumps(values), encoding="utf-8")
    convert_student(recipe(source), teacher, dataset, tmp_path / "student")


def spoil_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(source: Path, value: float) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(value)
    save_file(weights, source / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: spoil_config(folder, model_type="gemma"), "student: model_type='gemma'"),
        (
            lambda folder: spoil_config(folder, of_tomorrow=1),
            r"student.ignored_config_fields=\['of_tomorrow'\]",
        ),
        (
            lambda folder: spoil_config(folder, max_position_embeddings=32),
            "data.seq_length=64 is more than the student's max_position_embeddings=32",
        ),
        (lambda folder: spoil_config(folder, vocab_size=1001), "have another shape"),
        (lambda folder: spoil_config(folder, vocab_size=900), "the student: the dataset has token"),
        (lambda folder: spoil_weights(folder, 0.0), "set student.allow_zero_weights=true"),
        (lambda folder: spoil_weights(folder, float("nan")), "values that are not finite"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_what_a_teacher_would_be_refused_for(
    source: Path, teacher: Path, dataset: Path, tmp_path: Path, spoil: object, message: str
) -> None:
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert_student(recipe(source), teacher, dataset, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_model_that_was_never_trained(qwen: Path, teacher: Path, dataset: Path, tmp_path: Path):
    strict = recipe(qwen, max_validation_loss=5)
    with pytest.raises(UserError, match=r"above the limit of 5.000; set student.max_validation"):
        convert_student(strict, teacher, dataset, tmp_path / "student")
