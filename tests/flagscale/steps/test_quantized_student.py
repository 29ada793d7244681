"""A quantised student through the steps: calibrated, trained, stopped, measured, exported."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from flagscale.artifacts import open_artifact
from flagscale.errors import Interrupted, UserError
from flagscale.megatron import platform
from flagscale.models.megatron import forward, load_model
from flagscale.recipe import (
    DistillationRecipe,
    EvaluationRecipe,
    ExportRecipe,
    LayoutRecipe,
    ModelsRecipe,
    QuantizationRecipe,
    StudentRecipe,
    TrainingRecipe,
)
from flagscale.steps import distil_student as step
from flagscale.steps.convert_student import convert_student
from flagscale.steps.evaluate import evaluate
from flagscale.steps.export_student import export_student

TRAINING = TrainingRecipe(
    train_iters=4,
    global_batch_size=2,
    lr=1e-4,
    eval_interval=4,
    eval_iters=1,
    save_interval=4,
)


def student_of(name, **more):
    quantization = QuantizationRecipe(recipe=name, calibration_tokens=500, documents=4, **more)
    return StudentRecipe(init="same", quantization=quantization)


@pytest.fixture(scope="module", params=["fp8", "int8_sq", "int4_awq_64"])
def made(request, teacher, dataset, tmp_path_factory):
    """A student of each kind; the step proves that every parameter of it learns."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, convert_student(student_of(request.param), teacher, dataset, folder / "student")


def distil(teacher, student, dataset, folder, name="distilled", checkpoints="checkpoints"):
    loss = DistillationRecipe()
    where = (folder / checkpoints, folder / name)
    return step.distil_student(loss, TRAINING, teacher, student, dataset, *where)


def losses(artifact):
    lines = (artifact / "training.jsonl").read_text().splitlines()
    return [json.loads(line)["logits distillation loss"] for line in lines]


def test_quantisation_alone_is_measured(made):
    folder, figures = made
    facts = open_artifact(folder / "student", "student").facts["quantization"]
    assert facts["trains"] is True
    assert facts["calibration_tokens"] == 500
    assert figures["reload_logit_difference"] == 0
    assert 0 < figures["kd_loss_at_start"] < 0.1
    # The unquantised student is the teacher.
    assert figures["unquantized kl"] < 1e-6 < figures["ptq kl change"] == figures["quantized kl"]
    assert figures["ptq lm_loss change"] == facts["cost"]["paired"]["lm_loss"]["value"]


def test_a_stopped_training_goes_on_as_if_undisturbed(made, teacher, dataset, monkeypatch):
    folder, _ = made
    run = partial(distil, teacher, folder / "student", dataset, folder)
    run()
    asked = iter([False, True])
    monkeypatch.setattr(step, "stop_requested", lambda: next(asked))
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        run("stopped", "other-checkpoints")
    monkeypatch.undo()
    run("stopped", "other-checkpoints")
    assert len(losses(folder / "stopped")) == 4
    assert losses(folder / "stopped") == losses(folder / "distilled")
    with platform.runtime():
        tokens = torch.arange(32).view(1, 32)
        models = [load_model(folder / name, 32) for name in ("student", "distilled", "stopped")]
        before, after, again = (forward(model, tokens) for model in models)
    assert torch.equal(after, again)
    assert not torch.equal(before, after)


def test_without_a_significant_loss_nobody_pays(teacher, dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    student = tmp_path / "student"
    convert_student(student_of("fp8", when="significant"), teacher, dataset, student)
    facts = open_artifact(student, "student").facts["quantization"]
    assert facts["trains"] is facts["cost"]["significant"] is False
    figures = distil(teacher, student, dataset, tmp_path)
    assert figures["steps"] == 0
    assert "median tokens per second" not in figures
    assert "not trained: student.quantization.when=significant" in caplog.text
    distilled = open_artifact(tmp_path / "distilled", "distilled-student")
    assert "not trained because" in distilled.facts
    with platform.runtime():
        tokens = torch.arange(32).view(1, 32)
        models = [load_model(path, 32) for path in (student, tmp_path / "distilled")]
        assert torch.equal(*(forward(model, tokens) for model in models))
    measured = EvaluationRecipe(max_documents=2, max_document_tokens=32)
    found = evaluate(
        measured, teacher, student, tmp_path / "distilled", dataset, tmp_path / "evaluation"
    )
    assert found["student/kl"] == found["distilled/kl"] > 0


def test_fp8_is_exported_to_the_bit(teacher, dataset, tmp_path):
    student, distilled, measured, out = (
        tmp_path / name for name in ("student", "distilled", "evaluation", "export")
    )
    convert_student(student_of("fp8"), teacher, dataset, student)
    distil(teacher, student, dataset, tmp_path)
    few = EvaluationRecipe(max_documents=2, max_document_tokens=32)
    evaluate(few, teacher, student, distilled, dataset, measured)
    figures = export_student(ExportRecipe(), distilled, measured, out)
    # By transformers, with dequantised weights and rounded inputs.
    assert figures["max_logit_difference"] < 1e-3
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "modelopt"
    told = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert told["quant_algo"] == config["quant_algo"] == "FP8"
    assert told["exclude_modules"] == ["lm_head"]
    card = " ".join((out / "README.md").read_text().split())
    assert "quantised to 8 bits (ModelOpt's `FP8_DEFAULT_CFG`)" in card
    assert "from vllm import LLM" in card
    tensors = load_file(out / "model.safetensors")
    with platform.runtime(), torch.no_grad():
        model = load_model(distilled, 32)
        for layer, ours in enumerate(model.decoder.layers):
            for linear, theirs in (
                (ours.mlp.linear_fc2, "mlp.down_proj"),
                (ours.self_attention.linear_proj, "self_attn.o_proj"),
                (ours.mlp.linear_fc1, "mlp.gate_proj"),
            ):
                name = f"model.layers.{layer}.{theirs}"
                code = tensors[f"{name}.weight"]
                assert code.dtype == torch.float8_e4m3fn
                fake = linear.weight_quantizer(linear.weight)[: len(code)]
                assert torch.equal(code.float() * tensors[f"{name}.weight_scale"], fake)
    for kind in ("tensor", "pipeline"):
        models = ModelsRecipe(parallelism=LayoutRecipe(**{f"{kind}_model_parallel_size": 2}))
        on_ranks = export_student(ExportRecipe(), distilled, measured, tmp_path / kind, models)
        assert on_ranks["bytes"] == figures["bytes"]
        for file in ("model.safetensors", "config.json", "hf_quant_config.json"):
            assert (tmp_path / kind / file).read_bytes() == (out / file).read_bytes()


def test_what_cannot_be_exported_or_shared_is_refused(made, teacher, dataset, tmp_path):
    folder, _ = made
    training = TRAINING.model_copy(
        update={
            "parallelism": TRAINING.parallelism.model_copy(
                update={"tensor_model_parallel_size": 2, "processes": 2}
            )
        }
    )
    if folder.name.startswith("int4"):
        with pytest.raises(UserError, match="is 32 on each of 2 tensor-parallel ranks"):
            step.distil_student(
                *(DistillationRecipe(), training, teacher, folder / "student", dataset),
                *(tmp_path / "checkpoints", tmp_path / "distilled"),
            )
    with pytest.raises(UserError, match=r"is 64, and must be a multiple of 128"):
        convert_student(student_of("int4_awq"), teacher, dataset, tmp_path / "student")
    with pytest.raises(UserError, match="nvfp4: ModelOpt computes it on a GPU alone"):
        convert_student(student_of("nvfp4"), teacher, dataset, tmp_path / "student")


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_ranks_share_what_one_process_measured(made, torchrun, tmp_path, tensor, pipeline):
    folder, _ = made
    if folder.name.startswith("int4") and tensor > 1:
        pytest.skip("refused: see above")
    script = tmp_path / "ranks.py"
    script.write_text(
        """
import sys
from pathlib import Path
import torch
from flagscale.megatron import platform
from flagscale.models.megatron import load_model, logits
from flagscale.recipe import ParallelismRecipe

if __name__ == "__main__":
    sizes = ParallelismRecipe(
        tensor_model_parallel_size=int(sys.argv[3]), pipeline_model_parallel_size=int(sys.argv[4])
    )
    with platform.runtime(parallelism=sizes):
        found = logits(load_model(Path(sys.argv[1]), 32, sizes), torch.arange(32).view(1, 32))
        if torch.distributed.get_rank() == 0:
            torch.save(found, sys.argv[2])
"""
    )
    torchrun(2, script, folder / "student", tmp_path / "found.pt", tensor, pipeline)
    with platform.runtime():
        from flagscale.models.megatron import logits

        expected = logits(load_model(folder / "student", 32), torch.arange(32).view(1, 32))
    # A sum in another order may round an input to the neighbouring value of the format.
    difference = (torch.load(tmp_path / "found.pt") - expected).abs().max()
    assert difference <= 0.02 * expected.std()
