"""What a training checkpoint costs, written at once and in the background, side by side.

    python benchmarks/checkpoints.py --layers 10 --hidden 576 --vocabulary 49152

Each case runs in a fresh process: steps without a checkpoint, then the same with one after each
`--every`. `--folder` is where they are written: a disk of the kind that is to be measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import TrainingRecipe
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.setup import build_model_chunks, setup_training
from flagscale.train.trainer import Trainer

CASES = ("at once", "in the background")
SEQ_LENGTH = 256


class Memory(threading.Thread):
    """The most that this process and its children have had of their own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._ended = 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Look, twice a second."""
        own = psutil.Process()
        while not self._ended.wait(0.5):
            total = own.memory_full_info().pss
            for child in own.children():
                try:
                    total += child.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue
            self.most = max(self.most, total)

    def end(self) -> float:
        """In MiB."""
        self._ended.set()
        self.join()
        return self.most / 2**20


def step(trainer: Trainer, tokens_bs: torch.Tensor) -> float:
    """An optimiser step; seconds."""
    begun = time.perf_counter()
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    positions_bs = torch.arange(tokens_bs.shape[1], device=tokens_bs.device).expand_as(tokens_bs)
    size = tokens_bs.shape[1]
    mask = torch.ones(size, size, device=tokens_bs.device).tril().lt(0.5)[None, None]
    trainer.chunks[0](tokens_bs, positions_bs, mask, labels=tokens_bs).mean().backward()
    trainer.optimizer.step()
    return time.perf_counter() - begun


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One case: seconds and MiB."""
    shape = ModelShape(
        model_type="llama",
        num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=options.hidden * 8 // 3 // 64 * 64,
        num_attention_heads=options.hidden // 64,
        num_query_groups=options.hidden // 64,
        kv_channels=64,
        vocab_size=options.vocabulary,
        padded_vocab_size=options.vocabulary,
        max_position_embeddings=SEQ_LENGTH,
        norm_epsilon=1e-5,
        rotary_base=1e4,
    )
    recipe = TrainingRecipe(train_iters=10**6, lr=1e-4)
    args = training_arguments(shape, SEQ_LENGTH, recipe)
    with platform.runtime(), use_args(args), tempfile.TemporaryDirectory(dir=options.folder) as f:
        trainer = setup_training(build_model_chunks(args), args, recipe)
        tokens_bs = torch.randint(options.vocabulary, (1, SEQ_LENGTH), device=platform.device())
        step(trainer, tokens_bs)
        undisturbed = statistics.median(step(trainer, tokens_bs) for _ in range(options.steps))
        saved = TrainingCheckpoints(Path(f), async_save=options.case == "in the background")
        memory = Memory()
        found = disturbed(trainer, tokens_bs, saved, options)
        return {"step": undisturbed, **found, "peak MiB": memory.end()}


def disturbed(
    trainer: Trainer,
    tokens_bs: torch.Tensor,
    saved: TrainingCheckpoints,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Steps with checkpoints."""
    waited, seconds, begun = [], [], time.perf_counter()
    for number in range(1, options.steps + 1):
        seconds.append(step(trainer, tokens_bs))
        start = time.perf_counter()
        saved.poll()
        if number % options.every == 0:
            saved.save(TrainingState(number), trainer)
        waited.append(time.perf_counter() - start)
    saved.wait()
    files = (path for path in saved.folder.rglob("*") if path.is_file())
    checkpoints = options.steps // options.every
    return {
        "mb": sum(path.stat().st_size for path in files) / 1e6 / min(2, checkpoints),
        "waited": sum(waited) / checkpoints,
        "disturbed step": statistics.median(seconds),
        "total": time.perf_counter() - begun,
    }


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    if options.case:
        sys.stdout.write(json.dumps(measure(options)))
        return
    for case in CASES:
        command = [sys.executable, "-W", "ignore", *sys.argv, "--case", case]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
        found = json.loads(told.splitlines()[-1])
        line = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        sys.stdout.write(f"{case}: {line}\n")


if __name__ == "__main__":
    main()
