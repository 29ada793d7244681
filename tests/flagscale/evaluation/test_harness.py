"""What lm-eval answers becomes scores: groups, filters, and metrics that are no means."""

import json
from pathlib import Path

import numpy as np
import pytest

from flagscale.errors import UserError
from flagscale.evaluation.tasks.finding import load_tasks, tasks_folder
from flagscale.evaluation.tasks.harness import ask, scores
from flagscale.evaluation.tasks.scores import TaskScores, figure_names
from flagscale.recipe import TasksRecipe

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: both
task: [large, small]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
  - {metric: acc_norm, aggregation: mean, weight_by_size: false}
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "lol"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
filter_list:
  - {{name: whole, filter: [{{function: take_first}}]}}
  - {{name: letter, filter: [{{function: regex, regex_pattern: "(l)"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: bleu}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, count in (("large", 12), ("small", 3)):
        data = folder / f"{name}.jsonl"
        rows = [
            {"question": f"{name} {i}?", "choices": [" a", " bb", " ccc"], "label": i % 3}
            for i in range(count)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = {"data": data, "cache": folder / "cache"}
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, **said))
    (folder / "group.yaml").write_text(GROUP)
    (folder / "written.yaml").write_text(WRITTEN.format(**said))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, TaskScores]:
    from lm_eval.models.dummy import DummyLM  # answers at random

    settings = TasksRecipe(names=("both", "written"), include_path=str(folder))
    tasks = load_tasks(settings, folder)
    results = {model: ask(DummyLM(), tasks, settings) for model in ("teacher", "distilled")}
    every = scores(tasks, results)
    return dict(zip(figure_names(every), every, strict=True))


def test_a_task_has_its_metrics_in_its_own_order(found: dict[str, TaskScores]) -> None:
    assert list(found) == [
        *("both", "both:acc_norm", "large", "large:acc", "small", "small:acc"),
        *("written", "written:exact_match:letter", "written:bleu:whole", "written:bleu:letter"),
    ]


def test_every_value_is_the_models_own(found: dict[str, TaskScores]) -> None:
    large = found["large:acc"]
    assert len(large.examples) == len(set(large.examples)) == 12
    for model, values_e in large.values.items():
        assert set(values_e) <= {0.0, 1.0}
        assert values_e.mean() == pytest.approx(large.reported[model][0])
        stderr = values_e.std(ddof=1) / np.sqrt(12)
        assert large.reported[model][1] == pytest.approx(stderr)


def test_a_group_has_the_examples_of_its_tasks_where_they_count_alike(
    found: dict[str, TaskScores],
) -> None:
    both, plain = found["both"], found["both:acc_norm"]
    assert both.examples == found["large"].examples + found["small"].examples
    for model, values_e in both.values.items():
        parts = [found[task].values[model] for task in ("large:acc", "small:acc")]
        assert values_e.tolist() == np.concatenate(parts).tolist()
    # A mean of means is no mean over examples.
    assert not plain.values
    means = [found[task].reported["teacher"][0] for task in ("large", "small")]
    assert plain.reported["teacher"][0] == pytest.approx(np.mean(means))


def test_a_metric_of_the_whole_corpus_has_no_values(found: dict[str, TaskScores]) -> None:
    assert not found["written:bleu:whole"].values
    assert found["written:bleu:whole"].higher_is_better
    assert found["written"].metric == "exact_match:whole"
    assert found["written:exact_match:letter"].values.keys() == {"teacher", "distilled"}


def test_data_that_cannot_be_had_is_told_before_a_model_is_loaded() -> None:
    own = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere/x.json}\n"
    own += "test_split: train\noutput_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    with pytest.raises(UserError, match="tasks: mine cannot be loaded: FileNotFoundError: "):
        load_tasks(TasksRecipe(own=(own,)), None)


def test_a_mistyped_task_of_ours_is_told_by_its_name() -> None:
    with pytest.raises(UserError, match="no task 'heldout_clozee'; did you mean heldout_cloze"):
        load_tasks(TasksRecipe(names=("heldout_clozee",)), None)


def test_a_folder_that_steps_do_not_see_is_told(tmp_path: Path) -> None:
    tasks = TasksRecipe(names=("mine",), include_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such folder here"):
        tasks_folder(tasks, tmp_path)


def test_tasks_come_from_an_object_store(bucket: str, folder: Path, tmp_path: Path) -> None:
    from flagscale.shared.store import ObjectStore

    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    ObjectStore(f"{bucket}/tasks").put(files)
    settings = TasksRecipe(names=("small",), include_path=f"{bucket}/tasks")

    tasks = load_tasks(settings, tasks_folder(settings, tmp_path))

    assert tasks.asked == ("small",)
    assert len(tasks.tasks["small"].eval_docs) == 3
