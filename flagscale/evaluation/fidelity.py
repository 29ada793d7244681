"""How close students are to their teacher on held-out text, document by document.

`measure` gives sums per document, so that every figure is a ratio of sums over any set of
documents: that is what the bootstrap (flagscale/evaluation/bootstrap.py) resamples, and what two
evaluations of the same documents are compared by (flagscale/evaluation/compare.py).

A document of n tokens, its end-of-document token included, is cut into windows of `seq_length`
inputs that do not overlap. The last input of a window predicts the first token of the next, so
each token but the document's first is predicted exactly once, and never across documents.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flagscale.errors import UserError

logger = logging.getLogger(__name__)

TEACHER = "teacher"
FIGURES = ("lm_loss", "kl", "top1_agreement", "accuracy")
LogitsFunction = Callable[[torch.Tensor], torch.Tensor]

_PROGRESS_SECONDS = 5.0
# Vocabulary-sized buffers stay in a core's cache on a CPU; a GPU wants large launches.
_CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


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


@dataclass(frozen=True)
class _Window:
    document: int
    tokens: np.ndarray  # inputs and, shifted by one, labels

    @property
    def length(self) -> int:
        return len(self.tokens) - 1


def measure(
    teacher: LogitsFunction,
    students: Mapping[str, LogitsFunction],
    documents: Sequence[np.ndarray],
    seq_length: int,
    micro_batch_size: int,
) -> Fidelity:
    """Compare students with their teacher on the same tokens.

    Args:
        teacher: tokens [b, s] (int64, right-padded) -> logits [b, s, V] (float32), causal.
        students: name -> such a function, with the same vocabulary.
        documents: token ids of each document, at least 2, the end-of-document token included.
        seq_length: tokens a window.
        micro_batch_size: windows a forward pass.

    Returns:
        Sums for `teacher` (compared with itself) and each student. The KL is the forward one,
        KL(teacher || student), over the full vocabulary at temperature 1.

    Raises:
        UserError: a model's logits are not finite.
    """
    windows = list(_windows(documents, seq_length))
    sums = {m: np.zeros((len(FIGURES), len(documents))) for m in (TEACHER, *students)}
    progress = _Progress(sum(window.length for window in windows))
    with torch.inference_mode():
        # Like lengths together waste no padding; the largest first, so that memory fails early.
        windows.sort(key=lambda window: -window.length)
        for start in range(0, len(windows), micro_batch_size):
            batch = windows[start : start + micro_batch_size]
            tokens_bs = _pad(batch)
            teacher_bsv = teacher(tokens_bs)
            _add(sums[TEACHER], batch, teacher_bsv, teacher_bsv, TEACHER)
            for name, student in students.items():
                _add(sums[name], batch, teacher_bsv, student(tokens_bs), name)
            progress.advance(sum(window.length for window in batch))
    return Fidelity(
        documents=tuple(_hash(document) for document in documents),
        tokens_d=np.array([len(document) - 1 for document in documents], dtype=np.int64),
        sums={name: dict(zip(FIGURES, values, strict=True)) for name, values in sums.items()},
    )


def _hash(document: np.ndarray) -> str:
    return f"sha256:{hashlib.sha256(document.astype('<i8').tobytes()).hexdigest()}"


def _windows(documents: Sequence[np.ndarray], seq_length: int) -> Iterator[_Window]:
    for index, document in enumerate(documents):
        for start in range(0, len(document) - 1, seq_length):
            yield _Window(index, document[start : start + seq_length + 1].astype(np.int64))


def _pad(batch: Sequence[_Window]) -> torch.Tensor:
    """Inputs [b, s], right-padded: causal models do not see what comes after."""
    tokens_bs = torch.zeros(len(batch), max(window.length for window in batch), dtype=torch.int64)
    for row, window in enumerate(batch):
        tokens_bs[row, : window.length] = torch.from_numpy(window.tokens[:-1])
    return tokens_bs


def _add(
    sums_fd: np.ndarray,
    batch: Sequence[_Window],
    teacher_bsv: torch.Tensor,
    student_bsv: torch.Tensor,
    name: str,
) -> None:
    """Add the figures of a batch to the sums of its documents; padding is never read."""
    for teacher_sv, student_sv, window in zip(teacher_bsv, student_bsv, batch, strict=True):
        n = window.length
        labels_n = torch.from_numpy(window.tokens[1:]).to(teacher_sv.device)
        figures_f = compare_rows(teacher_sv[:n], student_sv[:n], labels_n).cpu().numpy()
        if not np.isfinite(figures_f).all():
            raise UserError(
                f"the {name} model's logits are not finite on the test split: its training "
                "diverged (a lower training.lr may help) or its weights are broken"
            )
        sums_fd[:, window.document] += figures_f


def compare_rows(
    teacher_nv: torch.Tensor, student_nv: torch.Tensor, labels_n: torch.Tensor
) -> torch.Tensor:
    """Sums over n rows of `FIGURES`, float64 [4].

    With logits shifted by their maximum, KL = sum(p_t * (z_t - z_s)) - lse_t + lse_s. Only the
    elementwise work is in float32: the sums and their logarithms are in float64, because rounded
    logsumexps would drown a small KL. Relative error: 1e-9 at a KL of 3, 1e-5 at 3e-6.
    """
    rows = max(1, _CHUNK_ELEMENTS[teacher_nv.device.type] // teacher_nv.shape[-1])
    totals_f = torch.zeros(len(FIGURES), dtype=torch.float64, device=teacher_nv.device)
    chunks = (x.split(rows) for x in (teacher_nv, student_nv, labels_n))
    for teacher_rv, student_rv, labels_r in zip(*chunks, strict=True):
        top_t, guess_t_r = teacher_rv.max(dim=-1, keepdim=True)
        top_s, guess_s_r = student_rv.max(dim=-1, keepdim=True)
        z_t, z_s = teacher_rv - top_t, student_rv - top_s
        label_z_r = z_s.gather(-1, labels_r[:, None]).squeeze(-1).double()
        difference_rv = z_t - z_s
        p_t = z_t.exp_()
        mass_t = p_t.sum(dim=-1, dtype=torch.float64)
        log_mass_s = z_s.exp_().sum(dim=-1, dtype=torch.float64).log()
        expected = p_t.mul_(difference_rv).sum(dim=-1, dtype=torch.float64) / mass_t
        figures = (
            log_mass_s - label_z_r,
            expected - mass_t.log() + log_mass_s,
            (guess_t_r == guess_s_r).double(),
            (guess_s_r.squeeze(-1) == labels_r).double(),
        )
        totals_f += torch.stack([figure.sum() for figure in figures])
    return totals_f


class _Progress:
    """A line every few seconds, with the time left."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._start = self._last = time.monotonic()

    def advance(self, tokens: int) -> None:
        self._done += tokens
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS and self._done < self._total:
            return
        self._last, spent = now, now - self._start
        left = spent * (self._total - self._done) / self._done
        logger.info(
            "measured %d of %d tokens (%.0f%%), %.0f tokens/s, %.0f s left",
            self._done,
            self._total,
            100 * self._done / self._total,
            self._done / max(spent, 1e-9),
            left,
        )
