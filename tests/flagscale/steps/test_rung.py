"""The rungs of a search: a training is stopped, measured, and goes on as if nothing had been."""

import json
from pathlib import Path

import pytest

from flagscale.artifacts import open_artifact
from flagscale.recipe import DistillationRecipe, TasksRecipe, TrainingRecipe
from flagscale.shared import Pointer
from flagscale.steps.distil_student import distil_student
from flagscale.steps.search.rung import SAMPLE_LOSSES, Rung

TRAINING = TrainingRecipe(
    train_iters=6,
    micro_batch_size=2,
    global_batch_size=4,
    lr=1e-3,
    lr_warmup_iters=1,
    eval_interval=3,
    eval_iters=1,
    save_interval=4,
)


def records(artifact: Path, name: str) -> list[dict[str, float]]:
    """What was logged, but for the speed."""
    lines = (artifact / f"{name}.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens per second"} for line in lines
    ]


def losses(artifact: Path) -> dict[str, dict[str, tuple[float, float]]]:
    found: dict[str, dict[str, tuple[float, float]]] = json.loads(
        (artifact / SAMPLE_LOSSES).read_text()
    )
    return found


@pytest.fixture(scope="module")
def inputs(teacher: Path, student: Path, dataset: Path) -> tuple[Path, Path, Path]:
    return teacher, student, dataset


def rung(student: Path, step: int, samples: int = 8) -> Rung:
    digest = open_artifact(student, "student").digest
    return Rung(step, samples, Pointer("student", digest, str(student), 1))


@pytest.fixture(scope="module")
def folder(inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a training in two rungs, and to the end; and of one without."""
    folder = tmp_path_factory.mktemp("rungs")
    checkpoints = folder / "checkpoints"
    for step in (2, 5):
        stop = rung(inputs[1], step)
        distil_student(
            DistillationRecipe(), TRAINING, *inputs, checkpoints, folder / f"rung {step}", rung=stop
        )
    distil_student(DistillationRecipe(), TRAINING, *inputs, checkpoints, folder / "end")
    distil_student(DistillationRecipe(), TRAINING, *inputs, folder / "other", folder / "straight")
    return folder


def test_stopped_at_rungs_it_is_the_same_training(folder: Path) -> None:
    for name in ("training", "validation"):
        assert records(folder / "end", name) == records(folder / "straight", name)
    assert [record["step"] for record in records(folder / "rung 5", "training")] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records(folder / "rung 2", "validation")] == [0]
    assert list((folder / "checkpoints").iterdir()) == []  # once it is at its end


def test_a_rung_says_what_it_measured(folder: Path, inputs: tuple[Path, Path, Path]) -> None:
    manifest = open_artifact(folder / "rung 5", "candidate")
    found = losses(folder / "rung 5")
    assert set(found) >= {"logits distillation loss", "lm loss"}
    for name, samples in found.items():
        assert len(samples) == manifest.facts["samples"] == 8
        sums, counts = zip(*samples.values(), strict=True)
        assert sum(sums) / sum(counts) == manifest.facts[f"held-out {name}"]
    assert found["lm loss"] != losses(folder / "rung 2")["lm loss"]
    assert manifest.facts["student"]["location"] == str(inputs[1])
    assert manifest.facts["tokens"] == 5 * 4 * 64
    assert manifest.facts["made"]["keep_layers"] == [0, 3]


def test_samples_are_measured_one_by_one_as_a_validation_measures_them(
    folder: Path, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """The validation's mean is that of its samples, however they were put together."""
    training = TRAINING.model_copy(update={"eval_iters": 2, "eval_interval": 5})
    distil_student(
        DistillationRecipe(),
        training,
        *inputs,
        tmp_path / "c",
        tmp_path / "r",
        rung=rung(inputs[1], 5),
    )
    validated = records(tmp_path / "r", "validation")[-1]
    facts = open_artifact(tmp_path / "r", "candidate").facts
    assert validated["step"] == 5
    for name in ("lm loss", "logits distillation loss"):
        assert facts[f"held-out {name}"] == pytest.approx(validated[name], rel=1e-5)
    assert losses(tmp_path / "r") == losses(folder / "rung 5")


def test_an_earlier_rung_is_measured_where_it_ends_even_if_training_is_further(
    folder: Path, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    training = TRAINING.model_copy(update={"keep_checkpoints": 1})
    where = tmp_path / "checkpoints"
    distil_student(
        DistillationRecipe(), training, *inputs, where, tmp_path / "5", rung=rung(inputs[1], 5)
    )
    distil_student(
        DistillationRecipe(), training, *inputs, where, tmp_path / "2", rung=rung(inputs[1], 2)
    )
    assert losses(tmp_path / "2") == losses(folder / "rung 2")
    distil_student(
        DistillationRecipe(), training, *inputs, where, tmp_path / "again", rung=rung(inputs[1], 5)
    )
    assert losses(tmp_path / "again") == losses(folder / "rung 5")


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {},
    ],
    ids=["tensor", "pipeline", "context", "data"],
)
def test_two_ranks_measure_the_same_samples_as_one(
    folder: Path, inputs: tuple[Path, Path, Path], tmp_path: Path, layout: dict[str, object]
) -> None:
    training = TrainingRecipe.model_validate(
        {**TRAINING.model_dump(mode="json"), "parallelism": {"processes": 2, **layout}}
    )
    where, stop = tmp_path / "checkpoints", rung(inputs[1], 2)
    distil_student(DistillationRecipe(), training, *inputs, where, tmp_path / "two", rung=stop)
    found, expected = losses(tmp_path / "two"), losses(folder / "rung 2")
    for name in ("lm loss", "logits distillation loss"):
        assert list(found[name]) == list(expected[name])
        for sample, (total, tokens) in expected[name].items():
            assert found[name][sample] == pytest.approx((total, tokens), rel=1e-3)


def test_a_task_ranks_by_the_very_weights_of_the_candidate(
    folder: Path, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """After all steps they are those of the whole training, which transformers is asked about."""
    from flagscale.evaluation.tasks.finding import load_tasks
    from flagscale.evaluation.tasks.harness import ask, scores
    from flagscale.evaluation.tasks.heldout_passages import heldout_passages
    from flagscale.evaluation.tasks.heldout_tasks import write_heldout_tasks
    from flagscale.evaluation.tasks.language_models import of_folder
    from flagscale.models.hf_artifact import write_hf_folder
    from flagscale.models.tokenizers import load_tokenizer

    tasks = TasksRecipe(names=("heldout_multiple_choice",), limit=40)
    stop = rung(inputs[1], 6)._replace(tasks=tasks)
    output = tmp_path / "candidate"
    distil_student(
        DistillationRecipe(), TRAINING, *inputs, tmp_path / "checkpoints", output, rung=stop
    )
    found = losses(output)
    assert not (output / "asked").exists()
    assert found["heldout_multiple_choice"] == found["heldout_multiple_choice:acc"]

    heldout, exported = tmp_path / "heldout", tmp_path / "hf"
    heldout.mkdir()
    exported.mkdir()
    tokenizer = load_tokenizer(inputs[2] / "tokenizer")
    write_heldout_tasks(heldout_passages(inputs[2], tokenizer, 500, "validation"), heldout)
    write_hf_folder(folder / "straight", exported)
    asked = load_tasks(tasks, None, heldout)
    result = ask(of_folder(exported, tasks.batch_size), asked, tasks)
    for score, name in zip(
        scores(asked, {"x": result}),
        ("heldout_multiple_choice:acc", "heldout_multiple_choice:acc_norm"),
        strict=True,
    ):
        assert len(score.values["x"]) > 8
        wanted = {str(n): [1 - value, 1.0] for n, value in enumerate(score.values["x"])}
        assert found[name] == wanted
        assert open_artifact(output, "candidate").facts[f"held-out {name}"] == pytest.approx(
            1 - score.reported["x"][0]
        )
