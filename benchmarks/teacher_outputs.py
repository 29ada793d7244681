"""Teacher outputs: what each codec takes of the disk, and of a processor to make and to read.

    python benchmarks/teacher_outputs.py --vocabulary 49152 --hidden-size 576

The floor writes and reads as many bytes as `hidden` in bf16 has, and does nothing else. Logits fall
off as language does: a token's probability is 1 by its rank to the power of `--slope`. Times are
the processor's, of one thread, the shortest of some repetitions: other processes disturb them less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flagscale.artifacts import new_artifact
from flagscale.teacher_outputs import (
    KIND,
    OutputsFacts,
    OutputsWriter,
    SparseTargets,
    TeacherOutputs,
    codec_of,
)

MICRO_BATCH = 4


def codecs(options: argparse.Namespace) -> list[dict]:
    """Those to measure."""
    return [
        {"name": "hidden", "dtype": "bf16", "hidden_size": options.hidden_size},
        {"name": "hidden", "dtype": "fp32", "hidden_size": options.hidden_size},
        {"name": "sampled", "temperature": 1.0, "draws": options.draws, "seed": 0},
        {"name": "topk", "temperature": 1.0, "top_k": options.top_k},
    ]


def answers(codec: dict, options: argparse.Namespace) -> torch.Tensor:
    """Of one sample."""
    if codec["name"] == "hidden":
        return torch.randn(1, options.seq_length, options.hidden_size)
    ranks = torch.arange(1, options.vocabulary + 1)
    logits_v = -options.slope * ranks.float().log()
    rows = [logits_v[torch.randperm(options.vocabulary)] for _ in range(options.seq_length)]
    return torch.stack(rows)[None]


def shortest(work: Callable[[], object], repeat: int) -> float:
    """Seconds of the processor."""
    found = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def measure(codec: dict, folder: Path, options: argparse.Namespace) -> str:
    """A row of the table."""
    facts = OutputsFacts(codec, "", "", None, options.seq_length, False, "fp32", options.vocabulary)
    made, answer = codec_of(facts), answers(codec, options)
    encode = shortest(lambda: made.encode(answer, "train", [0]), options.repeat)
    (record,) = made.encode(answer, "train", [0])
    samples = range(options.samples)
    with new_artifact(folder / "artifact", KIND, {}) as staging:
        writer = OutputsWriter(staging.path, facts)
        start = time.process_time()
        for sample in samples:
            writer.write("train", [sample], [record])
        write = time.process_time() - start
        staging.facts = writer.finish({"train": options.samples})
    reader = TeacherOutputs.open(folder / "artifact")

    def read() -> None:
        for first in samples[::MICRO_BATCH]:
            reader.read("train", samples[first : first + MICRO_BATCH])

    reading = shortest(read, options.repeat)
    tokens = options.samples * options.seq_length
    found = reader.read("train", [0])
    kept = f"{codec['name']} {codec.get('dtype') or codec.get('draws') or codec.get('top_k')}"
    if isinstance(found, SparseTargets):
        kept += f", {float((found.shares_bsk > 0).sum(-1).float().mean()):.1f} tokens"
    return (
        f"| {kept} | {reader.manifest_facts['bytes_per_token']:.1f} | "
        f"{1e6 * encode / options.seq_length:.2f} us | {1e6 * write / tokens:.2f} us | "
        f"{1e6 * reading / tokens:.2f} us | {tokens / reading / 1e6:.2f} M |"
    )


def floor(folder: Path, options: argparse.Namespace) -> str:
    """A row of plain bytes."""
    size = 2 * options.hidden_size * options.seq_length
    content, path = bytes(size), folder / "floor"

    def write() -> None:
        with path.open("wb") as file:
            for _ in range(options.samples):
                file.write(content)

    def read() -> None:
        with path.open("rb") as file:
            while file.read(MICRO_BATCH * size):
                pass

    tokens = options.samples * options.seq_length
    times = [shortest(work, options.repeat) for work in (write, read)]
    written, reading = (f"{1e6 * seconds / tokens:.2f} us" for seconds in times)
    rate = tokens / times[1] / 1e6
    return f"| floor | {size / options.seq_length:.1f} | - | {written} | {reading} | {rate:.2f} M |"


def main() -> None:
    """Measure all and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-length", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=49152, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=576, help="default: %(default)s")
    parser.add_argument("--draws", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--slope", type=float, default=1.5, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| kept | bytes a token | made, a token | written | read | tokens/s read |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="flagscale-outputs-") as place:
        print(floor(Path(place), options), flush=True)
        for codec in codecs(options):
            print(measure(codec, Path(place), options), flush=True)


if __name__ == "__main__":
    main()
