"""What others take for a step of `training_step.py`, and what its matrix products alone take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from flagscale.recipe import Recipe


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
