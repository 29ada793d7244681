"""What each step's process spends on imports, beside `import torch`.

    python benchmarks/startup.py --repeat 3

The tiny recipe runs as `python -m pipelines run` runs it, and each step's process notes all that it
imports, early and late, in CPU seconds. Meanwhile fresh processes import torch alone, again and
again, so that whatever else the machine does slows down both. The table has medians, and how often
`import torch` goes into each.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GOALS = {"prepare-data": 2.5}  # times `import torch`
GOAL = 4.0
SLOWEST = 5
PAUSE_SECONDS = 5.0


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """A command whose processes note in a new folder what they import."""
    folder.mkdir()
    path = [str(ROOT / "benchmarks" / "import_timer"), str(ROOT)]
    environment = {
        **os.environ,
        "IMPORT_TIMES": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }
    return subprocess.Popen(  # noqa: S603
        [sys.executable, *command], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL
    )


def end(process: subprocess.Popen[bytes], folder: Path) -> list[dict[str, Any]]:
    """What its processes imported."""
    if process.wait():
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    return [json.loads(file.read_text()) for file in folder.glob("*.json")]


def step_of(process: dict[str, Any]) -> str | None:
    """The step that a process of KFP's executor ran."""
    argv = process["argv"]
    option = "--function_to_execute"
    return argv[argv.index(option) + 1].replace("_", "-") if option in argv else None


def measure(repeat: int) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Processes that import torch, and those of each step."""
    torch: list[dict[str, Any]] = []
    steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for room in ("flagscale", "components", "pipelines"):  # as in the images
        compileall.compile_dir(ROOT / room, quiet=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = start(folder / "log", "tests/tiny_teacher.py", str(folder / "teacher"))
        end(teacher, folder / "log")
        for turn in range(repeat):
            log, options = folder / f"log-{turn}", ("--runs", str(folder / f"runs-{turn}"))
            override = f"teacher.source={folder / 'teacher'}"
            command = ("-m", "pipelines", "run", "recipes/tiny.yaml", *options, "--set", override)
            pipeline = start(log, *command)
            while pipeline.poll() is None:
                alone = folder / f"torch-{len(torch)}"
                torch += end(start(alone, "-c", "import torch"), alone)
                time.sleep(PAUSE_SECONDS)
            for process in end(pipeline, log):
                if step := step_of(process):
                    steps[step].append(process)
    return torch, steps


def median(processes: list[dict[str, Any]], key: str) -> float:
    """Of a figure."""
    return statistics.median(process[key] for process in processes)


def slowest(processes: list[dict[str, Any]]) -> str:
    """The packages whose own files take longest."""
    total: dict[str, float] = defaultdict(float)
    for process in processes:
        for package, seconds in process["own"].items():
            total[package] += seconds / len(processes)
    most = sorted(total.items(), key=lambda item: -item[1])[:SLOWEST]
    return ", ".join(f"{package} {seconds:.1f}" for package, seconds in most)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3, help="runs of the tiny recipe")
    torch, steps = measure(parser.parse_args().repeat)
    alone = median(torch, "cpu")
    print("| process | modules | imports, CPU | x torch | goal | wall | slowest, CPU s |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for name, processes in {"import torch": torch, **steps}.items():
        cpu = median(processes, "cpu")
        modules = statistics.median(len(process["modules"]) for process in processes)
        goal = "" if processes is torch else f"{GOALS.get(name, GOAL)}"
        print(
            f"| {name} | {modules:,.0f} | {cpu:.2f} s | {cpu / alone:.1f} | {goal} | "
            f"{median(processes, 'wall'):.1f} s | {slowest(processes)} |"
        )


if __name__ == "__main__":
    main()
