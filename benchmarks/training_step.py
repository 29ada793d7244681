"""A step of the whole training loop against TRL's `GKDTrainer` and a plain transformers loop.

    python benchmarks/training_step.py FOLDER [--recipe R] [--steps 20] [--peers FOLDER_WITH_TRL]
    python benchmarks/training_step.py FOLDER --cases ours hidden sampled

All train the recipe's student on the same batches, from the same weights, with the forward KL to
the same teacher, AdamW and the gradient's norm clipped at 1: the losses of the first step are
compared, so that no time is quoted for other work. Every case is a process of its own; one takes a
step while the others sleep, in turn. `products` makes the matrix products of such a step and
nothing else: the floor, on whose account stands what no loop can save. `hidden` and `sampled` are
ours without the teacher: what it answered is read. The artifacts stay in FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from training_step_peers import products, transformers, trl

from flagscale.recipe import Recipe
from flagscale.recipe.reading import load_recipe

DEFAULT = Path(__file__).parent.parent / "recipes/smollm2-135m-to-22-layers.yaml"
CASES = ("ours", "transformers", "trl", "products", "hidden", "sampled")
_MICRO_BATCHES = 64  # that there are tokens of
_ANSWERED = 24  # of which there are the teacher's answers
_SAME_LOSS = 1e-3  # relative, of the first step: fp32, summed in another order


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=DEFAULT)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="folder with TRL, made by pip install --target")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES[:4])
    parser.add_argument("--case", choices=("prepare", *CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    if options.case:
        torch.set_num_threads(options.threads)
        run(options.case, recipe, options.folder)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command(options, "prepare")], check=True, stdout=sys.stderr)  # noqa: S603 - our own
    cases = [case for case in options.cases if case != "trl" or options.peers]
    workers = {case: Worker(case, options) for case in cases}
    found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for step in range(options.steps + 1):
        for case, worker in workers.items():
            record = worker.step()
            if step:  # the first is a warm-up
                found[case].append(record)
            elif case not in ("products", "sampled"):  # of draws it is an estimate
                compare(case, record["loss"], workers["ours"].first)
    for case, records in found.items():
        seconds = [record["seconds"] for record in records]
        share = statistics.median(
            one["seconds"] / ours["seconds"]
            for one, ours in zip(records, found["ours"], strict=True)
        )
        sys.stdout.write(
            f"{case:13} {statistics.median(seconds):6.2f} s a step ({min(seconds):.2f} to "
            f"{max(seconds):.2f}), {share:.2f} x ours, step by step; "
            f"{statistics.median(record['cpu'] for record in records):.2f} CPU s, "
            f"peak {workers[case].peak / 1e9:.2f} GB\n"
        )
    for worker in workers.values():
        worker.stop()


def command(options: argparse.Namespace, case: str) -> list[str]:
    """Of a case's own process."""
    return [
        *(sys.executable, __file__, str(options.folder), "--recipe", str(options.recipe)),
        *("--case", case, "--threads", str(options.threads)),
    ]


class Worker:
    """A process that takes a step whenever it is told to."""

    def __init__(self, case: str, options: argparse.Namespace) -> None:
        paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        if case == "trl":
            paths.append(str(options.peers))
        # Threads that wait for their next share of work would take the cores from the others.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_WAIT_POLICY": "passive",
            "OMP_NUM_THREADS": str(options.threads),
        }
        self._process = subprocess.Popen(  # noqa: S603 - our own
            command(options, case),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.first = self.peak = 0.0

    def step(self) -> dict[str, float]:
        """Take one."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        record = self._read()
        self.peak = record["peak"]
        self.first = self.first or record["loss"]
        return record

    def stop(self) -> None:
        """No more steps."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"loss"'):
                return json.loads(line)
        raise SystemExit(f"a worker ended with status {self._process.wait()}")


def compare(case: str, loss: float, ours: float) -> None:
    """The work must be the same."""
    if not abs(loss - ours) <= _SAME_LOSS * ours:
        raise SystemExit(f"{case}: the first step's loss is {loss:.6f}, ours {ours:.6f}")


def run(case: str, recipe: Recipe, folder: Path) -> None:
    """A process' whole life: a step for every line of standard input."""
    if case == "prepare":
        prepare(recipe, folder)
        return
    import resource

    steps = {
        "ours": ours,
        "transformers": transformers,
        "trl": trl,
        "products": products,
        "hidden": partial(ours, codec="hidden"),
        "sampled": partial(ours, codec="sampled"),
    }[case](recipe, folder)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        loss = next(steps)
        record = {
            "loss": loss,
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


def prepare(recipe: Recipe, folder: Path) -> None:
    """The artifacts of the steps before training, and the tokens of its batches."""
    from flagscale.steps.convert_student import convert_student
    from flagscale.steps.prepare_data import prepare_data
    from flagscale.steps.prepare_teacher import prepare_teacher

    dataset, teacher, student = (folder / name for name in ("dataset", "teacher", "student"))
    if not dataset.exists():
        prepare_data(recipe.data, dataset)
    if not teacher.exists():
        prepare_teacher(recipe.teacher, dataset, teacher, recipe.models)
    if not student.exists():
        # The others cut it out of the same teacher: not fitted to it.
        cut = recipe.student.model_copy(update={"reconstruction": None})
        convert_student(cut, teacher, dataset, student, recipe.models)
    for codec in ("hidden", "sampled"):
        if not (folder / codec).exists():
            keep_outputs(recipe, folder, codec)
    with ours_set_up(recipe, folder) as (_, batches):
        some = _take(batches[0], _MICRO_BATCHES)
    tokens = [torch.cat([b["tokens"], b["labels"][:, -1:]], 1) for b in some]
    torch.save(torch.cat(tokens), folder / "tokens.pt")


def keep_outputs(recipe: Recipe, folder: Path, codec: str) -> None:
    """What the teacher answers to the samples of the first steps."""
    from flagscale.recipe import MetRecipe, TeacherOutputsRecipe
    from flagscale.steps.cache_teacher import cache_teacher

    training = recipe.training
    met = MetRecipe(
        train=((training.seed, _ANSWERED * training.micro_batch_size),),
        precision=training.precision,
        temperature=recipe.distillation.temperature,
    )
    read = folder / "teacher", folder / "dataset"
    outputs = TeacherOutputsRecipe(codec=codec)
    cache_teacher(outputs, met, *read, folder / "work", folder / codec, recipe.models)


def _take(batches: Iterator[dict[str, torch.Tensor]], count: int) -> list[dict[str, torch.Tensor]]:
    return [next(batches) for _ in range(count)]


@contextlib.contextmanager
def ours_set_up(recipe: Recipe, folder: Path, codec: str | None = None) -> Iterator[tuple]:
    """Trainer and batches, as distil-student makes them; with `codec`, without the teacher."""
    from flagscale.checkpoint import load_weights
    from flagscale.megatron import platform
    from flagscale.megatron.arguments import training_arguments, with_teacher
    from flagscale.megatron.global_vars import use_args
    from flagscale.megatron.performance import resolved
    from flagscale.megatron.shape import ModelShape
    from flagscale.train.rank_batches import RankBatches
    from flagscale.train.setup import build_model_chunks, setup_training

    shape = ModelShape.load(folder / "student")
    training = resolved(recipe.training, shape, distilled=True)
    args = training_arguments(shape, recipe.data.seq_length, training)
    outputs = None if codec is None else folder / codec
    args = with_teacher(args, folder / "teacher", recipe.distillation, outputs)
    with platform.runtime(training.seed, training.parallelism), use_args(args):
        chunks = build_model_chunks(args)
        load_weights(chunks, folder / "student" / "weights")
        platform.keep_heap()
        trainer = setup_training(chunks, args, training)
        for chunk in trainer.chunks:
            chunk.train()
        cache = folder / "index"
        cache.mkdir(exist_ok=True)
        yield trainer, RankBatches(folder / "dataset", cache, args, training).train(0)


def ours(recipe: Recipe, folder: Path, codec: str | None = None) -> Iterator[float]:
    """The product's own step."""
    from flagscale.train.loop import train_step

    with ours_set_up(recipe, folder, codec) as (trainer, batches):
        while True:
            yield train_step(trainer, batches)["logits distillation loss"]


if __name__ == "__main__":
    main()
