"""How much memory each step takes that holds models, beside the bytes of the models.

    python benchmarks/step_memory.py FOLDER --tensor-parallel 2

A random Llama of 608M parameters in bfloat16, its student of half the layers, little text. Every
step runs in a fresh process, or on ranks. What counts is how much more a process holds at its peak
than one that runs the same step with a model of next to nothing. Beside it stands what the planner
expects of the fullest rank, and how far the growth is from that. Artifacts stay in FOLDER: give it
again, and `--steps`, to measure a step anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flagscale.artifacts import MANIFEST, new_artifact, open_artifact
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import (
    DataRecipe,
    DistillationRecipe,
    EvaluationRecipe,
    ExportRecipe,
    LayoutRecipe,
    ModelsRecipe,
    ParallelismRecipe,
    StudentRecipe,
    TeacherRecipe,
    TrainingRecipe,
)
from flagscale.sizes.layout import Layout
from flagscale.sizes.models import ModelSteps
from flagscale.sizes.parameters import parameters
from flagscale.sizes.steps import MODEL_STEPS

_VOCABULARY = 1024
_EOD = "<|endoftext|>"
_SIZES = {  # hidden size, MLP, layers
    "nothing": (128, 256, 2),
    "60M": (768, 2048, 8),
    "608M": (2048, 6144, 12),
    "2040M": (2560, 6912, 28),  # a source of 4 GB
}
_OUTPUTS = {
    "prepare-teacher": "teacher",
    "convert-student": "student",
    "evaluate": "evaluation",
    "export-student": "export",
}


@dataclass(frozen=True)
class Peak:
    """Bytes.

    Attributes:
        ranks: most that each rank held.
        child: most that a process held which the step started, without ranks.
    """

    ranks: list[int]
    child: int


def main() -> None:
    """Print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(_SIZES), default="608M")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--steps", nargs="+", choices=list(_OUTPUTS), default=list(_OUTPUTS))
    parser.add_argument("--run", choices=list(_OUTPUTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run, options.folder / options.size, options.tensor_parallel)
        return
    peaks = {}
    for size in ("nothing", options.size):
        folder = options.folder / size
        prepare(folder, *_SIZES[size])
        for step in _OUTPUTS:
            if step in options.steps:
                peaks[size, step] = measure(options, size, step)
            if step == "convert-student" and step in options.steps:
                distil(folder)
    held = sizes(options.folder / options.size)
    plan = planned(options.folder / options.size, options.tensor_parallel)
    for step in options.steps:
        least, most = (peaks[size, step] for size in ("nothing", options.size))
        grown = [rank - base for rank, base in zip(most.ranks, least.ranks, strict=True)]
        sys.stdout.write(
            f"{step:16} models {held[step] / 1e9:5.2f} GB, growth "
            f"{', '.join(f'{rank / 1e9:5.2f}' for rank in grown)} GB "
            f"({max(grown) / held[step]:.2f} x), planned {plan[step] / 1e9:5.2f} GB "
            f"({max(grown) / plan[step] - 1:+.0%}), peak {max(most.ranks) / 1e9:.2f} GB, "
            f"of a process that it starts {most.child / 1e9:.2f} GB\n"
        )


def measure(options: argparse.Namespace, size: str, step: str) -> Peak:
    """Run a step in a fresh process."""
    command = [sys.executable, __file__, str(options.folder), "--size", size, "--run", step]
    command += ["--tensor-parallel", str(options.tensor_parallel)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own
    child = json.loads(done.stdout.splitlines()[-1])
    manifest = json.loads((options.folder / size / _OUTPUTS[step] / MANIFEST).read_text())
    return Peak(manifest["peak_memory"]["host"], 0 if options.tensor_parallel > 1 else child)


def run(step: str, folder: Path, tensor_parallel: int) -> None:
    """The step itself; prints what the largest process held that it started."""
    layout = LayoutRecipe(tensor_model_parallel_size=tensor_parallel)
    on_ranks = ModelsRecipe(parallelism=layout)
    dataset, teacher, student = (folder / name for name in ("dataset", "teacher", "student"))
    distilled, evaluation = folder / "distilled", folder / "evaluation"
    if step == "prepare-teacher":
        from flagscale.steps.prepare_teacher import prepare_teacher

        recipe = TeacherRecipe(source=str(folder / "source"), max_validation_loss=100)
        prepare_teacher(recipe, dataset, teacher, on_ranks)
    elif step == "convert-student":
        from flagscale.steps.convert_student import convert_student

        layers = json.loads((teacher / "model.json").read_text())["num_layers"]
        recipe = StudentRecipe(num_layers=layers // 2)
        convert_student(recipe, teacher, dataset, student, on_ranks)
    elif step == "evaluate":
        from flagscale.steps.evaluate import evaluate

        recipe = EvaluationRecipe(max_documents=8, bootstrap_samples=100)
        evaluate(recipe, teacher, student, distilled, dataset, evaluation, on_ranks)
    else:
        from flagscale.steps.export_student import export_student

        recipe = ExportRecipe(dtype="bfloat16")
        export_student(recipe, distilled, evaluation, folder / "export", on_ranks)
    import resource

    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    sys.stdout.write(f"\n{most}\n")


def prepare(folder: Path, hidden_size: int, ffn_hidden_size: int, layers: int) -> None:
    """The source of a teacher, and a dataset."""
    if (folder / "dataset").exists():
        return
    from flagscale.steps.prepare_data import prepare_data

    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    documents = [topics[name] for name in sorted(topics)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOD).save_pretrained(source)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=ffn_hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(2, hidden_size // 128),
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(source, max_shard_size="400MB")
    torch.set_default_dtype(torch.float32)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    data = DataRecipe(
        source=str(corpus),
        tokenizer=str(source),
        seq_length=128,
        validation_fraction=0.1,
        test_fraction=0.1,
        workers=1,
    )
    prepare_data(data, folder / "dataset")


def distil(folder: Path) -> None:
    """A distilled student that has learnt nothing: what a training would write."""
    parents = {
        name: open_artifact(folder / name, name) for name in ("teacher", "student", "dataset")
    }
    sections = {
        "distillation": DistillationRecipe().model_dump(mode="json"),
        "training": TrainingRecipe(train_iters=1, lr=1e-4).model_dump(mode="json"),
    }
    with new_artifact(folder / "distilled", "distilled-student", sections, parents) as staging:
        for name in ("hf", "weights"):
            shutil.copytree(folder / "student" / name, staging.path / name)
        shutil.copy(folder / "student" / "model.json", staging.path)
        for name in ("training.jsonl", "validation.jsonl"):
            (staging.path / name).write_text("")
        staging.facts = {"steps": 0}
        staging.tokenizer_hash = parents["student"].tokenizer_hash


def shapes(folder: Path) -> tuple[ModelShape, ModelShape]:
    """Of the teacher and of the student, which has half of its layers."""
    teacher = ModelShape.load(folder / "teacher")
    return teacher, replace(teacher, num_layers=teacher.num_layers // 2)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the models that each step must hold at once, in float32, which a CPU computes in."""
    alone = Layout.of(ParallelismRecipe())
    teacher, student = (4 * parameters(shape, alone, 0).total for shape in shapes(folder))
    return {
        "prepare-teacher": teacher,
        "convert-student": teacher + student,
        "evaluate": teacher + student,
        "export-student": student,
    }


def planned(folder: Path, tensor_parallel: int) -> dict[str, int]:
    """Bytes of the fullest rank of each step, as `python -m pipelines plan` computes them."""
    setup = ModelSteps(
        *shapes(folder),
        source_bytes=2,
        export_bytes=2,
        seq_length=open_artifact(folder / "dataset", "dataset").facts["seq_length"],
        evaluated=EvaluationRecipe().micro_batch_size,
    )
    layout = Layout.of(ParallelismRecipe(tensor_model_parallel_size=tensor_parallel))
    return {step: sum(of_rank(setup, layout, 0).values()) for step, of_rank in MODEL_STEPS.items()}


if __name__ == "__main__":
    main()
