"""What terms inside the models cost a training step, in seconds of the processor.

    python benchmarks/intermediate_terms.py [--layers 4] [--repeat 5]

Models of SmolLM2-135M's width with random weights, the student with half the teacher's layers; the
same step with each choice of terms, in turn, in one process. Seconds are of this process' time on
the processor, on a GPU of the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flagscale.checkpoint import save_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import build_model
from flagscale.recipe import DistillationRecipe, TeacherRecipe, TrainingRecipe
from flagscale.sizes.teacher import teacher_of
from flagscale.train.loop import train_step
from flagscale.train.setup import build_model_chunks, setup_training

TRAINING = TrainingRecipe(train_iters=100, lr=1e-4, micro_batch_size=1, global_batch_size=1)
SMOLLM2 = teacher_of(TeacherRecipe(source="HuggingFaceTB/SmolLM2-135M")).shape


def cases(layers: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> what the student has otherwise, and the recipe's section `distillation`."""
    every = [(f"decoder.layers.{i}", f"decoder.layers.{2 * i + 1}") for i in range(layers)]
    last = (layers - 1, 2 * layers - 1)
    narrow = {"hidden_size": 384, "num_attention_heads": 6}
    return {
        "logits alone": ({}, {}),
        "one hidden state, mse": ({}, {"intermediate_layer_pairs": [(*every[-1], "mse")]}),
        "every layer, mse": ({}, {"intermediate_layer_pairs": [(*one, "mse") for one in every]}),
        "every layer, cosine": ({}, {"intermediate_layer_pairs": every}),
        "one attention, three relations": ({}, {"attention_layer_pairs": [last]}),
        "every attention, three relations": (
            {},
            {"attention_layer_pairs": [(i, 2 * i + 1) for i in range(layers)]},
        ),
        "narrower, logits alone": (narrow, {}),
        "narrower, every layer projected, mse": (
            narrow,
            {"intermediate_layer_pairs": [(*one, "mse") for one in every]},
        ),
    }


def batches(seq_length: int, vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    """The same random sample for ever."""
    tokens = torch.randint(0, vocabulary, (1, seq_length))
    while True:
        yield {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": torch.ones(1, seq_length),
            "position_ids": torch.arange(seq_length).unsqueeze(0),
        }


def a_step(
    student: ModelShape, teacher: Path, distillation: dict[str, Any], seq_length: int
) -> Callable[[], object]:
    """A training of random weights; each call is a step of it."""
    args = training_arguments(student, seq_length, TRAINING)
    args = with_teacher(args, teacher, DistillationRecipe.model_validate(distillation))
    stream = [batches(seq_length, student.vocab_size)]
    with use_args(args):
        trainer = setup_training(build_model_chunks(args), args, TRAINING)
    for chunk in trainer.chunks:
        chunk.train()

    def step() -> None:
        with use_args(args):
            train_step(trainer, stream)

    return step


def clock() -> float:
    """Seconds."""
    if platform.HAS_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    """Print a line of JSON a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    teacher = replace(SMOLLM2, num_layers=2 * options.layers)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, platform.runtime():
        path = Path(folder)
        teacher.save(path)
        save_weights(build_model(teacher, options.seq_length), path / "weights")
        steps = {
            name: a_step(
                replace(teacher, num_layers=options.layers, **shape),
                path,
                distillation,
                options.seq_length,
            )
            for name, (shape, distillation) in cases(options.layers).items()
        }
        for turn in range(1 + options.repeat):
            for name, step in steps.items():
                start = clock()
                step()
                if turn:  # the first one makes the optimiser's state
                    seconds.setdefault(name, []).append(clock() - start)
    for name, found in seconds.items():
        row = {"case": name, "median": statistics.median(found), "least": min(found)}
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
