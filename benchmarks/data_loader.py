"""The loader: how fast batches are made, and how long a training step waits for them.

    python benchmarks/data_loader.py --seq-length 1024 --micro-batch 4

Each case runs in a fresh process on a corpus of random tokens. The floor reads as many tokens from
the mapped file at random places and stacks them: no loader can do with less. The wait is what a
step that computes for a while on other threads sees of it, with batches made ahead, and without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flagscale.artifacts import new_artifact
from flagscale.data.counts import add_up
from flagscale.data.encoder import EncodedDocument
from flagscale.data.loader import Batches, BatchShape, prepare_index
from flagscale.data.mixture import weights_of
from flagscale.data.rows import BadRows
from flagscale.data.samples import Index
from flagscale.data.sources import Document
from flagscale.data.writer import Corpus, write_splits

CASES = ("floor", "text", "text, documents apart", "conversations", "blend", "blend, apart")
SEED = 1
EOD = 0


class RandomTokens:
    """Documents of random tokens and lengths; in conversations, the second half is learnt."""

    def __init__(self, kind: str) -> None:
        self.vocab_size = 49152
        self.dtype = np.uint16
        self._kind = kind

    def __call__(self, documents: list[Document]) -> list[EncodedDocument]:
        """Encode; the last of every fifty is held out."""
        found = []
        for document in documents:
            number = int(document.text)
            random = np.random.default_rng(number)
            ids = random.integers(1, self.vocab_size, int(random.integers(20, 1500)), self.dtype)
            ids[-1] = EOD
            mask = (np.arange(len(ids)) > len(ids) // 2).astype(np.uint8)
            split = {48: "validation", 49: "test"}.get(number % 50, "train")
            found.append(
                EncodedDocument(split, number, 0, ids, mask if self._kind == "chat" else None)
            )
        return found


def write(folder: Path, kinds: dict[str, str], documents: int, seq_length: int) -> None:
    """A dataset with corpora of these names and kinds."""
    numbers = [Document(str(i), "random") for i in range(documents)]
    corpora = [
        Corpus(name, kind, numbers, RandomTokens(kind), BadRows()) for name, kind in kinds.items()
    ]
    with new_artifact(folder, "dataset", {}) as staging:
        counts = write_splits(corpora, staging.path)
        described = [
            {"name": c.name, "kind": c.kind, "weight": 1.0 + i, "splits": add_up([found])}
            for i, (c, found) in enumerate(zip(corpora, counts, strict=True))
        ]
        staging.facts = {
            "corpora": described,
            "splits": add_up(counts),
            "eod_id": EOD,
            "bos_id": None,
            "vocab_size": 49152,
            "seq_length": seq_length,
        }


def floor(file: Path, seq_length: int, micro_batch: int) -> Iterator[dict[str, Any]]:
    """Random stretches of a mapped file."""
    tokens = np.memmap(file, np.uint16, "r")
    random = np.random.default_rng(SEED)
    while True:
        starts = random.integers(0, len(tokens) - seq_length, micro_batch)
        rows = np.stack([tokens[start : start + seq_length + 1] for start in starts])
        yield {"tokens": torch.from_numpy(rows.astype(np.int64))}


def batches(case: str, folder: Path, seq_length: int, micro_batch: int) -> Any:  # noqa: ANN401
    """The iterator of a case, or for the loader its `Batches`."""
    if case == "floor":
        return floor(folder / "text" / "train-text.bin", seq_length, micro_batch)
    name, _, apart = case.partition(", ")
    dataset = folder / name
    index = Index(dataset, folder / "cache", "train")
    parts = index.open(bool(apart))
    shape = BatchShape(micro_batch, micro_batch)
    return Batches(parts, weights_of(index, parts), shape, SEED, iter(int, 1), bool(apart), "train")


def measure(case: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a micro-batch takes to make, and those a busy step waits for one (medians)."""
    made = batches(case, folder, options.seq_length, options.micro_batch)
    direct = made if case == "floor" else made._make()
    result = {"make": _median(direct, options.repeat, lambda: None)}
    weights = torch.randn(options.width, options.width)

    def compute() -> None:
        for _ in range(options.products):
            weights @ weights

    start = time.perf_counter()
    compute()
    compute()
    result["step"] = 500 * (time.perf_counter() - start)
    result["without"] = _median(direct, options.repeat, compute)
    if case != "floor":
        result["ahead"] = _median(iter(made), options.repeat, compute)
    return result


def _median(source: Iterator[Any], repeat: int, compute: Any) -> float:  # noqa: ANN401
    for _ in range(10):
        next(source)
    waits = []
    for _ in range(repeat):
        start = time.perf_counter()
        next(source)
        waits.append(1000 * (time.perf_counter() - start))
        compute()
    return statistics.median(waits)


def main() -> None:
    """Measure all cases and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-length", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--micro-batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--documents", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of the step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="matrices (default: %(default)s)")
    parser.add_argument("--products", type=int, default=10, help="a step (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(options.case, options.folder, options)))
        return
    with tempfile.TemporaryDirectory(prefix="flagscale-loader-") as place:
        folder = Path(place)
        for name, kinds in {
            "text": {"text": "text"},
            "conversations": {"chat": "chat"},
            "blend": {"text": "text", "chat": "chat"},
        }.items():
            write(folder / name, kinds, options.documents, options.seq_length)
            prepare_index(folder / name, folder / "cache")
        _report(folder, options)


def _report(folder: Path, options: argparse.Namespace) -> None:
    tokens = options.micro_batch * options.seq_length
    print(f"{options.micro_batch} x {options.seq_length} tokens, {options.threads} threads\n")
    print("| batches of | made in | tokens/s | a step waits, made when asked | made ahead |")
    print("|---|---:|---:|---:|---:|")
    steps = []
    for case in CASES:
        command = [sys.executable, *sys.argv, "--case", case, "--folder", str(folder)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
        found = json.loads(output.splitlines()[-1])
        steps.append(found["step"])
        rate = tokens / found["make"] / 1000
        waits = [f"{found[k]:.3f} ms" if k in found else "-" for k in ("without", "ahead")]
        print(f"| {case} | {found['make']:.3f} ms | {rate:.1f} M | {' | '.join(waits)} |")
    print(f"\nThe step computes for {statistics.median(steps):.0f} ms.")


if __name__ == "__main__":
    main()
