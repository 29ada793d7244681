"""Whether a `teacher-outputs` artifact has an answer to all that a training will ask."""

from __future__ import annotations

from pathlib import Path

from flagscale.checkpoint.agreement import on_first_rank
from flagscale.data.numbered import NumberedSamples
from flagscale.errors import UserError
from flagscale.recipe import TrainingRecipe
from flagscale.teacher_outputs import TeacherOutputs

_TOLD = 5  # samples


def check_met(outputs: Path, dataset: Path, index: Path, training: TrainingRecipe) -> None:
    """Make sure that there is an answer to all that the training will ask. All ranks call it.

    Args:
        outputs: a `teacher-outputs` artifact.
        dataset: the `dataset` artifact.
        index: of its samples, built.
        training: says how many of them, and in which order.

    Raises:
        UserError: how many are missing, and of which split; on all ranks.
    """

    def check() -> None:
        reader = TeacherOutputs.open(outputs)
        batch, apart = training.global_batch_size, training.reset_attention_mask
        for split, steps, seed in (
            ("train", training.train_iters, {"seed": training.seed}),
            ("validation", training.eval_iters, {}),
        ):
            samples = NumberedSamples(dataset, index, split, apart).first(steps * batch, **seed)
            if missing := reader.missing(split, samples):
                raise UserError(
                    f"{outputs}: {len(missing)} of the {len(samples)} samples of {split} that this "
                    f"training meets are missing (the first: {missing[:_TOLD]}); make them with "
                    "cache-teacher for its seed, train_iters, eval_iters and global_batch_size, "
                    "or with teacher_outputs.samples=all"
                )

    on_first_rank(outputs, "cannot be read", check)
