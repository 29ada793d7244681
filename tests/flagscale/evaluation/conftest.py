"""An evaluation made of numbers, for what only shows or compares them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flagscale.artifacts import new_artifact, write_json
from flagscale.evaluation import METRICS, PER_DOCUMENT
from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.figures import summarise


def make_fidelity(kl_after: float = 2.0, documents: int = 12, **changes: float) -> Fidelity:
    """Documents of different lengths and difficulty; `changes`: teacher_loss, kl_before."""
    generator = np.random.default_rng(5)
    tokens_d = generator.integers(20, 90, documents)
    hard_d = generator.gamma(20, 1 / 20, documents)

    def sums(lm_loss: float, kl: float, agreement: float, accuracy: float) -> dict[str, np.ndarray]:
        means = {"lm_loss": lm_loss, "kl": kl}
        counts = {"top1_agreement": agreement, "accuracy": accuracy}
        return {name: tokens_d * hard_d * value for name, value in means.items()} | {
            name: np.floor(tokens_d * value) for name, value in counts.items()
        }

    kl_before = changes.get("kl_before", 10.0)
    return Fidelity(
        documents=tuple(f"sha256:{d}" for d in range(documents)),
        tokens_d=tokens_d,
        sums={
            "teacher": sums(changes.get("teacher_loss", 3.0), 0.0, 1.0, 0.5),
            "student": sums(14.0, kl_before, 0.0, 0.0),
            "distilled": sums(3 + kl_after, kl_after, 0.4, 0.3),
        },
    )


def write_evaluation(folder: Path, fidelity: Fidelity, seq_length: int = 32) -> Path:
    with new_artifact(folder, "evaluation", {}) as staging:
        metrics = summarise(fidelity, 500, 0.95, 0) | {"seq_length": seq_length}
        write_json(staging.path / METRICS, metrics)
        lines = [json.dumps(row) + "\n" for row in fidelity.rows()]
        (staging.path / PER_DOCUMENT).write_text("".join(lines))
    return folder


@pytest.fixture
def fidelity_of() -> Callable[..., Fidelity]:
    return make_fidelity


@pytest.fixture
def evaluation_of(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, seq_length: int = 32, **changes: float) -> Path:
        return write_evaluation(tmp_path / name, make_fidelity(**changes), seq_length)

    return write
