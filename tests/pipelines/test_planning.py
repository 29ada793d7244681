"""Plans: shown, refused with the number and the nearest layout, and the layout that is taken."""

import json
import sys

import pytest
import yaml

from flagscale.errors import UserError
from flagscale.recipe import ModelsRecipe, Recipe, load_recipe
from flagscale.recipe.model_steps import LayoutRecipe
from flagscale.sizes.steps import StepPlan
from pipelines import __main__ as command
from pipelines import sizes_document
from pipelines.plan_text import as_json, as_text
from pipelines.planning import check_run, fitted, plans, this_machine
from pipelines.platform import Platform, load_platform

QWEN = "recipes/qwen3-8b-to-24-layers.yaml"
STEPS = ["prepare-teacher", "convert-student", "distil-student", "evaluate", "export-student"]


def recipe(teacher: str = "Qwen/Qwen3-8B", layers: int = 24, **sections) -> Recipe:
    values = {
        "name": "planned",
        "teacher": {"source": teacher},
        "student": {"num_layers": layers},
        "data": {"seq_length": 4096},
        "training": {
            "train_iters": 100,
            "global_batch_size": 64,
            "lr": 1e-4,
            "parallelism": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
        },
    }
    return Recipe.model_validate(values | sections)


def platform(models: int = 1, training: int = 8, memory: str = "1600Gi", **pods) -> Platform:
    pods = {"accelerator": "H100-80GB", "memory": memory, **pods}
    return Platform.model_validate(
        {
            "steps": {
                "models": pods | {"accelerator_count": models},
                "training": pods | {"accelerator_count": training},
            }
        }
    )


def test_the_shipped_recipe_fits_the_shipped_platform():
    (plan,) = plans(load_recipe(QWEN), load_platform("gke-h100"))
    assert [step.step for step in plan.steps] == STEPS
    assert plan.problems == []


def test_the_command_shows_every_step_and_its_parts(capsys):
    assert command.main(["plan", QWEN, "--platform", "gke-h100"]) == 0
    shown = capsys.readouterr().out
    for word in (*STEPS, "TP4 DP4", "optimiser", "8.19B parameters", "everything fits"):
        assert word in shown


def test_asking_tasks_is_a_step_whose_time_follows_from_the_questions():
    def asked(limit: int | None, accelerators: int = 1, **sections) -> StepPlan:
        tasks = {"names": ["heldout_cloze"]} | ({} if limit is None else {"limit": limit})
        (plan,) = plans(recipe(tasks=tasks, **sections), platform(models=accelerators))
        assert [step.step for step in plan.steps] == [*STEPS, "evaluate-tasks"]
        return plan.steps[-1]

    few, many, unbounded = asked(100), asked(1000), asked(None)
    assert few.rank["weights"] == 2 * 8_190_735_360  # the teacher in bf16, without padding
    assert many.flops > 5 * few.flops
    assert many.seconds > few.seconds
    assert unbounded.flops == 0  # shown as `?`
    spread = asked(100, accelerators=4)
    assert spread.rank["weights"] == few.rank["weights"] // 4
    assert spread.layout.ranks == 1
    assert few.host > spread.host  # one accelerator's model is whole in the host's memory first


def test_json_has_bytes_and_seconds(capsys):
    assert command.main(["plan", QWEN, "--platform", "gke-h100", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    training = plan["steps"][2]
    assert training["rank_bytes"] == sum(training["rank"].values())
    assert training["seconds"] > 0
    assert training["price"] is None


def test_a_price_an_hour_gives_a_price():
    (plan,) = plans(recipe(), platform(price_per_hour=80.0))
    training = plan.steps[2]
    assert training.price == pytest.approx(80 * training.seconds / 3600)
    assert training.gpu_hours == pytest.approx(8 * training.seconds / 3600)


def test_what_is_too_large_for_an_accelerator_names_the_layout_that_fits():
    large = recipe("meta-llama/Llama-3.3-70B-Instruct", 48, resources={"nodes": 4})
    (plan,) = plans(large, platform(models=8))
    (problem,) = plan.problems  # the model steps take the eight accelerators of their pod
    assert problem.startswith("distil-student: a rank (TP4 DP8) needs")
    assert "77.0 GB for tensors" in problem
    assert "tensor_model_parallel_size: 8, pipeline_model_parallel_size: 2" in problem
    split = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 2}
    split |= {"sequence_parallel": True}
    training = large.training.model_dump() | {"parallelism": split}
    smaller = recipe(
        "meta-llama/Llama-3.3-70B-Instruct", 48, resources={"nodes": 4}, training=training
    )
    assert plans(smaller, platform(models=8))[0].problems == []


def test_model_steps_that_need_more_accelerators_say_how_many():
    (plan,) = plans(recipe("Qwen/Qwen3-32B", 40), platform(models=1))
    problem = next(p for p in plan.problems if p.startswith("convert-student"))
    assert "the smallest layout that fits is TP4: accelerator_count: 4 for the model" in problem


def test_the_smallest_layout_of_the_model_steps_is_taken():
    split = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    training = recipe().training.model_dump() | {"parallelism": split}
    large = recipe("Qwen/Qwen3-32B", 40, training=training)
    chosen, note = fitted(large, platform(models=8))
    assert note == ""
    assert chosen.models.processes == 4
    assert chosen.models.parallelism.tensor_model_parallel_size == 4


def test_a_layout_that_is_given_stays():
    given = recipe(models={"parallelism": {"pipeline_model_parallel_size": 2}})
    chosen, _ = fitted(given, platform(models=2))
    assert chosen.models == given.models


def test_widths_are_pruned_on_pipelines_alone():
    narrow = {"init": "width", "target_parameters": 20e9}
    split = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    training = recipe().training.model_dump() | {"parallelism": split}
    large = recipe("Qwen/Qwen3-32B", 40, training=training, student=narrow)
    (plan,) = plans(large, platform(models=8))
    assert plan.sizes.tensor_model_parallel_size == 1
    assert plan.sizes.pipeline_model_parallel_size == 4
    student, shown = plan.job.student, as_text(plan, "a cluster")
    assert student.hidden_size < 5120
    assert f", 64 layers, hidden_size {student.hidden_size}, " in shown
    assert f", ffn_hidden_size {student.ffn_hidden_size}" in shown
    layout = {"parallelism": {"tensor_model_parallel_size": 4}}
    with pytest.raises(ValueError, match=r"models.parallelism.tensor_model_parallel_size=4: Model"):
        recipe("Qwen/Qwen3-32B", 40, student=narrow, models=layout)


def test_scales_of_inputs_are_found_on_pipelines_alone():
    student = {"num_layers": 40, "quantization": {"recipe": "int8_sq"}}
    split = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    more = {"student": student, "export": {"format": "megatron"}}
    more["training"] = recipe().training.model_dump() | {"parallelism": split}
    (plan,) = plans(recipe("Qwen/Qwen3-32B", **more), platform(models=8))
    assert plan.sizes.tensor_model_parallel_size == 1
    assert plan.sizes.pipeline_model_parallel_size == 4
    layout = {"parallelism": {"tensor_model_parallel_size": 4}}
    with pytest.raises(UserError, match=r"int8_sq with models.parallelism.tensor_model_parallel_s"):
        plans(recipe("Qwen/Qwen3-32B", models=layout, **more), platform(models=8))


def test_weights_that_share_a_scale_are_on_one_rank():
    student = {"init": "width", "ffn_hidden_size": 12288 - 64}
    student |= {"quantization": {"recipe": "int4_awq"}}
    more = {"student": student, "export": {"format": "megatron"}}
    with pytest.raises(UserError, match=r"ffn_hidden_size is .* must be a multiple of 128"):
        plans(recipe(**more), platform())


def test_a_target_that_no_student_meets_is_refused_before_anything_starts():
    small = recipe(student={"init": "depth", "target_parameters": 1e6})
    with pytest.raises(UserError, match="cannot be met with init=depth: the nearest is num_layers"):
        plans(small, platform())


def test_a_small_model_keeps_to_one_process():
    chosen, _ = fitted(recipe(), platform())
    assert chosen.models.parallelism is None


def test_a_mixture_that_is_too_large_is_told_of_expert_parallelism():
    training = recipe().training.model_dump() | {"parallelism": {}}
    (plan,) = plans(recipe("Qwen/Qwen3-30B-A3B", 24, training=training), platform(models=8))
    (problem,) = plan.problems
    assert problem.endswith("training.parallelism={expert_model_parallel_size: 8}")


def test_too_little_host_memory_is_refused_too():
    with pytest.raises(UserError, match=r"its pod \(TP4 DP2\) needs .* of memory, and has 10.7 GB"):
        fitted(recipe(), platform(memory="10Gi"))


def test_compile_refuses_what_does_not_fit(tmp_path, capsys):
    file = tmp_path / "platform.yaml"
    pods = {"accelerator": "L4-24GB", "memory": "1600Gi", "accelerator_count": 8}
    values = {
        "steps": {"models": pods, "training": pods},
        "shared": {"claim": "shared"},
    }
    file.write_text(yaml.safe_dump(values))
    output = tmp_path / "pipeline.yaml"
    arguments = ["compile", QWEN, "--platform", str(file), "-o", str(output)]
    assert command.main(arguments) == 2
    assert "distil-student: a rank (TP4 DP4) needs" in capsys.readouterr().err
    assert not output.exists()


def test_run_refuses_what_this_machine_cannot_hold(tmp_path, capsys):
    arguments = ["run", QWEN, "--runs", str(tmp_path / "runs")]
    arguments += ["--set", "teacher.source=meta-llama/Llama-3.3-70B-Instruct"]
    assert command.main([*arguments, "--set", "student.num_layers=48"]) == 2
    assert "does not fit this machine" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_unknown_size_is_not_checked_and_that_is_said(tmp_path, capsys):
    arguments = [QWEN, "--set", "teacher.source=/mnt/models/teacher", "--platform", "gke-h100"]
    assert command.main(["plan", *arguments]) == 0
    assert "not checked: /mnt/models/teacher has no config.json here" in capsys.readouterr().out
    assert command.main(["compile", *arguments, "-o", str(tmp_path / "pipeline.yaml")]) == 0
    assert "note: not checked whether" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command_line",
    [
        ["plan"],
        ["compile"],
        ["run"],
        ["submit", "--host=http://127.0.0.1:9"],
        ["schedule", "--host=http://127.0.0.1:9", "--cron=0 0 2 * * *"],
    ],
)
@pytest.mark.parametrize(
    ("field", "said"),
    [
        (
            "models.parallelism={tensor_model_parallel_size: 3}",
            "models.parallelism: num_attention_heads=32 (of the student) is not divisible by "
            "tensor_model_parallel_size=3; it can be 1, 2, 4, 8, 16 or 32",
        ),
        (
            "training.parallelism={pipeline_model_parallel_size: 8}",
            "training.parallelism: num_layers=36 (of the teacher) is not divisible by the "
            "pipeline's 8 chunks",
        ),
    ],
)
def test_a_layout_that_a_model_is_not_divisible_by_is_refused_by_all_commands(
    command_line, field, said, tmp_path, capsys
):
    name, *options = command_line
    where = ["--runs", str(tmp_path / "runs")] if name == "run" else ["--platform", "gke-h100"]
    if name == "compile":
        where += ["-o", str(tmp_path / "pipeline.yaml")]
    assert command.main([name, QWEN, *options, *where, "--set", field]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_variant_of_a_sweep_is_named():
    swept = recipe(sweep={"vary": {"student.num_layers": [24, 18]}})
    four = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 4}
    swept = swept.model_copy(update={"models": ModelsRecipe(parallelism=LayoutRecipe(**four))})
    with pytest.raises(UserError, match=r"variant '.*18.*': models.parallelism: num_layers=18 "):
        plans(swept, platform(models=4))


def small(tmp_path, **changes):
    """Qwen3-0.6B's configuration, its vocabulary padded otherwise than its teacher's."""
    config = {
        "model_type": "qwen3",
        "vocab_size": 152064,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return recipe(student={"init": "pretrained", "source": str(tmp_path)})


def test_a_student_that_is_a_model_of_its_own(tmp_path, capsys):
    (plan,) = plans(small(tmp_path), platform())
    assert plan.job.student.num_layers == 28
    assert plan.job.student_source.dtype_bytes == 4
    assert plan.problems == []
    convert, cut = plan.steps[1], plans(recipe(), platform())[0].steps[1]
    # Fetched, imported and proven as the teacher was.
    assert convert.scratch == convert.artifact == plan.job.student_bytes
    assert cut.scratch == 0
    assert f"student {tmp_path}: 596.2M parameters, 28 layers, 32-bit" in as_text(plan, "here")
    assert as_json(plan, "here")["student"]["source"] == str(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2},
            "num_attention_heads=6 .of the student",
        ),
        ({"max_position_embeddings": 2048}, "the student's max_position_embeddings=2048"),
        ({"model_type": "gemma"}, "student: model_type='gemma' is not supported"),
    ],
)
def test_a_model_that_cannot_be_a_student_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        check_run([small(tmp_path, **change)])


def test_values_of_a_run_are_refused_too():
    check_run([recipe()])
    wrong = recipe(models={"parallelism": {"tensor_model_parallel_size": 3}})
    with pytest.raises(UserError, match="num_attention_heads=32"):
        check_run([recipe(), wrong])


def test_ranks_that_the_accelerators_are_not_a_multiple_of():
    with pytest.raises(UserError, match="does not divide the 6 processes"):
        plans(recipe(), platform(training=6))
    four = recipe(models={"parallelism": {"tensor_model_parallel_size": 4}})
    with pytest.raises(UserError, match=r"models\.parallelism asks for 4 processes, but .* has 1 "):
        plans(four, platform(models=1))


def test_every_variant_of_a_sweep_is_planned(tiny_teacher):
    swept = load_recipe("recipes/tiny-sweep.yaml", [f"teacher.source={tiny_teacher}"])
    found = plans(swept, load_platform("cpu-only"))
    assert [plan.name for plan in found] == [variant.name for variant in swept.variants]


def test_an_accelerator_of_the_platforms_own():
    own = {"accelerator": None, "accelerator_memory": "96Gi", "accelerator_tflops": 500}
    (plan,) = plans(recipe(), platform(**own))
    accelerator = plan.job.training.accelerator
    assert (accelerator.memory, accelerator.flops) == (96 * 2**30, 500e12)


def test_an_accelerator_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="none of H200-141GB, H100-80GB"):
        platform(accelerator="H100")


def test_an_accelerator_that_is_not_named_is_not_checked(capsys, tmp_path):
    file = tmp_path / "platform.yaml"
    file.write_text(yaml.safe_dump({"steps": {"models": {"accelerator_count": 1}}}))
    assert command.main(["plan", "--platform", str(file)]) == 0
    assert "not checked: no accelerator" in capsys.readouterr().out


def test_this_machine_has_memory():
    assert this_machine(on_cpu=True).memory > 1e9
    assert this_machine(on_cpu=True).accelerators == 0


def test_planning_imports_no_torch():
    code = "import sys; from pipelines.planning import plans; sys.exit('torch' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_document_has_the_models_as_they_are_computed():
    text = sizes_document.DOCUMENT.read_text(encoding="utf-8")
    assert sizes_document.renewed(text, "models", sizes_document.table()) == text
