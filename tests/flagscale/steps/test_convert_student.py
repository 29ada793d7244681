import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from flagscale.artifacts import new_artifact, open_artifact
from flagscale.checkpoint import save_weights
from flagscale.checkpoint.stored import StoredTensors
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import WEIGHTS, build_model, load_model
from flagscale.recipe import ArchitectureRecipe, ReconstructionRecipe, StudentRecipe
from flagscale.shared import notes
from flagscale.steps.convert_student import convert_student


def layer(model, index):
    return {k: v for k, v in model.decoder.layers[index].state_dict().items() if v is not None}


def test_pruned_student_has_the_kept_layers(student, teacher):
    manifest = open_artifact(student, "student")
    assert manifest.facts["keep_layers"] == [0, 3]
    assert manifest.facts["layers"] == 2
    assert manifest.facts["kd_loss_when_equal"] == 0
    assert manifest.facts["kd_loss_at_start"] > 0.01
    assert manifest.facts["reload_logit_difference"] == 0
    with platform.runtime():
        ours, theirs = load_model(student, 64), load_model(teacher, 64)
        for index, kept in ((0, 0), (1, 3)):
            for name, value in layer(ours, index).items():
                assert torch.equal(value, layer(theirs, kept)[name]), name
        assert torch.equal(
            ours.embedding.word_embeddings.weight, theirs.embedding.word_embeddings.weight
        )


def test_layers_are_kept_by_importance_and_fitted(teacher, dataset, tmp_path):
    recipe = StudentRecipe(
        num_layers=2,
        layer_importance="kl",
        calibration_tokens=130,  # two sequences
        reconstruction=ReconstructionRecipe(tokens=256, ridge=1.0),
    )
    figures = convert_student(recipe, teacher, dataset, tmp_path / "student")
    manifest = open_artifact(tmp_path / "student", "student")
    written = json.loads((tmp_path / "student" / "layer_importance.json").read_text())
    gone = [removal["layer"] for removal in written["removals"]]
    assert len(gone) == 2
    assert manifest.facts["keep_layers"] == sorted({0, 1, 2, 3} - set(gone))
    assert manifest.facts["layer_importance"]["calibration_tokens"] == 128
    assert len(written["scores"]) == 4
    fits = manifest.facts["reconstruction"]
    assert fits["calibration_tokens"] == 256
    assert fits["error_after"][-1] < fits["error_before"][-1]
    # The first 128 of these tokens are those.
    assert fits["calibration_digest"] != manifest.facts["layer_importance"]["calibration_digest"]
    assert manifest.facts["shape"]["num_layers"] == 2
    assert figures["forward_flops_per_token"] > 2 * 64 * 1000
    page = (tmp_path / "student" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "calibration digest" in page
    # Fitted, it is closer to its teacher than the same layers as they were.
    as_they_were = StudentRecipe(keep_layers=tuple(manifest.facts["keep_layers"]))
    plain = convert_student(as_they_were, teacher, dataset, tmp_path / "plain")
    assert figures["kd_loss_at_start"] < plain["kd_loss_at_start"]
    assert "<svg" not in (tmp_path / "plain" / "report.html").read_text()


def test_a_killed_step_goes_on_with_the_layers_it_has_measured(
    teacher, dataset, tmp_path, monkeypatch, caplog
):
    recipe = StudentRecipe(num_layers=2, layer_importance="kl", calibration_tokens=130)
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path))
    monkeypatch.setattr(notes, "_PAUSE_SECONDS", 0)
    write = notes.Note.write

    def write_and_die(note, content):
        write(note, content)
        if len(content) == 5:
            raise MemoryError("killed")

    monkeypatch.setattr(notes.Note, "write", write_and_die)
    with pytest.raises(MemoryError):
        convert_student(recipe, teacher, dataset, tmp_path / "student")
    monkeypatch.setattr(notes.Note, "write", write)
    with caplog.at_level("INFO"):
        convert_student(recipe, teacher, dataset, tmp_path / "student")
    assert "going on after 5 models that were measured before" in caplog.text
    assert list((tmp_path / "notes").iterdir()) == []
    monkeypatch.delenv("FLAGSCALE_SHARED")
    convert_student(recipe, teacher, dataset, tmp_path / "at-once")
    ours, theirs = (tmp_path / one / "layer_importance.json" for one in ("student", "at-once"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_nothing_is_measured_where_every_layer_stays(teacher, dataset, tmp_path):
    recipe = StudentRecipe(num_layers=4, layer_importance="block_influence")
    figures = convert_student(recipe, teacher, dataset, tmp_path / "student")
    assert figures["kd_loss_at_start"] == 0
    assert open_artifact(tmp_path / "student", "student").facts["keep_layers"] == [0, 1, 2, 3]
    assert not (tmp_path / "student" / "layer_importance.json").exists()


def test_hugging_face_files_describe_the_student(student, teacher):
    config = json.loads((student / "hf" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert (student / "hf" / "tokenizer.json").read_bytes() == (
        teacher / "hf" / "tokenizer.json"
    ).read_bytes()
    assert not list((student / "hf").glob("*.safetensors"))


def test_student_from_scratch_may_be_narrower(teacher, dataset, tmp_path):
    recipe = StudentRecipe(
        init="scratch",
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=2,
        num_query_groups=1,
    )
    figures = convert_student(recipe, teacher, dataset, tmp_path / "student")
    shape = ModelShape.load(tmp_path / "student")
    assert (shape.hidden_size, shape.ffn_hidden_size, shape.num_query_groups) == (32, 48, 1)
    assert figures["layers"] == 1
    again = convert_student(recipe, teacher, dataset, tmp_path / "again")
    assert again == figures  # same seed, same weights


@pytest.mark.parametrize(
    "architecture",
    [
        {"num_experts": 8, "moe_ffn_hidden_size": 32},
        {"normalization": "LayerNorm", "mtp_num_layers": 1},
    ],
    ids=["experts", "multi-token prediction"],
)
def test_student_that_no_hugging_face_configuration_holds(teacher, dataset, tmp_path, architecture):
    recipe = StudentRecipe(
        init="scratch", num_layers=2, architecture=ArchitectureRecipe(**architecture)
    )
    figures = convert_student(recipe, teacher, dataset, tmp_path / "student")
    assert figures["reload_logit_difference"] == 0
    assert figures["kd_loss_at_start"] > 0.01
    assert ModelShape.load(tmp_path / "student").architecture == recipe.architecture
    files = {path.name for path in (tmp_path / "student" / "hf").iterdir()}
    assert "tokenizer.json" in files
    assert not {"config.json", "generation_config.json"} & files


def test_copied_student_starts_at_the_teacher(teacher, dataset, tmp_path):
    figures = convert_student(StudentRecipe(init="same"), teacher, dataset, tmp_path / "student")
    assert figures["layers"] == 4
    assert figures["kd_loss_at_start"] == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (StudentRecipe(num_layers=5), "num_layers=5.*only 4 layers"),
        (StudentRecipe(keep_layers=(0, 7)), "keep_layers.*0 to 3"),
        (
            StudentRecipe(init="scratch", num_attention_heads=3),
            "num_attention_heads=3 is not divisible",
        ),
    ],
)
def test_impossible_student_is_refused_before_anything_is_built(
    teacher, dataset, tmp_path, recipe, message
):
    with pytest.raises(UserError, match=message):
        convert_student(recipe, teacher, dataset, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizer_is_refused(teacher, dataset, tmp_path):
    other = tmp_path / "dataset"
    shutil.copytree(dataset, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer_hash"] = "sha256:another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="tokenized with sha256:another"):
        convert_student(StudentRecipe(num_layers=2), teacher, other, tmp_path / "student")


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_teacher_is_refused(teacher, dataset, tmp_path, damage):
    broken = tmp_path / "teacher"
    shutil.copytree(teacher, broken)
    if damage == "missing":
        (broken / "manifest.json").unlink()
    else:
        with (broken / "model.json").open("a") as stream:
            stream.write(" ")
    with pytest.raises(UserError, match=r"manifest\.json is missing|model\.json is missing or ch"):
        convert_student(StudentRecipe(num_layers=2), broken, dataset, tmp_path / "student")


@pytest.mark.parametrize("recipe", [{"num_layers": 2}, {"init": "scratch", "num_layers": 1}])
def test_student_is_stored_in_its_teachers_dtype(teacher, dataset, tmp_path, recipe):
    half = tmp_path / "teacher"
    manifest = open_artifact(teacher, "teacher")
    with new_artifact(half, "teacher", {}, {}) as staging:
        for name in ("hf", "model.json"):
            copy = shutil.copytree if (teacher / name).is_dir() else shutil.copy
            copy(teacher / name, staging.path / name)
        with platform.runtime():
            save_weights(load_model(teacher, 64), staging.path / WEIGHTS, torch.bfloat16)
        staging.facts = {**manifest.facts, "dtype": "bfloat16"}
        staging.tokenizer_hash = manifest.tokenizer_hash
    figures = convert_student(StudentRecipe(**recipe), half, dataset, tmp_path / "student")
    assert figures["reload_logit_difference"] == 0
    assert open_artifact(tmp_path / "student", "student").facts["dtype"] == "bfloat16"
    stored = StoredTensors(tmp_path / "student" / WEIGHTS).tensors.values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}
    assert figures["parameters"] == sum(math.prod(tensor.shape) for tensor in stored)
    with platform.runtime():
        parameters = list(load_model(tmp_path / "student", 64).parameters())
    assert figures["parameters"] == sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_a_student_that_was_saved_wrongly_is_refused(
    teacher, dataset, tmp_path, monkeypatch, wrong
):
    def saved_wrongly(model, folder, dtype):
        weight = model.decoder.layers[1].mlp.linear_fc2.weight.data
        right = weight[0, 0].item()
        weight[0, 0] += wrong
        save_weights(model, folder, dtype)
        weight[0, 0] = right

    monkeypatch.setattr("flagscale.steps.convert_student.save_weights", saved_wrongly)
    with pytest.raises(UserError, match=r"logits differ by .* once loaded, not 0"):
        convert_student(StudentRecipe(num_layers=2), teacher, dataset, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_student_of_other_layers_than_asked_for_is_refused(
    teacher, dataset, tmp_path, monkeypatch
):
    def shallower(shape, *where):
        return build_model(replace(shape, num_layers=shape.num_layers - 1), *where)

    monkeypatch.setattr("flagscale.steps.student.make.build_model", shallower)
    with pytest.raises(UserError, match="has 1 layers, but must have 2"):
        convert_student(
            StudentRecipe(init="scratch", num_layers=2), teacher, dataset, tmp_path / "student"
        )
