"""The memory of the steps that hold models by arithmetic, against what their ranks allocate."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from document import renew
from model_steps_worker import BATCH, SCORED, TOKENS, ask_transformers
from shapes import STUDENT, TEACHER
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flagscale.models.parity import fixed_tokens
from flagscale.recipe import DataRecipe, ParallelismRecipe
from flagscale.sizes.asking import ASK_STEP, Asked, ask_rank
from flagscale.sizes.layers import MEASURE_STEP
from flagscale.sizes.layout import Layout
from flagscale.sizes.models import ModelSteps, measure_layers
from flagscale.sizes.outputs import AskedTeacher, cache_rank
from flagscale.sizes.steps import MODEL_STEPS
from flagscale.steps.prepare_data import prepare_data

WITHIN = 0.15
SEQ_LENGTH, MEASURED_TOKENS = 256, 512
WORKER = Path(__file__).with_name("model_steps_worker.py")
LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}

STEPS = [*MODEL_STEPS, MEASURE_STEP, "cache-teacher, hidden", "cache-teacher, topk", ASK_STEP]
ASKED = Asked(TEACHER, 4, 2, BATCH, TOKENS, SCORED)
STAGES = [("one process", 0), ("TP2", 0), ("PP2", 0), ("PP2", 1)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, torchrun, tiny_teacher):
    """Folder of what every rank of every layout held in every step."""
    folder = tmp_path_factory.mktemp("model-steps-memory")
    make_source(folder / "source", tiny_teacher)
    lines = [json.dumps({"text": text}) for text in topics.values()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    data = DataRecipe(
        source=str(folder / "corpus.jsonl"),
        tokenizer=str(folder / "source"),
        seq_length=SEQ_LENGTH,
        validation_fraction=0.1,
        test_fraction=0.1,
        workers=1,
    )
    prepare_data(data, folder / "dataset")
    (folder / "layouts.json").write_text(json.dumps(LAYOUTS))
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    for processes in (1, 2):
        torchrun(processes, WORKER, folder, env=environment, cwd=folder)
    (folder / "asked.json").write_text(json.dumps(ask_transformers(folder / "source")))
    renew("model steps", rows(folder))
    return folder


def rows(folder: Path) -> Iterator[tuple[str, int, int]]:
    for step in STEPS:
        for name, stage in STAGES:
            what = f"{step}, {name}" + f", stage {stage}" * (name == "PP2")
            yield what, held(folder, step, name, stage), estimated(folder, step, name, stage)
    asked = json.loads((folder / "asked.json").read_text())
    yield f"{ASK_STEP}, transformers", asked, sum(ask_rank(ASKED, Layout(), 0).values())


def make_source(folder: Path, tokenizer: Path) -> None:
    """A random model in bf16, with the tokenizer of another and as many tokens as it has rows."""
    config = LlamaConfig(
        hidden_size=TEACHER.hidden_size,
        intermediate_size=TEACHER.ffn_hidden_size,
        num_hidden_layers=TEACHER.num_layers,
        num_attention_heads=TEACHER.num_attention_heads,
        num_key_value_heads=TEACHER.num_query_groups,
        vocab_size=TEACHER.vocab_size,
        max_position_embeddings=TEACHER.max_position_embeddings,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]  # rows without a token are left out
    for number in range(len(vocabulary), TEACHER.vocab_size):
        vocabulary[f"<unused {number}>"] = number
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_estimate(measured, step, name, stage):
    found = held(measured, step, name, stage)
    assert estimated(measured, step, name, stage) == pytest.approx(found, rel=WITHIN)


def test_estimate_of_transformers_that_are_asked(measured):
    found = json.loads((measured / "asked.json").read_text())
    assert sum(ask_rank(ASKED, Layout(), 0).values()) == pytest.approx(found, rel=WITHIN)


def held(folder: Path, step: str, name: str, stage: int) -> int:
    """Bytes of the fullest rank of a stage."""
    processes, sizes = LAYOUTS[name]
    ranks = [stage] if "pipeline_model_parallel_size" in sizes else range(processes)
    return max(json.loads((folder / name / f"{step}-{rank}.json").read_text()) for rank in ranks)


def estimated(folder: Path, step: str, name: str, stage: int) -> int:
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    setup = ModelSteps(
        TEACHER,
        STUDENT,
        source_bytes=2,
        export_bytes=2,
        seq_length=SEQ_LENGTH,
        proof_tokens=fixed_tokens(tokenizer, SEQ_LENGTH).size(1),
    )
    layout = Layout.of(ParallelismRecipe(**LAYOUTS[name][1]))
    if step.startswith("cache-teacher"):
        asked = AskedTeacher(TEACHER, step.split(", ")[1], SEQ_LENGTH, dtype_bytes=4)
        return sum(cache_rank(asked, layout, stage).values())
    if step == MEASURE_STEP:
        measuring = replace(setup, measured_tokens=MEASURED_TOKENS)
        return sum(measure_layers(measuring, layout, stage).values())
    if step == ASK_STEP:
        return sum(ask_rank(replace(ASKED, on_ranks=True), layout, stage).values())
    return sum(MODEL_STEPS[step](setup, layout, stage).values())
