"""Scores of tasks are read as they were written, and anything else is refused by name."""

import json

import numpy as np
import pytest

from flagscale.artifacts import MANIFEST, hash_files, new_artifact
from flagscale.errors import UserError
from flagscale.evaluation.tasks.scores import (
    KIND,
    PER_EXAMPLE,
    TASKS,
    TaskScores,
    figure_names,
    load_scores,
    save_scores,
)

SCORES = (
    TaskScores(
        "arc_easy",
        "acc",
        True,
        ("a", "b", "b"),
        {"teacher": np.array([1.0, 0.0, 1.0]), "distilled": np.array([0.0, 0.1, 1.0])},
        {"teacher": (2 / 3, 0.33), "distilled": (1.1 / 3, None)},
    ),
    TaskScores(
        "arc_easy",
        "acc_norm",
        True,
        ("a", "b", "b"),
        {"teacher": np.array([1.0, 1.0, 1.0]), "distilled": np.array([0.0, 0.0, 1.0])},
        {"teacher": (1.0, 0.0), "distilled": (1 / 3, 0.33)},
    ),
    TaskScores("wikitext", "word_perplexity", False, ("x",), {}, {"teacher": (12.5, None)}),
)


@pytest.fixture
def written(tmp_path):
    with new_artifact(tmp_path / "scores", KIND, {}) as staging:
        save_scores(staging.path, SCORES)
    return tmp_path / "scores"


def _same(left: TaskScores, right: TaskScores) -> bool:
    plain = [
        (s.task, s.metric, s.higher_is_better, s.examples, dict(s.reported)) for s in (left, right)
    ]
    return plain[0] == plain[1] and {m: v.tolist() for m, v in left.values.items()} == {
        m: v.tolist() for m, v in right.values.items()
    }


def test_scores_come_back_to_the_last_bit_in_their_order(written):
    loaded = load_scores(written)

    assert len(loaded) == len(SCORES)
    assert all(_same(ours, theirs) for ours, theirs in zip(loaded, SCORES, strict=True))
    assert {values.dtype for score in loaded for values in score.values.values()} == {
        np.dtype(np.float64)
    }


def test_the_first_metric_of_a_task_has_its_name():
    assert figure_names(SCORES) == ("arc_easy", "arc_easy:acc_norm", "wikitext")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (PER_EXAMPLE, lambda text: "\n".join(text.splitlines()[1:])),
        (PER_EXAMPLE, lambda text: text.replace('"task"', '"tusk"')),
        (TASKS, lambda text: text.replace('"metric"', '"matric"')),
        (TASKS, lambda text: "[" + text),
    ],
)
def test_files_that_do_not_belong_together_are_refused(written, file, change):
    path = written / file
    path.write_text(change(path.read_text()))
    manifest = json.loads((written / MANIFEST).read_text())
    (written / MANIFEST).write_text(json.dumps(manifest | {"files": hash_files(written)}))

    with pytest.raises(UserError, match="not the scores of tasks"):
        load_scores(written)


def test_another_kind_of_artifact_is_refused(tmp_path):
    with new_artifact(tmp_path / "other", "evaluation", {}):
        pass

    with pytest.raises(UserError, match="is a 'evaluation', but a 'task-evaluation' is needed"):
        load_scores(tmp_path / "other")
