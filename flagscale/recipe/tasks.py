"""Section `tasks`: what lm-eval asks of the teacher and of the exported student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, model_validator

from flagscale.recipe import strict_yaml
from flagscale.recipe.section import NUMBER, PositiveInt, Section, Source, Text

# Made from the test split, so that they need no network: task -> its metrics, the first one first.
HELDOUT_TASKS = {
    "heldout_cloze": ("acc", "perplexity"),
    "heldout_multiple_choice": ("acc", "acc_norm"),
}
_FILES = ("!function", "!include")  # of a folder: a text alone has none beside it


def own_task(value: str) -> str:
    """A task's YAML, from the text itself or from the file that is named.

    Raises:
        ValueError: there is no such file, or it is no task that stands alone.
    """
    text = value
    if "\n" not in value and not value.lstrip().startswith("{"):
        try:
            text = Path(value).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(
                f"{value[:80]!r}: neither a task's YAML nor a file that can be read: {error}"
            ) from error
    tag = next((tag for tag in _FILES if tag in text), None)
    if tag is not None:
        raise ValueError(
            f"has {tag}, and no file lies beside a text: put the task's folder where the steps' "
            "pods see it, and name it in tasks.include_path"
        )
    try:
        name = task_name(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from error
    if name is None:
        raise ValueError("no task of lm-eval's: needs a mapping with `task: name`")
    return text


def task_name(text: str) -> str | None:
    """The name in a task's YAML; None where it has none."""
    values: Any = strict_yaml.load(text)
    name = values.get("task") if isinstance(values, dict) else None
    return name if isinstance(name, str) and name.strip() else None


TaskName = Annotated[str, Field(max_length=200, pattern=r"^[^\s,*?\[\]/]+$")]
OwnTask = Annotated[Text, AfterValidator(own_task)]


class TasksRecipe(Section):
    """Tasks of lm-eval (EleutherAI's harness), asked of teacher and student with equal settings.

    The step evaluate-tasks is there where some are named.
    """

    names: tuple[TaskName, ...] = Field(
        (),
        description="lm-eval's tasks, groups or tags; heldout_cloze and heldout_multiple_choice "
        "are made from the test split, without a network",
        examples=[["heldout_cloze", "arc_easy"]],
    )
    own: tuple[OwnTask, ...] = Field(
        (), description="Tasks of your own: lm-eval's YAML, or a file that has it"
    )
    include_path: Source | None = Field(
        None,
        description="Folder of tasks of your own, which steps' pods see, or an object store's URL; "
        "their names go into names",
    )
    num_fewshot: Annotated[int, Field(ge=0, le=1000), NUMBER] | None = Field(
        None, description="Examples before each question; default: as each task has it"
    )
    apply_chat_template: bool = Field(
        False, description="Ask by the tokenizer's chat template, few-shot examples as turns"
    )
    limit: PositiveInt | None = Field(
        None, description="Ask no more than the first so many examples of each task"
    )
    batch_size: PositiveInt = Field(8, description="Sequences a forward pass")
    prompt_tokens: Annotated[PositiveInt, Field(le=2**20)] = Field(
        128, description="Tokens that are read when the speed of generation is measured"
    )
    new_tokens: Annotated[PositiveInt, Field(ge=2, le=2**16)] = Field(
        32, description="Tokens that are written then"
    )

    @property
    def is_asked(self) -> bool:
        """Whether there is a task."""
        return bool(self.names or self.own)

    @property
    def needs_lm_eval_tasks(self) -> bool:
        """Whether a task is asked that is not made from the test split."""
        return bool(set(self.names) - HELDOUT_TASKS.keys() or self.own)

    @property
    def all_names(self) -> tuple[str, ...]:
        """Of everything that is asked."""
        return (*self.names, *(task_name(text) or "" for text in self.own))

    @model_validator(mode="after")
    def _check(self) -> TasksRecipe:
        names = self.all_names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"names and own: {twice} is there twice; leave it out once")
        for name in (task_name(text) for text in self.own):
            if name in HELDOUT_TASKS:
                raise ValueError(f"own: {name} is a task that is made here; name yours otherwise")
        if self.include_path is not None and not set(self.names) - HELDOUT_TASKS.keys():
            raise ValueError(
                f"include_path={self.include_path} has no effect: no task of it is in names"
            )
        return self
