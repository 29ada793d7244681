"""lm-eval's tasks over documents of the test split, on which no student was trained.

* `heldout_cloze`: the last word of a passage, as LAMBADA asks for it
  (https://arxiv.org/abs/1606.06031).
* `heldout_multiple_choice`: which of four continuations is the passage's own, as HellaSwag asks
  (https://arxiv.org/abs/1905.07830); the others continue passages of other documents.

They are written as lm-eval has tasks, YAML and JSON lines, so that its own command line can ask
them as well: `lm_eval run --include_path FOLDER --tasks heldout_cloze ...`, in that folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from flagscale.errors import UserError
from flagscale.evaluation.tasks.heldout_passages import Passage, words
from flagscale.recipe.strict_yaml import Dumper

MOST_QUESTIONS = 500
_FEWEST = 8
_WRONG = 3  # continuations beside the right one
_VERSION = 1


def write_heldout_tasks(passages: Sequence[Passage], folder: Path) -> None:
    """Write both tasks.

    Args:
        passages: of `heldout_passages`.
        folder: existing, to write into.

    Raises:
        UserError: there are too few, or all of one document.
    """
    if len(passages) < _FEWEST or len({passage.document for passage in passages}) < 2:
        raise UserError(
            f"tasks.names: heldout tasks need {_FEWEST} passages of two documents, and the test "
            f"split has {len(passages)}: set data.test_fraction or data.max_documents higher, or "
            "leave these tasks out"
        )
    _write(folder, "heldout_cloze", _CLOZE, _cloze(passages))
    _write(folder, "heldout_multiple_choice", _CHOICE, _choices(passages))


def _cloze(passages: Sequence[Passage]) -> Iterator[dict[str, Any]]:
    for passage in passages:
        *before, last = words(passage.following)
        yield {"context": passage.shown + "".join(before), "continuation": last}


def _choices(passages: Sequence[Passage]) -> Iterator[dict[str, Any]]:
    for place, passage in enumerate(passages):
        wrong: list[str] = []
        for other in [*passages[place + 1 :], *passages[:place]]:
            text = other.following
            if other.document != passage.document and text not in (passage.following, *wrong):
                wrong.append(text)
            if len(wrong) == _WRONG:
                break
        else:
            continue  # too few that differ
        right = int(passage.order, 16) % (_WRONG + 1)
        choices = [*wrong[:right], passage.following, *wrong[right:]]
        yield {"context": passage.shown, "choices": choices, "label": right}


def _write(folder: Path, name: str, task: dict[str, Any], rows: Iterator[dict[str, Any]]) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file.name}},
        "test_split": "test",
        "doc_to_text": "context",
        "target_delimiter": "",  # the blanks are the text's own
        "num_fewshot": 0,  # there is no other split to take examples from
        "metadata": {"version": _VERSION},
        **task,
    }
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _metric(name: str, aggregation: str, *, higher_is_better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


_CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_target": "continuation",
    "metric_list": [
        _metric("acc", "mean"),
        _metric("perplexity", "perplexity", higher_is_better=False),
    ],
}
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [_metric("acc", "mean"), _metric("acc_norm", "mean")],
}
