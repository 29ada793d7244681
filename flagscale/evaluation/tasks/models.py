"""Loads models, asks them lm-eval's tasks, and measures how fast they generate."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flagscale.data.loader import split_documents
from flagscale.evaluation.generation.measure_speed import (
    TransformersModel,
    measure_generation,
    measure_with_vllm,
)
from flagscale.evaluation.generation.speed import Speed
from flagscale.evaluation.tasks.finding import Tasks
from flagscale.evaluation.tasks.harness import ask
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import load_model
from flagscale.models.reload_hf import is_quantized
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import ParallelismRecipe, TasksRecipe


@dataclass(frozen=True)
class Questions:
    """What is the same for every model.

    Attributes:
        settings: the recipe's section.
        tasks: with their data.
        dataset: a `dataset` artifact, with whose tokenizer Megatron-Core's models are asked.
    """

    settings: TasksRecipe
    tasks: Tasks
    dataset: Path

    @property
    def prompt(self) -> list[int]:
        """From which speed is measured: the start of the test split, repeated if it is short."""
        count = self.settings.prompt_tokens
        tokens: list[int] = []
        for document in split_documents(self.dataset, "test"):
            tokens += document.tolist()
            if len(tokens) >= count:
                break
        return [int(token) for token in np.resize(tokens, count)]


Answers = tuple[dict[str, Any], list[Speed]]  # lm-eval's results, and of each engine the speed


def ask_folder(questions: Questions, folder: Path) -> Answers:
    """Ask a Hugging Face model, as transformers runs it.

    Args:
        questions: for it.
        folder: config, safetensors and tokenizer.
    """
    from flagscale.evaluation.tasks.language_models import of_folder

    settings, prompt = questions.settings, questions.prompt
    lm = of_folder(folder, settings.batch_size)
    answers = ask(lm, questions.tasks, settings)
    engine = "transformers, dequantised" if is_quantized(folder) else "transformers"
    model, new_tokens = TransformersModel(lm.model), settings.new_tokens
    speeds = [measure_generation(model, engine, lm.model.dtype, prompt, new_tokens)]
    del model
    del lm
    _make_room()
    fast = measure_with_vllm(folder, prompt, new_tokens)
    return answers, speeds + ([fast] if fast else [])


def ask_megatron(questions: Questions, artifact: Path, sizes: ParallelismRecipe) -> Answers:
    """Ask a Megatron-Core model. All ranks call it.

    Args:
        questions: for it.
        artifact: with `weights/` and `model.json`.
        sizes: that the runtime was started with.
    """
    from flagscale.evaluation.tasks.language_models import MegatronLM

    shape = ModelShape.load(artifact)
    longest, dtype = shape.max_position_embeddings, platform.training_dtype("auto")
    lm = MegatronLM(
        load_model(artifact, longest, sizes, dtype),
        load_tokenizer(questions.dataset / "tokenizer"),
        max_length=longest,
        batch_size=questions.settings.batch_size,
        # A layer of one's own may keep something else than keys and values, or nothing.
        can_cache=shape.architecture.spec is None,
    )
    answers = ask(lm, questions.tasks, questions.settings)
    new_tokens = questions.settings.new_tokens
    speed = measure_generation(lm.causal_lm, "megatron", dtype, questions.prompt, new_tokens)
    del lm
    _make_room()
    return answers, [speed]


def _make_room() -> None:
    gc.collect()  # modules refer to each other: a model goes only now
    if platform.HAS_GPU:
        torch.cuda.empty_cache()
