"""docs/cluster.md says what is there: its table, its commands, the files and figures it names."""

import argparse
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest
from manifests import DEPLOY, documents, of_kind, secret_shapes
from platform_table import table

from flagscale.recipe import load_recipe
from pipelines.__main__ import _parser
from pipelines.platform import FOLDER

ROOT = DEPLOY.parent
PAGE = ROOT / "docs" / "cluster.md"
_BEGIN, _END = "<!-- platform table: ", "<!-- end of the table -->"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def commands(page: str) -> list[list[str]]:
    """Every command of the page as words: code blocks, and code within the text."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```", "", page, flags=re.DOTALL | re.M))
    return [_words(line) for line in lines]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quotation over several lines
        return line.split()


def test_the_table_of_fields_is_that_of_the_code(page: str) -> None:
    head, _, rest = page.partition(_BEGIN)
    comment, _, rest = rest.partition("\n")
    shown, _, tail = rest.partition(_END)
    expected = "\n" + "\n".join(table()) + "\n\n"
    if "RENEW_TABLE" in os.environ:
        PAGE.write_text(f"{head}{_BEGIN}{comment}\n{expected}{_END}{tail}", encoding="utf-8")
        return
    assert shown == expected, f"RENEW_TABLE=1 python -m pytest {Path(__file__).relative_to(ROOT)}"


def test_our_commands_take_the_options_that_are_shown(commands: list[list[str]]) -> None:
    parsers = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    shown = [words[3:] for words in commands if words[:3] == ["python", "-m", "pipelines"]]
    assert {words[0] for words in shown} >= {"compile", "submit", "schedule", "status"}
    for command, *words in shown:
        parser = parsers.choices[command]
        options = {o for action in parser._actions for o in action.option_strings}
        assert {w for w in words if w.startswith("-")} <= options, words
        if "--platform" in words:
            name = words[words.index("--platform") + 1]
            assert (FOLDER / f"{name}.yaml").is_file()
        for word in words:
            if word.startswith("recipes/"):
                load_recipe(ROOT / word)


def test_secrets_are_made_in_the_shape_that_is_asked_for(commands: list[list[str]]) -> None:
    made: dict[str, set[str]] = {}
    for words in commands:
        if "create" in words and "secret" in words:
            kind, name = words[words.index("secret") + 1 :][:2]
            keys = {w.split("=")[1] for w in words if w.startswith("--from-literal=")}
            made[name] = keys if kind == "generic" else {".dockerconfigjson"}
    shapes = secret_shapes()
    optional = {"username", "password"}
    assert made == {**shapes, "mlflow": shapes["mlflow"] - optional}


def test_files_targets_and_objects_that_it_names_exist(
    page: str, commands: list[list[str]]
) -> None:
    for path in re.findall(r"(?<![\w/.])((?:deploy|recipes|docs)/[\w./-]*\w)", page):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([^):#]+)\)", page):
        assert (PAGE.parent / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands:
        if words[:1] == ["make"]:
            assert f"\n{words[1]}:" in makefile
    files = [*DEPLOY.glob("base/*.yaml"), *DEPLOY.glob("components/*/*.yaml")]
    here = [m for path in files for m in documents(path) if "metadata" in m]
    here += documents(DEPLOY / "volume-owner.yaml")
    kinds = "svc|deployment|job|persistentvolumeclaim"
    for kind, name in re.findall(rf"\b({kinds})[/ ](?!data-)([a-z][a-z-]+)", page):
        full = {"svc": "Service", "job": "Job", "deployment": "Deployment"}
        if name not in ("ml-pipeline-ui", "kubeflow-trainer-controller-manager"):  # Kubeflow's
            assert name in of_kind(here, full.get(kind, "PersistentVolumeClaim")), (kind, name)
    sets = of_kind(here, "StatefulSet")
    claims = {
        f"{claim['metadata']['name']}-{name}-0"
        for name, found in sets.items()
        for claim in found["spec"]["volumeClaimTemplates"]
    }
    assert claims == set(re.findall(r"data-[a-z-]+-0", page))


@pytest.mark.parametrize(("precision", "expected"), [("bf16", 14), ("fp32", 12)])
def test_bytes_a_parameter(page: str, precision: str, expected: int) -> None:
    """The checkpoint of a model large enough for headers not to count."""
    from flagscale.megatron import platform
    from flagscale.megatron.arguments import training_arguments
    from flagscale.megatron.global_vars import use_args
    from flagscale.megatron.shape import ModelShape
    from flagscale.recipe import TrainingRecipe
    from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
    from flagscale.train.setup import build_model_chunks, setup_training

    shape = ModelShape(
        model_type="llama",
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=25600,
        padded_vocab_size=25600,
        max_position_embeddings=64,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
    )
    recipe = TrainingRecipe(train_iters=10, lr=1e-3, precision=precision)
    args = training_arguments(shape, 16, recipe)
    with platform.runtime(), use_args(args), tempfile.TemporaryDirectory() as folder:
        trainer = setup_training(build_model_chunks(args), args, recipe)
        for parameter in trainer.chunks[0].parameters():
            parameter.main_grad.fill_(0.1)
        trainer.optimizer.step()  # Adam has its moments
        TrainingCheckpoints(Path(folder)).save(TrainingState(1), trainer)
        written = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        count = sum(p.numel() for p in trainer.chunks[0].parameters())
    assert written / count == pytest.approx(expected, rel=0.03)
    row = rf"^\| training checkpoint in {precision}.*?\| {expected} \|"
    assert re.search(row, page, re.MULTILINE)


def test_the_example_of_costs_adds_up(page: str) -> None:
    """Qwen3-8B's published shape; the rest is the recipe's."""
    recipe = load_recipe(ROOT / "recipes/qwen3-8b-to-24-layers.yaml")
    hidden, inner, heads, groups, channels, vocabulary = 4096, 12288, 32, 8, 128, 151936
    attention = 2 * hidden * heads * channels + 2 * hidden * groups * channels
    layer = attention + 3 * hidden * inner + 2 * hidden + 2 * channels
    tables = 2 * vocabulary * hidden + hidden

    def parameters(layers: int) -> int:
        return layers * layer + tables

    assert recipe.student.num_layers is not None
    teacher, student = parameters(36), parameters(recipe.student.num_layers)
    assert f"6 x {student / 1e9:.2f}e9 + 2 x {teacher / 1e9:.2f}e9" in page
    training = recipe.training
    tokens = training.train_iters * training.global_batch_size * recipe.data.seq_length
    operations = tokens * (6 * student + 2 * teacher)
    assert f"= {tokens / 1e9:.2f}e9 tokens" in page
    assert f"= {operations / 1e19:.1f}e19" in page
    hours = operations / (0.4 * 989e12) / 3600
    assert (
        f"{hours:.0f} GPU hours: {hours / 8 / recipe.resources.nodes:.1f} hours on 2 nodes" in page
    )
    sizes = [4 * teacher, 4 * student, 14 * student, 12 * student, 2 * student]
    for size in sizes:
        assert f"| {size / 1e9:.0f} GB |" in page
    held = (training.keep_checkpoints + 2) * 14 * student
    assert (
        f"4 x 82 = {held / 1e9:.0f} GB here, {_rounded(held + 4 * teacher + 8 * student)}" in page
    )


def _rounded(size: float) -> str:
    return f"{round(size / 1e10) * 10} GB"
