"""How often forecasts hold: over simulated curves, and over those of trainings that were run.

    python benchmarks/forecast.py [--cases 2000] [RUN ...]

A RUN is a folder with training.jsonl and validation.jsonl, or one that holds such folders. Prints
the Markdown tables of docs/forecast.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flagscale.evaluation.forecast.accounts import CONFIDENCE, KD_LOSS, accounts, curve_of
from flagscale.evaluation.forecast.learning_curve import DRIFT, DRIFT_FREEDOM, Curves

_STEPS = (60, 200, 1000)
_CUTS = (0.25, 0.5, 0.75)
_VALIDATIONS = 10
_SHORTEST = 20  # steps of a training that was run

Shape = Callable[[np.random.Generator, float, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Simulated:
    """Trainings whose losses are made up.

    Attributes:
        shape: logarithm of the loss by progress and rate; default: drawn from the priors.
        noise: of the single training losses.
    """

    shape: Shape | None = None
    noise: float = 0.15


def prior(
    generator: np.random.Generator, length: float, x_t: np.ndarray, h_t: np.ndarray
) -> np.ndarray:
    """A curve as `flagscale.evaluation.forecast.learning_curve` believes it."""
    curves = Curves(generator.standard_normal((1, Curves.PARAMETERS)), length)
    own = generator.standard_normal(len(x_t)) * curves.noise_k[0]
    log_loss: np.ndarray = curves.log_shape(x_t, h_t)[0] + own
    return log_loss


def exponentials(
    generator: np.random.Generator, length: float, x_t: np.ndarray, _h_t: np.ndarray
) -> np.ndarray:
    """A sum of two exponential decays and a floor: no power law."""
    fast, slow = generator.uniform(0.01, 0.1), generator.uniform(0.2, 1.0)
    shares = generator.dirichlet([1, 1, 1])
    loss = shares[0] + shares[1] * np.exp(-x_t / (fast * length))
    log_loss: np.ndarray = np.log(loss + shares[2] * np.exp(-x_t / (slow * length)))
    return log_loss


def annealed(
    generator: np.random.Generator, _length: float, x_t: np.ndarray, h_t: np.ndarray
) -> np.ndarray:
    """The law of arXiv 2408.11029: a power of the rates' sum, less what annealing gives."""
    power, decay = generator.uniform(0.2, 0.8), 0.99
    area, momentum, found = 0.0, 0.0, []
    for before, now in zip((0.0, *h_t[:-1]), h_t, strict=True):
        momentum = decay * momentum + max(0.0, before - now)
        area += momentum
        found.append(area)
    floor, gain = generator.uniform(0.1, 0.7), generator.uniform(0.0, 0.3)
    share = np.array(found) / max(1.0, 1 / (1 - decay))
    log_loss: np.ndarray = np.log(
        floor + (1 - floor) * (1 + x_t) ** -power - gain * floor * np.minimum(share, 1)
    )
    return log_loss


def coverage(simulated: Simulated, cases: int, seed: int = 0) -> float:
    """The share of intervals that hold the last validation's loss."""
    generator = np.random.default_rng(seed)
    held = [_case(simulated, generator) for _ in range(cases)]
    return float(np.mean(held))


def _case(simulated: Simulated, generator: np.random.Generator) -> bool:
    steps = int(generator.choice(_STEPS[:2] if simulated.shape is None else _STEPS))
    time_t = np.arange(steps + 1)
    warm = generator.integers(0, steps // 10)
    rise = np.minimum(1, time_t / (warm + 1))
    decays = 0.5 * (1 + np.cos(np.pi * time_t / steps)), 1 - time_t / steps, np.ones(steps + 1)
    h_t = rise * decays[generator.integers(3)]
    h_t[0] = 0.0
    x_t = np.cumsum(h_t)
    shape = simulated.shape or prior
    log_loss_t = generator.normal(0, 2) + shape(generator, float(x_t[-1]), x_t, h_t)
    cut = int(steps * generator.choice(_CUTS))
    if simulated.shape is None:  # with the error that a forecast believes to have
        doublings = math.log2((x_t[-1] + 1) / (x_t[cut] + 1))
        log_loss_t[-1] += DRIFT * doublings * generator.standard_t(DRIFT_FREEDOM)
    apart = generator.normal(0, 0.3)
    training = [
        {"step": t, KD_LOSS: float(np.exp(log_loss_t[t - 1] + apart + noise))}
        for t, noise in zip(
            range(1, steps + 1), generator.normal(0, simulated.noise, steps), strict=True
        )
    ]
    every = steps // _VALIDATIONS
    validation = [
        {"step": t, KD_LOSS: float(np.exp(log_loss_t[t]))} for t in range(0, steps + 1, every)
    ]
    forecast = curve_of(training, validation, h_t[1:], KD_LOSS, until=cut).forecast(
        steps, CONFIDENCE
    )
    return bool(forecast.low <= np.exp(log_loss_t[steps]) <= forecast.high)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--cases", type=int, default=2000)
    options = parser.parse_args()
    kinds = {
        "drawn from the priors": Simulated(),
        "sums of exponentials": Simulated(exponentials),
        "the law of arXiv 2408.11029": Simulated(annealed),
    }
    if options.cases:
        _row(("curves", "cases", "within the 90% interval"), head=True)
        for name, simulated in kinds.items():
            _row((name, f"{options.cases:,}", f"{coverage(simulated, options.cases):.1%}"))
    if options.runs:
        sys.stdout.write("\n")
        _real([folder for run in options.runs for folder in _logs(run)])


def _real(folders: Sequence[Path]) -> None:
    """Of each part of a training: how many intervals held, how wide, how far off the median."""
    rows: dict[float, list[tuple[bool, float, float]]] = {}
    seen: set[str] = set()
    for folder in folders:
        training, validation = (_rows(folder / name) for name in _NAMES)
        content = json.dumps(validation)
        whole = validation and validation[-1]["step"] == len(training)
        if content in seen or not whole or len(training) < _SHORTEST:
            continue  # kept twice, or a part of a training
        seen.add(content)
        for account in accounts(training, validation):
            one = account.forecast
            share = round(4 * one.made_at / one.step) / 4
            rows.setdefault(share, []).append(
                (account.holds, one.high / one.low, abs(math.log(account.came / one.value)))
            )
    _row(("made after", "trainings", "within", "high / low, median", "off, median"), head=True)
    for share, found in sorted(rows.items()):
        held, wide, off = zip(*found, strict=True)
        cells = (f"{np.mean(held):.0%}", f"{np.median(wide):.2f}", f"{np.median(off):.1%}")
        _row((f"{share:.0%} of the steps", str(len(found)), *cells))


_NAMES = ("training.jsonl", "validation.jsonl")


def _logs(run: Path) -> Iterator[Path]:
    for path in sorted(run.rglob(_NAMES[0])):
        if (path.parent / _NAMES[1]).exists():
            yield path.parent


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _row(cells: Sequence[str], head: bool = False) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    if head:
        sys.stdout.write(f"|{'---|' * len(cells)}\n")


if __name__ == "__main__":
    main()
