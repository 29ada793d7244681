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


def models(recipe: Recipe, folder: Path) -> tuple:
    """Student and teacher as transformers' models, and the batches' tokens [1, s + 1] of a step."""
    from transformers import AutoModelForCausalLM

    from flagscale.models.source import weights_folder

    kept = json.loads((folder / "student/manifest.json").read_text())["facts"]["keep_layers"]
    with weights_folder(recipe.teacher.source, recipe.teacher.revision) as source:
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2)
        )
    layers = [student.model.layers[number] for number in kept]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    student.model.layers = torch.nn.ModuleList(layers)
    student.config.num_hidden_layers = len(layers)
    tokens = torch.load(folder / "tokens.pt", weights_only=True)
    return student.train(), teacher.eval().requires_grad_(False), tokens


def transformers(recipe: Recipe, folder: Path) -> Iterator[float]:
    """The loop that one writes by hand."""
    student, teacher, tokens = models(recipe, folder)
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.training.lr, fused=True)
    for row in tokens:
        inputs = row[None, :-1]
        with torch.no_grad():
            target = teacher(inputs, use_cache=False).logits.log_softmax(-1)
        predicted = student(inputs, use_cache=False).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(
            predicted[0], target[0], log_target=True, reduction="batchmean"
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def trl(recipe: Recipe, folder: Path) -> Iterator[float]:
    """TRL's trainer, off-policy, with forward KL (beta 0); a thread of its own, which it blocks."""
    import queue
    import threading

    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokens = models(recipe, folder)
    go: queue.Queue[None] = queue.Queue()
    done: queue.Queue[float] = queue.Queue()

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            go.get()

        def on_step_end(self, *_: object, **__: object) -> None:
            done.put(last[0])

    last = [0.0]

    class Trainer(GKDTrainer):
        def compute_loss(self, *args: object, **kwargs: object) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            last[0] = loss.item()
            return loss

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        # It predicts within a row: one token more, whose own prediction is not looked at.
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}

    settings = GKDConfig(
        output_dir=str(folder / "trl"),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        learning_rate=recipe.training.lr,
        per_device_train_batch_size=recipe.training.micro_batch_size,
        max_steps=len(tokens),
        warmup_steps=recipe.training.lr_warmup_iters,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=student,
        teacher_model=teacher,
        args=settings,
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(folder / "teacher/hf"),
        callbacks=[InTurn()],
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )
    threading.Thread(target=trainer.train, daemon=True).start()
    while True:
        go.put(None)
        yield done.get()


def products(recipe: Recipe, folder: Path) -> Iterator[float]:
    """Of the teacher's forward pass, and of the student's forward and backward: nothing else."""
    student, teacher, tokens = models(recipe, folder)
    rows = tokens.shape[1] - 1

    def shapes(model: torch.nn.Module) -> list[torch.Size]:
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        return [m.weight for m in linear]

    inputs = {width: torch.randn(rows, width) for width in _widths(student) | _widths(teacher)}
    config = teacher.config
    heads, width = config.num_attention_heads, config.head_dim
    queries_hnd = torch.randn(heads, rows, width)
    keys_hnd = torch.randn(heads, rows // 2, width)  # on average as many as causality leaves
    scores_hnn = torch.randn(heads, rows, rows // 2)
    layers = teacher.config.num_hidden_layers + student.config.num_hidden_layers
    while True:
        for _ in range(layers):
            queries_hnd @ keys_hnd.mT
            scores_hnn @ keys_hnd
        for _ in range(student.config.num_hidden_layers):  # gradients: of scores and of all three
            queries_hnd @ keys_hnd.mT
            scores_hnn @ keys_hnd
            scores_hnn.mT @ queries_hnd
            scores_hnn.mT @ queries_hnd
        for weight in shapes(teacher):
            inputs[weight.shape[1]] @ weight.T
        for weight in shapes(student):
            inputs[weight.shape[1]] @ weight.T
            # Of the first layer's inputs, and of tied embeddings' rows, no gradient is needed.
            gradient = inputs[weight.shape[0]]
            gradient @ weight
            gradient.T @ inputs[weight.shape[1]]
        yield 0.0


def _widths(model: torch.nn.Module) -> set[int]:
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return {size for m in linear for size in m.weight.shape}


if __name__ == "__main__":
    main()
