"""How close students are to their teacher on held-out text, document by document.

`measure` gives sums per document, so that every figure is a ratio of sums over any set of
documents: that is what the bootstrap (flagscale/evaluation/bootstrap.py) resamples, and what two
evaluations of the same documents are compared by (flagscale/evaluation/compare.py).

One model is measured at a time, the teacher first (flagscale/evaluation/teacher.py). Its and the
student's logits are computed some hundred tokens at a time: no more of them is ever held.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from flagscale.errors import UserError
from flagscale.evaluation.teacher import KeptTeacher, OutputLayer
from flagscale.evaluation.token_figures import FIGURES, token_figures
from flagscale.evaluation.windows import Batch

logger = logging.getLogger(__name__)

TEACHER = "teacher"

_PROGRESS_SECONDS = 5.0
# Logits of one model: 32 MiB in fp32, 128 MiB in bf16. Fewer rows would read the output layer's
# weights more often than they multiply with them.
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


class Model(Protocol):
    """A model in two halves."""

    @property
    def output_layer(self) -> OutputLayer | None:
        """None on ranks that do not have it."""

    def hidden_states(self, tokens_bs: torch.Tensor, /) -> torch.Tensor | None:
        """Causal: [b, s, h] for int64, right-padded [b, s]; None where there is no layer."""


@dataclass(frozen=True)
class Fidelity:
    """Sums over the predicted tokens of each document.

    Attributes:
        documents: `sha256:<hex>` of each document's tokens.
        tokens_d: predicted tokens of each document (int64).
        sums: model -> figure (one of `FIGURES`) -> sum per document (float64). Losses and the KL
            are in nats, agreement and accuracy are counts of tokens.
    """

    documents: tuple[str, ...]
    tokens_d: np.ndarray
    sums: dict[str, dict[str, np.ndarray]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One JSON value a document, as `read_rows` takes them."""
        for d, document in enumerate(self.documents):
            models = {
                model: {figure: float(sums_d[d]) for figure, sums_d in figures.items()}
                for model, figures in self.sums.items()
            }
            yield {"document": document, "tokens": int(self.tokens_d[d]), **models}


def read_rows(rows: Sequence[Mapping[str, Any]]) -> Fidelity:
    """The inverse of `Fidelity.rows`."""
    models = [name for name in rows[0] if name not in ("document", "tokens")]
    return Fidelity(
        documents=tuple(row["document"] for row in rows),
        tokens_d=np.array([row["tokens"] for row in rows], dtype=np.int64),
        sums={
            model: {f: np.array([row[model][f] for row in rows]) for f in FIGURES}
            for model in models
        },
    )


def measure(
    name: str, model: Model, teacher: KeptTeacher, batches: Sequence[Batch], documents: int
) -> np.ndarray:
    """Compare a model with its teacher; or the teacher with itself, which keeps it for the others.

    All ranks call it.

    Args:
        name: of the model; `teacher` is the teacher.
        model: with the teacher's vocabulary.
        teacher: what is kept, with all batches where the model is not the teacher.
        batches: the text.
        documents: how many.

    Returns:
        Sums of `FIGURES` per document (float64 [4, documents]), the KL the forward one,
        KL(teacher || model), over the full vocabulary at temperature 1. 0 on ranks that do not have
        the output layer.

    Raises:
        UserError: the model's logits are not finite.
    """
    sums_fd = np.zeros((len(FIGURES), documents))
    progress = _Progress(name, sum(sum(batch.lengths) for batch in batches))
    with torch.inference_mode():
        for index, batch in enumerate(batches):
            hidden_bsh = model.hidden_states(batch.inputs_bs)
            if hidden_bsh is not None and model.output_layer is not None:
                hidden_nh = batch.unpadded(hidden_bsh)
                if name == TEACHER:
                    teacher.keep(index, hidden_nh, model.output_layer)
                    reference = model.output_layer, hidden_nh
                else:
                    reference = teacher.kept(index, hidden_nh.device)
                labels_n = batch.labels_n.to(hidden_nh.device)
                figures_fn = _figures(reference, (model.output_layer, hidden_nh), labels_n)
                _add(sums_fd, batch, figures_fn.cpu().numpy(), name)
            progress.advance(sum(batch.lengths))
    return sums_fd


def document_hash(document: np.ndarray) -> str:
    """`sha256:<hex>` of its tokens."""
    return f"sha256:{hashlib.sha256(document.astype('<i8').tobytes()).hexdigest()}"


def _figures(
    teacher: tuple[OutputLayer, torch.Tensor],
    student: tuple[OutputLayer, torch.Tensor],
    labels_n: torch.Tensor,
) -> torch.Tensor:
    """`FIGURES` of n tokens, [4, n], from output layers and hidden states [n, h]."""
    (teacher_layer, teacher_nh), (student_layer, student_nh) = teacher, student
    rows = max(1, _CHUNK_ELEMENTS[teacher_nh.device.type] // teacher_layer.size)
    found = []
    for teacher_rh, student_rh, labels_r in zip(
        *(x.split(rows) for x in (teacher_nh, student_nh, labels_n)), strict=True
    ):
        teacher_rv = teacher_layer(teacher_rh)
        # The teacher against itself is one and the same.
        student_rv = teacher_rv if student_layer is teacher_layer else student_layer(student_rh)
        found.append(
            token_figures(
                teacher_rv, student_rv, labels_r, teacher_layer.first_token, teacher_layer.group
            )
        )
    return torch.cat(found, dim=1)


def _add(sums_fd: np.ndarray, batch: Batch, figures_fn: np.ndarray, name: str) -> None:
    """Add the figures of a batch's tokens to the sums of its documents."""
    if not np.isfinite(figures_fn).all():
        raise UserError(
            f"the {name} model's logits are not finite on the test split: its training "
            "diverged (a lower training.lr may help) or its weights are broken"
        )
    borders = np.cumsum([0, *batch.lengths])
    for window, start, end in zip(batch, borders, borders[1:], strict=False):
        sums_fd[:, window.document] += figures_fn[:, start:end].sum(axis=1)


class _Progress:
    """A line every few seconds, with the time left."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._start = self._last = time.monotonic()

    def advance(self, tokens: int) -> None:
        self._done += tokens
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS and self._done < self._total:
            return
        self._last, spent = now, now - self._start
        left = spent * (self._total - self._done) / self._done
        logger.info(
            "%s model: measured %d of %d tokens (%.0f%%), %.0f tokens/s, %.0f s left",
            self._name,
            self._done,
            self._total,
            100 * self._done / self._total,
            self._done / max(spent, 1e-9),
            left,
        )
