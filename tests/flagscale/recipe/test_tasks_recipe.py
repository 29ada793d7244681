"""The section `tasks`: what could not be asked is refused when the recipe is read."""

from pathlib import Path

import pytest

from flagscale.errors import UserError
from flagscale.recipe import TasksRecipe, parse_section

OWN = "task: mine\ndataset_path: json\n"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"names": ["arc_easy", "arc_easy"]}, "arc_easy is there twice"),
        ({"names": ["mine"], "own": [OWN]}, "mine is there twice"),
        ({"names": ["arc_*"]}, "names"),
        ({"own": ["task: heldout_cloze\nx: 1\n"]}, "heldout_cloze is a task that is made here"),
        ({"own": ["dataset_path: json\nx: 1\n"]}, "needs a mapping with `task: name`"),
        ({"own": ["task: [mine\n"]}, "no YAML"),
        ({"own": [OWN + "process_docs: !function utils.f\n"]}, "tasks.include_path"),
        ({"own": ["/nowhere/mine.yaml"]}, "neither a task's YAML nor a file"),
        ({"names": ["heldout_cloze"], "include_path": "/x"}, "no task of it is in names"),
        ({"names": ["heldout_cloze"], "new_tokens": 1}, "new_tokens"),
    ],
)
def test_it_is_refused(values: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_section(TasksRecipe, values, where="tasks")
    assert said in str(error.value)


def test_a_file_is_read_once_so_that_the_recipe_holds_all(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(OWN)
    tasks = TasksRecipe(own=(str(file),))
    assert tasks.own == (OWN,)
    assert TasksRecipe(**tasks.model_dump(mode="json")) == tasks
    assert tasks.is_asked
    assert not TasksRecipe().is_asked
