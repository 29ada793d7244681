"""The memory of the steps that hold models by arithmetic, against what their ranks allocate."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from shapes import STUDENT, TEACHER
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flagscale.recipe import DataRecipe, ParallelismRecipe
from flagscale.sizes.layout import Layout
from flagscale.sizes.models import ModelSteps
from flagscale.sizes.steps import MODEL_STEPS
from flagscale.steps.prepare_data import prepare_data

WITHIN = 0.15
SEQ_LENGTH = 256
WORKER = Path(__file__).with_name("model_steps_worker.py")
LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tiny_teacher):
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
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    for processes in (1, 2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run(
            [*torchrun, "--nproc-per-node", str(processes), str(WORKER), str(folder)],
            check=True,
            env=environment,
            cwd=folder,
        )
    return folder


def make_source(folder: Path, tokenizer: Path) -> None:
    """A random model in bf16, with the tokenizer of another."""
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


@pytest.mark.parametrize("step", MODEL_STEPS)
@pytest.mark.parametrize(("name", "rank"), [(n, r) for n in LAYOUTS for r in range(LAYOUTS[n][0])])
def test_estimate(measured, step, name, rank):
    layout = Layout.of(ParallelismRecipe(**LAYOUTS[name][1]))
    stage = rank if layout.pipeline > 1 else 0
    setup = ModelSteps(TEACHER, STUDENT, source_bytes=2, export_bytes=2, seq_length=SEQ_LENGTH)
    found = json.loads((measured / name / f"{step}-{rank}.json").read_text())
    assert sum(MODEL_STEPS[step](setup, layout, stage).values()) == pytest.approx(found, rel=WITHIN)
