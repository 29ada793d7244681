import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import mlflow
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flagscale.artifacts import MANIFEST, hash_files, open_artifact, write_json
from flagscale.checkpoint import save_weights
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.models.hf_export import round_weights
from flagscale.models.megatron import load_model, logits
from flagscale.recipe import (
    ArchitectureRecipe,
    DataRecipe,
    DistillationRecipe,
    EvaluationRecipe,
    ExportRecipe,
    LayoutRecipe,
    ModelsRecipe,
    StudentRecipe,
    TeacherRecipe,
    TrainingRecipe,
)
from flagscale.steps.convert_student import convert_student
from flagscale.steps.distil_student import distil_student
from flagscale.steps.evaluate import evaluate
from flagscale.steps.export_student import export_student
from flagscale.steps.prepare_data import prepare_data
from flagscale.steps.prepare_teacher import prepare_teacher

TOKENS = torch.arange(60)[None]
LICENSES = ("LICENSE", "NOTICE.txt")  # of the teacher


@dataclass(frozen=True)
class Run:
    """Artifacts of a short run of all steps before the export."""

    distilled: Path
    evaluation: Path
    student: Path


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text"
    text.mkdir()
    for name in sorted(topics)[:40]:
        (text / f"{name.replace('/', '-')}.txt").write_text(topics[name], encoding="utf-8")
    source = shutil.copytree(tiny_teacher, folder / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    for name in LICENSES:
        (source / name).write_text(f"the text of {name}")
    data = DataRecipe(
        source=str(text),
        tokenizer=str(source),
        seq_length=32,
        validation_fraction=0.2,
        test_fraction=0.2,
        workers=1,
    )
    training = TrainingRecipe(train_iters=2, lr=1e-3, eval_interval=2, eval_iters=1)
    evaluation = EvaluationRecipe(max_documents=4, max_document_tokens=128, bootstrap_samples=100)
    dataset, teacher, student, distilled, evaluated = (
        folder / name for name in ("dataset", "teacher", "student", "distilled", "evaluation")
    )
    prepare_data(data, dataset)
    prepare_teacher(TeacherRecipe(source=str(source)), dataset, teacher)
    convert_student(StudentRecipe(num_layers=2), teacher, dataset, student)
    distil_student(
        DistillationRecipe(), training, teacher, student, dataset, folder / "saved", distilled
    )
    evaluate(evaluation, teacher, student, distilled, dataset, evaluated)
    return Run(distilled=distilled, evaluation=evaluated, student=student)


@dataclass(frozen=True)
class Exported:
    """A tracked export."""

    folder: Path
    figures: dict[str, float]
    tracking_uri: str


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    uri = f"sqlite:///{folder}/mlflow.db"
    export = ExportRecipe(registered_model_name="tiny-student")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        figures = export_student(
            export,
            run.distilled,
            run.evaluation,
            folder / "export",
            lineage=folder / "shown" / "lineage",
        )
    return Exported(folder / "export", figures, uri)


@pytest.fixture
def spoilt(run: Run, tmp_path: Path) -> Iterator[Path]:
    """A copy of the distilled student to spoil; afterwards nothing is left of an export."""
    yield Path(shutil.copytree(run.distilled, tmp_path / "distilled"))
    assert {path.name for path in tmp_path.iterdir()} <= {"distilled", "evaluation"}


def _reseal(artifact: Path) -> None:
    """Make the manifest fit changed files."""
    values = json.loads((artifact / MANIFEST).read_text())
    write_json(artifact / MANIFEST, values | {"files": hash_files(artifact)})


def _evaluation_of(distilled: Path, evaluation: Path, copy: Path) -> Path:
    shutil.copytree(evaluation, copy)
    values = json.loads((copy / MANIFEST).read_text())
    values["parents"]["distilled"] = open_artifact(distilled, "distilled-student").digest
    write_json(copy / MANIFEST, values)
    return copy


def test_export_in_float32(run: Run, exported: Exported) -> None:
    assert exported.figures["max_logit_difference"] <= 1e-5
    assert exported.figures["top1_agreement"] == 1
    manifest = open_artifact(exported.folder, "export")
    assert manifest.facts.items() >= exported.figures.items()
    assert manifest.facts["generated"]
    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    assert model.config.num_hidden_layers == 2
    assert model.get_input_embeddings().weight.shape == (1000, 64)  # 1024 in Megatron-Core
    with platform.runtime():
        expected = logits(load_model(run.distilled, 60), TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=0)


def test_nothing_is_in_it_that_is_not_about_the_model(run: Run, exported: Exported) -> None:
    """And what is, is under the names of transformers 4 and 5: test_hf_description.py."""
    assert {path.name for path in exported.folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        *LICENSES,
    }
    config, tokenizer, generation = (
        json.loads((exported.folder / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config", "generation_config")
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    known = GenerationConfig().to_dict().keys()
    assert {"bos_token_id", "eos_token_id", "pad_token_id"} <= generation.keys() <= known
    assert "_from_model_config" not in generation
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    for leftover in ("is_local", "local_files_only", "backend", "name_or_path"):
        assert leftover not in tokenizer
    for path in exported.folder.glob("*.json"):
        if path.name != "manifest.json":
            assert str(run.distilled.parent) not in path.read_text(encoding="utf-8")


def test_export_in_bfloat16(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "export"
    figures = export_student(
        ExportRecipe(dtype="bfloat16", max_logit_difference=1e-5),
        run.distilled,
        run.evaluation,
        output,
    )
    assert figures["max_logit_difference"] <= 1e-5
    assert {t.dtype for t in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with platform.runtime():
        rounded = load_model(run.distilled, 60)
        round_weights(rounded, torch.bfloat16)
        expected = logits(rounded, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=0)


def test_ranks_write_the_same_folder(run: Run, exported: Exported, tmp_path: Path) -> None:
    layout = LayoutRecipe(tensor_model_parallel_size=2)
    output = tmp_path / "export"
    export = ExportRecipe(registered_model_name="tiny-student")
    figures = export_student(
        export, run.distilled, run.evaluation, output, ModelsRecipe(parallelism=layout)
    )
    assert figures == pytest.approx(exported.figures, abs=1e-5)
    assert open_artifact(output, "export").files == open_artifact(exported.folder, "export").files


def test_model_card(run: Run, exported: Exported) -> None:
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    _, front_matter, text = card.split("---\n", 2)
    values = yaml.safe_load(front_matter)
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "text-generation"
    assert values["license"] == "apache-2.0"
    assert (exported.folder / "LICENSE").read_text() == "the text of LICENSE"
    assert "On plain text, not on conversations: it continues a text. It has no chat" in text
    figures = json.loads((run.evaluation / "metrics.json").read_text())["models"]
    assert "# tiny-student\n" in text
    for model in ("teacher", "student", "distilled"):
        assert f"{figures[model]['lm_loss']['value']:.3f}" in text
    assert "| `training.lr` | 0.001 |" in text
    assert "| `distillation.temperature` | 1.0 |" in text


def test_the_lineage_page_goes_back_to_the_data(exported: Exported, run: Run) -> None:
    """By the manifests of real artifacts; the same page is in MLflow."""
    page = (exported.folder.parent / "shown" / "lineage").read_text()
    manifest = open_artifact(exported.folder, "export")
    evaluated = open_artifact(run.evaluation, "evaluation")
    assert {"dataset", "teacher", "student", "distilled"} == set(evaluated.parents)
    for digest in (manifest.digest, *manifest.parents.values(), *evaluated.parents.values()):
        assert digest in page
    assert str(run.student.parent / "source") in page, "which teacher"
    assert str(run.student.parent / "text") in page, "which data"
    client = mlflow.MlflowClient(tracking_uri=exported.tracking_uri)
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    kept = client.download_artifacts(found.info.run_id, "lineage.html")
    assert Path(kept).read_text() == page


def test_mlflow_registers_what_transformers_loads(exported: Exported) -> None:
    client = mlflow.MlflowClient(tracking_uri=exported.tracking_uri)
    version = client.get_model_version("tiny-student", "1")
    tracked = client.get_run(version.run_id)
    assert tracked.info.status == "FINISHED"
    difference = exported.figures["max_logit_difference"]
    assert tracked.data.metrics["max_logit_difference"] == difference
    # A model is looked up in the process' own registry, whatever `registry_uri` is given.
    mlflow.set_tracking_uri(exported.tracking_uri)
    folder = mlflow.artifacts.download_artifacts("models:/tiny-student/1")
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2


def test_it_loads_with_no_variable_of_this_project(exported: Exported, tmp_path: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; f = sys.argv[1];"
        "m = AutoModelForCausalLM.from_pretrained(f); t = AutoTokenizer.from_pretrained(f);"
        "x = t('The list type', return_tensors='pt');"
        "print(t.decode(m.generate(**x, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(exported.folder)],
        env={"PATH": os.defpath, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("The list type")
    assert len(done.stdout.strip()) > len("The list type")


@pytest.fixture(scope="module")
def with_experts(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student that no Hugging Face configuration holds, through the same steps."""
    folder = tmp_path_factory.mktemp("experts")
    given = run.student.parent
    architecture = ArchitectureRecipe(num_experts=2, multi_latent_attention=True, qk_head_dim=8)
    student = StudentRecipe(init="scratch", num_layers=1, architecture=architecture)
    training = TrainingRecipe(train_iters=2, lr=1e-3, eval_interval=2, eval_iters=1)
    names = ("student", "distilled", "evaluation")
    made, distilled, evaluated = (folder / name for name in names)
    teacher, dataset = given / "teacher", given / "dataset"
    convert_student(student, teacher, dataset, made)
    distil_student(
        DistillationRecipe(), training, teacher, made, dataset, folder / "saved", distilled
    )
    evaluation = EvaluationRecipe(max_documents=4, max_document_tokens=128, bootstrap_samples=100)
    evaluate(evaluation, teacher, made, distilled, dataset, evaluated)
    return Run(distilled=distilled, evaluation=evaluated, student=made)


def test_export_of_the_checkpoint(with_experts: Run, tmp_path: Path) -> None:
    output = tmp_path / "export"
    export = ExportRecipe(format="megatron")
    figures = export_student(export, with_experts.distilled, with_experts.evaluation, output)
    assert set(figures) == {"bytes"}
    assert figures["bytes"] > 1e5
    assert open_artifact(output, "export").facts["format"] == "megatron"
    with platform.runtime():
        expected = logits(load_model(with_experts.distilled, 60), TOKENS)
        assert torch.equal(logits(load_model(output, 60), TOKENS), expected)
    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizer")
    assert tokenizer("The list")["input_ids"]
    assert not list(output.glob("*.safetensors"))
    assert not (output / "config.json").exists()
    assert {path.name for path in output.iterdir()} >= set(LICENSES)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "library_name: megatron-core" in card
    assert "A Megatron-Core GPT (num_experts=2, multi_latent_attention=True, qk_head_dim=8)" in card
    assert "AutoModelForCausalLM" not in card


def test_a_student_that_hugging_face_does_not_hold(with_experts: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'num_experts': 2.*set export\.format=megatron"):
        export_student(
            ExportRecipe(), with_experts.distilled, with_experts.evaluation, tmp_path / "export"
        )
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_of_another_student(run: Run, spoilt: Path) -> None:
    values = json.loads((spoilt / MANIFEST).read_text())
    values["facts"]["steps"] = 3
    write_json(spoilt / MANIFEST, values)
    with pytest.raises(UserError, match="measured another student"):
        export_student(ExportRecipe(), spoilt, run.evaluation, spoilt.with_name("export"))


def test_a_student_whose_weights_are_zero(run: Run, spoilt: Path) -> None:
    with platform.runtime():
        model = load_model(spoilt, 32)
        with torch.no_grad():
            model.decoder.layers[0].mlp.linear_fc1.weight.zero_()
        shutil.rmtree(spoilt / "weights")
        save_weights(model, spoilt / "weights")
    _reseal(spoilt)
    evaluation = _evaluation_of(spoilt, run.evaluation, spoilt.with_name("evaluation"))
    with pytest.raises(UserError, match=r"linear_fc1.weight is all zero"):
        export_student(ExportRecipe(), spoilt, evaluation, spoilt.with_name("export"))


def test_logits_that_differ_are_a_failure(run: Run, spoilt: Path) -> None:
    """A configuration that is not the model's: transformers computes something else."""
    config = json.loads((spoilt / "hf/config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 500.0
    write_json(spoilt / "hf/config.json", config)
    _reseal(spoilt)
    evaluation = _evaluation_of(spoilt, run.evaluation, spoilt.with_name("evaluation"))
    with pytest.raises(UserError, match=r"export.max_logit_difference=0.001: the logits differ by"):
        export_student(ExportRecipe(), spoilt, evaluation, spoilt.with_name("export"))
