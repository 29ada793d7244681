"""Measures how close students are to their teacher on held-out text.

`measure` gives sums per document (flagscale/evaluation/fidelity.py). One model is measured at a
time, the teacher first (flagscale/evaluation/measure/teacher.py). Its and the student's logits are
computed some hundred tokens at a time: no more of them is ever held.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from flagscale.errors import UserError
from flagscale.evaluation.fidelity import ALL_FIGURES, FIGURES, TEACHER
from flagscale.evaluation.measure.teacher import KeptTeacher, OutputLayer
from flagscale.evaluation.measure.token_closeness import DETAILS, token_closeness
from flagscale.evaluation.measure.token_figures import token_figures
from flagscale.evaluation.measure.windows import Batch, Window
from flagscale.models.token_progress import TokenProgress

# Logits of one model: 32 MiB in fp32, 128 MiB in bf16. Fewer rows would read the output layer's
# weights more often than they multiply with them.
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}

_KL = ALL_FIGURES.index("kl")


class Model(Protocol):
    """A model in two halves."""

    @property
    def output_layer(self) -> OutputLayer | None:
        """None on ranks that do not have it."""

    def hidden_states(self, tokens_bs: torch.Tensor, /) -> torch.Tensor | None:
        """Causal: [b, s, h] for int64, right-padded [b, s]; None where there is no layer."""


def keep(teacher: Model, kept: KeptTeacher, batches: Sequence[Batch]) -> None:
    """Run the teacher, and keep what it predicts for `measure`. All ranks call it.

    Args:
        teacher: whose output layer is kept.
        kept: where to.
        batches: the text.
    """
    progress = TokenProgress(TEACHER, _tokens(batches))
    with torch.inference_mode():
        for index, batch in enumerate(batches):
            hidden_bsh = teacher.hidden_states(batch.inputs_bs)
            if hidden_bsh is not None and teacher.output_layer is not None:
                kept.keep(index, batch.unpadded(hidden_bsh), teacher.output_layer)
            progress.advance(sum(batch.lengths))


def measure(
    name: str, student: Model, teacher: KeptTeacher, batches: Sequence[Batch], documents: int
) -> np.ndarray:
    """Compare a student with its teacher. All ranks call it.

    Args:
        name: of the student, for the log.
        student: with the teacher's vocabulary.
        teacher: what is kept of it, of the same batches.
        batches: the text.
        documents: how many.

    Returns:
        Sums of `FIGURES` per document (float64 [2, 4, documents]), the teacher's and the student's.
        The KL is the forward one, KL(teacher || student), over the full vocabulary at temperature
        1. All 0 on ranks that do not have the output layer.

    Raises:
        UserError: a model's logits are not finite.
    """
    sums_mfd = np.zeros((2, len(FIGURES), documents))
    for batch, figures_mfn in _figures(name, student, teacher, batches, token_figures):
        _add(sums_mfd, batch, figures_mfn, name)
    return sums_mfd


def measure_closely(
    name: str, student: Model, teacher: KeptTeacher, batches: Sequence[Batch], documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `measure`, with all that a report says of single tokens. All ranks call it.

    Returns:
        Sums of `ALL_FIGURES` per document (float64 [2, 7, documents]); and of each predicted token,
        document after document, the KL and then `DETAILS` (float64 [6, tokens]). All 0 on ranks
        that do not have the output layer.

    Raises:
        UserError: a model's logits are not finite.
    """
    first_d = _first_tokens(batches, documents)
    sums_mfd = np.zeros((2, len(ALL_FIGURES), documents))
    tokens_kn = np.zeros((1 + len(DETAILS), first_d[-1]))
    for batch, closeness in _figures(name, student, teacher, batches, token_closeness):
        figures_mfn = closeness[: 2 * len(ALL_FIGURES)].reshape(2, len(ALL_FIGURES), -1)
        _add(sums_mfd, batch, figures_mfn, name)
        rows_kn = np.concatenate([figures_mfn[1, [_KL]], closeness[2 * len(ALL_FIGURES) :]])
        for window, part in _windows(batch):
            start = first_d[window.document] + window.start
            tokens_kn[:, start : start + window.length] = rows_kn[:, part]
    return sums_mfd, tokens_kn


def _figures(
    name: str,
    student: Model,
    teacher: KeptTeacher,
    batches: Sequence[Batch],
    compare: Callable[..., torch.Tensor],
) -> Iterator[tuple[Batch, np.ndarray]]:
    """What `compare` says of the tokens of each batch, float64 [..., n].

    Nothing comes on ranks that do not have the output layer.
    """
    progress = TokenProgress(name, _tokens(batches))
    for index, batch in enumerate(batches):
        found = _batch_figures(student, teacher, index, batch, compare)
        if found is not None:
            yield batch, found
        progress.advance(sum(batch.lengths))


@torch.inference_mode()
def _batch_figures(
    student: Model,
    teacher: KeptTeacher,
    index: int,
    batch: Batch,
    compare: Callable[..., torch.Tensor],
) -> np.ndarray | None:
    hidden_bsh = student.hidden_states(batch.inputs_bs)
    if hidden_bsh is None or student.output_layer is None:
        return None
    hidden_nh = batch.unpadded(hidden_bsh)
    found = _compared(
        teacher.kept(index, hidden_nh.device),
        (student.output_layer, hidden_nh),
        batch.labels_n.to(hidden_nh.device),
        compare,
    )
    return found.cpu().numpy()


def _compared(
    teacher: tuple[OutputLayer, torch.Tensor],
    student: tuple[OutputLayer, torch.Tensor],
    labels_n: torch.Tensor,
    compare: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """`compare` of output layers and hidden states [n, h], some hundred tokens at a time."""
    (teacher_layer, teacher_nh), (student_layer, student_nh) = teacher, student
    rows = max(1, _CHUNK_ELEMENTS[teacher_nh.device.type] // teacher_layer.size)
    found = []
    for teacher_rh, student_rh, labels_r in zip(
        *(x.split(rows) for x in (teacher_nh, student_nh, labels_n)), strict=True
    ):
        found.append(
            compare(
                teacher_layer(teacher_rh),
                student_layer(student_rh),
                labels_r,
                teacher_layer.first_token,
                teacher_layer.group,
            )
        )
    return torch.cat(found, dim=-1)


def _add(sums_mfd: np.ndarray, batch: Batch, figures_mfn: np.ndarray, name: str) -> None:
    """Add the figures of a batch's tokens to the sums of its documents."""
    for model, figures_fn in zip((TEACHER, name), figures_mfn, strict=True):
        if not np.isfinite(figures_fn).all():
            raise UserError(
                f"the {model} model's logits are not finite on the test split: its training "
                "diverged (a lower training.lr may help) or its weights are broken"
            )
    for window, part in _windows(batch):
        sums_mfd[..., window.document] += figures_mfn[..., part].sum(axis=-1)


def _windows(batch: Batch) -> Iterator[tuple[Window, slice]]:
    """Each window, and where its tokens are among the batch's."""
    borders = np.cumsum([0, *batch.lengths])
    for window, (start, end) in zip(batch, itertools.pairwise(borders), strict=True):
        yield window, slice(start, end)


def _first_tokens(batches: Sequence[Batch], documents: int) -> np.ndarray:
    """Where each document's predicted tokens begin, and the end of the last."""
    tokens_d = np.zeros(documents, dtype=np.int64)
    for batch in batches:
        for window in batch:
            tokens_d[window.document] += window.length
    return np.concatenate([[0], np.cumsum(tokens_d)])


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(sum(batch.lengths) for batch in batches)
