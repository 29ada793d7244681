"""How often the intervals hold the truth, by simulation: the table of docs/evaluation.md.

    python benchmarks/coverage.py --cases 2000

Documents are drawn from a population whose figures are known, an interval is computed of them as
an evaluation does, and it is counted how often it holds the population's figure. Plain percentiles
are counted beside the expanded ones that evaluations use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np

from flagscale.evaluation import bootstrap
from flagscale.evaluation.bootstrap import Estimate

CONFIDENCE = 0.95
Draw = Callable[[np.random.Generator, int], list[np.ndarray]]


def mean(generator: np.random.Generator, documents: int) -> list[np.ndarray]:
    """KL of documents as evaluations cut them, 60 to 128 tokens; 0.5 nats a token."""
    return _kl(generator, generator.integers(60, 129, documents))


def uneven(generator: np.random.Generator, documents: int) -> list[np.ndarray]:
    """The same of whole documents, whose lengths differ by a factor of 25 (log-normal)."""
    lengths = generator.lognormal(5, 0.8, documents)
    return _kl(generator, np.clip(lengths.round(), 10, 2000))


def _kl(generator: np.random.Generator, tokens_d: np.ndarray) -> list[np.ndarray]:
    hard_d = generator.gamma(8, 1 / 8, len(tokens_d))
    noise_d = generator.normal(0, 0.3, len(tokens_d)) * np.sqrt(tokens_d)
    return [0.5 * tokens_d * hard_d + noise_d, tokens_d]


def difference(generator: np.random.Generator, documents: int) -> list[np.ndarray]:
    """Paired: two students on documents that are hard for both; 0.1 nats a token apart."""
    tokens_d = generator.integers(60, 129, documents)
    hard_d = generator.gamma(8, 1 / 8, documents)
    own_d = generator.normal(0.1, 0.2, documents)
    return [tokens_d * (0.5 * hard_d + own_d) - tokens_d * 0.5 * hard_d, tokens_d]


def share(generator: np.random.Generator, examples: int) -> list[np.ndarray]:
    """What a student keeps of its teacher's accuracy on a task: 0.6 of 0.8."""
    hard_e = generator.random(examples)
    luck_e = generator.random(examples) < 0.1  # both answer some examples apart
    teacher_e = np.where(luck_e, generator.random(examples), hard_e) < 0.8
    return [(hard_e < 0.6).astype(float), teacher_e.astype(float)]


CASES: dict[str, tuple[Draw, float]] = {
    "mean": (mean, 0.5),
    "mean, uneven documents": (uneven, 0.5),
    "paired difference": (difference, 0.1),
    "share of the teacher": (share, 0.75),
}


def coverage(
    draw: Draw, truth: float, documents: int, cases: int, samples: int
) -> tuple[float, float]:
    """Share of cases whose interval holds the truth: plain percentiles, expanded ones."""
    generator = np.random.default_rng(0)
    tail = (1 - CONFIDENCE) / 2
    hits = np.zeros(2)
    for case in range(cases):
        upper, lower = bootstrap.totals(draw(generator, documents), samples, seed=case)
        ratio: Estimate = upper / lower
        expanded = ratio.interval(CONFIDENCE)
        low, high = np.quantile(ratio.resamples_r, (tail, 1 - tail))
        hits += (low <= truth <= high, expanded.low <= truth <= expanded.high)
    plain, wider = (hits / cases).tolist()
    return plain, wider


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--documents", type=int, nargs="+", default=[12, 30, 57, 200])
    options = parser.parse_args()
    sys.stdout.write("| figure | documents | percentiles | expanded |\n|---|---:|---:|---:|\n")
    for name, (draw, truth) in CASES.items():
        for documents in options.documents:
            found = coverage(draw, truth, documents, options.cases, options.samples)
            cells = " | ".join(f"{100 * one:.1f}%" for one in found)
            sys.stdout.write(f"| {name} | {documents} | {cells} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
