"""Trials of the default recipe: which text to fit on, which learning rate, how many steps.

    python benchmarks/default_recipe.py runs/latest/teacher runs/latest/dataset trials.jsonl

A line of `trials.jsonl` is one trial: `keep_layers`, `reconstruction` (tokens, ridge) or none,
`training` and `distillation` as in a recipe, and `split` (default: validation) that is measured.
One process does one after the other, and prints each as JSON with what came of it before training
and after. Figures are of the first 128 tokens of every document. They depend on no clock: times are
beside them, of however busy a machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint import load_layers
from flagscale.data.calibration import calibration
from flagscale.data.layout import read_manifest
from flagscale.data.loader import split_documents
from flagscale.evaluation.fidelity import FIGURES
from flagscale.evaluation.measure.measuring import keep, measure
from flagscale.evaluation.measure.teacher import KeptTeacher
from flagscale.evaluation.measure.windows import batches
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.performance import resolved
from flagscale.megatron.shape import ModelShape
from flagscale.models.causal_lm import CausalLM
from flagscale.models.megatron import WEIGHTS, build_model, load_model
from flagscale.models.reconstruction import layer_targets, reconstruct
from flagscale.post_training.export import plain_student
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.train.loop import train_step
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training

_DOCUMENT_TOKENS = 128
_BATCH = 8
Measure = Callable[[GPTModel], dict[str, float]]


class Trials:
    """Trials that share teacher and data.

    Args:
        teacher: a `teacher` artifact.
        dataset: a `dataset` artifact.
        scratch: for what is only needed meanwhile.
    """

    def __init__(self, teacher: Path, dataset: Path, scratch: Path) -> None:
        self._teacher, self._dataset, self._scratch = teacher, dataset, scratch
        self._seq_length = int(read_manifest(dataset)["facts"]["seq_length"])
        self._measures: dict[str, Measure] = {}

    def run(self, trial: dict[str, Any]) -> dict[str, Any]:
        """What came of one trial, beside it."""
        kept, whole = trial["keep_layers"], ModelShape.load(self._teacher)
        shape = replace(whole, num_layers=len(kept))
        training = resolved(TrainingRecipe(**trial["training"]), shape, distilled=True)
        distillation = DistillationRecipe(**trial.get("distillation", {}))
        args = training_arguments(shape, self._seq_length, training)
        if distillation.loss != "none":
            args = with_teacher(args, self._teacher, distillation)
        found = self._measure(trial.get("split", "validation"))
        begin = time.monotonic()
        targets, text = self._targets(kept, trial.get("reconstruction"))
        with use_args(args):
            chunks = build_model_chunks(args)
            load_layers(chunks, self._teacher / WEIGHTS, kept, whole.num_layers)
            if text is not None:
                chunks[0].eval()
                reconstruct(chunks[0], text, targets, trial["reconstruction"]["ridge"])
            seconds = {"fit": time.monotonic() - begin}
            before = found(self._plain(chunks[0], shape))
            begin = time.monotonic()
            trainer = setup_training(chunks, args, training)
            trainer.chunks[0].train()
            with tempfile.TemporaryDirectory(dir=self._scratch) as index:
                data = RankBatches(self._dataset, Path(index), args, training).train(0)
                for _ in range(training.train_iters):
                    train_step(trainer, data)
            seconds["train"] = time.monotonic() - begin
            after = found(self._plain(plain_student(trainer.chunks[0]), shape))
        del trainer, chunks
        gc.collect()
        return {**trial, "before": before, "after": after, "seconds": seconds}

    def _targets(self, kept: list[int], wanted: dict[str, Any] | None) -> tuple[Any, Any]:
        if wanted is None:
            return [], None
        with tempfile.TemporaryDirectory(dir=self._scratch) as cache:
            text = calibration(self._dataset, Path(cache), wanted["tokens"], 1234, "cpu").whole
        return layer_targets(load_model(self._teacher, self._seq_length), text, kept), text

    def _plain(self, trained: GPTModel, shape: ModelShape) -> GPTModel:
        """A copy that is only run."""
        model = build_model(shape, self._seq_length)
        own = dict(trained.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.data.copy_(own[name].data)
        return model

    def _measure(self, split: str) -> Measure:
        if split not in self._measures:
            documents = [d[: _DOCUMENT_TOKENS + 1] for d in split_documents(self._dataset, split)]
            text = batches(documents, self._seq_length, _BATCH)
            (self._scratch / split).mkdir()
            kept = KeptTeacher(self._scratch / split, writes=True)
            keep(CausalLM(load_model(self._teacher, self._seq_length), can_cache=False), kept, text)
            tokens = sum(len(document) - 1 for document in documents)

            def found(model: GPTModel) -> dict[str, float]:
                student = CausalLM(model, can_cache=False)
                sums_f = measure(split, student, kept, text, len(documents))[1].sum(axis=-1)
                return {f: float(x / tokens) for f, x in zip(FIGURES, sums_f, strict=True)}

            self._measures[split] = found
        return self._measures[split]


def main() -> None:
    """Run the trials of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("teacher", "dataset", "trials"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trials-") as scratch, platform.runtime():
        trials = Trials(arguments.teacher, arguments.dataset, Path(scratch))
        for line in arguments.trials.read_text(encoding="utf-8").splitlines():
            print(json.dumps(trials.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
