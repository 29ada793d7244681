"""What KFP's form "Start a run" is made of: it sorts parameters by name and explains none."""

from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from flagscale.recipe import load_recipe
from pipelines.compiling import LOADER, compile_manifests, compile_recipe
from pipelines.platform import load_platform

SMALL = ["training.micro_batch_size=1"]


@pytest.fixture(scope="module", params=["file", "manifest"])
def specs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """PipelineSpecs of a single run and of a sweep, as an upload or as Kubernetes objects."""
    folder, found = tmp_path_factory.mktemp("form"), []
    for name in ("tiny", "tiny-sweep"):
        arguments = (load_recipe(f"recipes/{name}.yaml", SMALL), load_platform("gke-h100"))
        output = folder / f"{name}.yaml"
        if request.param == "file":
            spec = next(yaml.load_all(compile_recipe(*arguments, output).read_text(), LOADER))
        else:
            _, version = yaml.load_all(compile_manifests(*arguments, output).read_text(), LOADER)
            spec = version["spec"]["pipelineSpec"]
        found.append(spec)
    return found


def inputs(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["root"]["inputDefinitions"]["parameters"]
    return found


def test_what_belongs_together_stands_together_and_the_platform_comes_last(
    specs: list[Any],
) -> None:
    single, sweep = (sorted(inputs(spec)) for spec in specs)
    where = [
        "where_code_version",
        "where_data_image",
        "where_data_node_selector",
        "where_data_tolerations",
        "where_mlflow_secret",
        "where_models_accelerator_count",
        "where_models_image",
        "where_models_node_selector",
        "where_models_tolerations",
        "where_training_accelerator_count",
        "where_training_image",
        "where_training_node_selector",
        "where_training_tolerations",
        "where_volume_claim",
    ]
    assert single == [
        "data",
        "data_max_documents",
        "distillation",
        "distillation_loss",
        "distillation_temperature",
        "evaluation",
        "export",
        "models",
        "student",
        "student_num_layers",
        "tasks",
        "teacher",
        "teacher_outputs",
        "tracking_experiment",
        "training",
        "training_checkpoints",
        "training_global_batch_size",
        "training_lr",
        "training_train_iters",
        *where,
    ]
    assert sweep == [
        "data",
        "data_max_documents",
        "evaluation",
        "export",
        "models",
        "sweep_metric",
        "sweep_variants",
        "tasks",
        "teacher",
        "teacher_outputs",
        "tracking_experiment",
        "training_checkpoints",
        *where,
    ]


def test_where_values_are_few_the_form_offers_them(specs: list[Any]) -> None:
    """As a strict reader of KFP's format sees them; the default is one of them."""
    offered = []
    for spec in specs:
        parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        parameters = parsed.root.input_definitions.parameters
        found = {n: [v.string_value for v in p.literals] for n, p in parameters.items()}
        offered.append({name: choices for name, choices in found.items() if choices})
        for name in offered[-1]:
            assert parameters[name].default_value.string_value in found[name]
    assert offered == [
        {"distillation_loss": ["", "logits", "none"]},
        {"sweep_metric": ["kl", "lm_loss", "top1_agreement", "accuracy"]},
    ]


def test_a_single_field_is_a_text_that_is_empty(specs: list[Any]) -> None:
    sections = {"data", "distillation", "student", "training"}
    found = {n: p for n, p in inputs(specs[0]).items() if n.partition("_")[0] in sections - {n}}
    del found["training_checkpoints"]
    assert len(found) == 7
    for name, parameter in found.items():
        assert (parameter["parameterType"], parameter["defaultValue"]) == ("STRING", "")
        section, _, field = name.partition("_")
        assert parameter["description"] == f"sets {section}.{field}; empty: as the section has it"


def test_artifacts_have_names_that_tell_and_each_its_own(specs: list[Any]) -> None:
    single, sweep = (
        sorted(
            name
            for component in spec["components"].values()
            if "dag" not in component
            for name in component.get("outputDefinitions", {}).get("artifacts", {})
        )
        for spec in specs
    )
    shared = {
        "audit",
        "dataset",
        "dataset_metrics",
        "distilled_student",
        "evaluation",
        "evaluation_metrics",
        "evaluation_summary",
        "export_metrics",
        "exported_student",
        "lineage",
        "report",
        "student",
        "student_metrics",
        "student_report",
        "teacher",
        "teacher_metrics",
        "training_metrics",
    }
    assert single == sorted(shared)
    more = {"leaderboard", "ranking_metrics", "leaderboard_report", "leaderboard_summary"}
    more |= {"winners_evaluation"}
    assert sweep == sorted(shared | more)
