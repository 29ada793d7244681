"""How close students are to their teacher on held-out text: sums document by document.

Every figure is a ratio of sums over any set of documents: that is what the bootstrap
(flagscale/evaluation/bootstrap.py) resamples, and what two evaluations of the same documents are
compared by (flagscale/evaluation/compare.py). Without torch: whoever compares runs no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What every measurement has; models are compared and ranked by these.
FIGURES = ("lm_loss", "kl", "top1_agreement", "accuracy")
# What an evaluation has beside them.
MORE_FIGURES = ("reverse_kl", "js_divergence", "top5_agreement")
ALL_FIGURES = (*FIGURES, *MORE_FIGURES)
TEACHER = "teacher"


@dataclass(frozen=True)
class Fidelity:
    """Sums over the predicted tokens of each document.

    Attributes:
        documents: `sha256:<hex>` of each document's tokens.
        tokens_d: predicted tokens of each document (int64).
        sums: model -> figure (all of `FIGURES`, perhaps `MORE_FIGURES`) -> sum per document
            (float64). Losses and divergences are in nats, agreement and accuracy counts of tokens.
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
            model: {f: np.array([row[model][f] for row in rows]) for f in _measured(rows, model)}
            for model in models
        },
    )


def _measured(rows: Sequence[Mapping[str, Any]], model: str) -> list[str]:
    return [f for f in ALL_FIGURES if f in FIGURES or f in rows[0][model]]


def document_hash(document: np.ndarray) -> str:
    """`sha256:<hex>` of its tokens."""
    return f"sha256:{hashlib.sha256(document.astype('<i8').tobytes()).hexdigest()}"
