"""What transformers, alone in a process of its own, makes of an exported folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from flagscale.models import reload_hf
from flagscale.models.hf_folder import HFFolder

_BYTES_A_PARAMETER = 4
_ROOM = 1.5  # for what transformers reads before it converts it, and for what it computes
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Reloaded:
    """What transformers makes of an exported folder.

    Attributes:
        logits_bsv: float32 [b, s, vocabulary].
        text: greedy continuation of the prompt; None of a model that was run a layer at a time.
        ids: the tokens of each text.
    """

    logits_bsv: torch.Tensor
    text: str | None
    ids: list[list[int]]


def reload_in_fresh_process(
    folder: Path,
    tokens: torch.Tensor,
    prompt: Sequence[int],
    texts: Sequence[str] = (),
    is_whole: bool | None = None,
) -> Reloaded:
    """Load an exported folder with transformers alone, in a process of its own.

    The process gets neither this project's environment variables nor its packages' start-up code:
    what it loads is what anybody would load. It runs on the CPU, in float32.

    Args:
        folder: the exported folder.
        tokens: int64 [b, s].
        prompt: tokens to continue.
        texts: to encode.
        is_whole: load all of the model at once, as its users will, and not a layer at a time;
            default: if there is memory for it.

    Raises:
        RuntimeError: the process failed; its last words are in the message.
    """
    if is_whole is None:
        is_whole = _fits(folder)
    with tempfile.TemporaryDirectory(prefix="flagscale-reload-") as name:
        request, answer = Path(name, "request.json"), Path(name, "answer.safetensors")
        values = {"tokens": tokens.tolist(), "prompt": list(prompt), "texts": list(texts)}
        request.write_text(json.dumps(values | {"whole": is_whole}))
        done = subprocess.run(  # noqa: S603 - our own script
            [*python(), reload_hf.__file__, str(folder), str(request), str(answer)],
            env={**_loader_path(), "PATH": os.defpath, "HOME": name, "HF_HUB_OFFLINE": "1"},
            cwd=name,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last_words = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"transformers cannot load the exported {folder}: {last_words}")
        return Reloaded(logits_bsv=load_file(answer)["logits"], **json.loads(done.stdout))


def python() -> list[str]:
    """What starts an interpreter that finds nothing of its caller's."""
    return [sys.executable, "-I"]


def _fits(folder: Path) -> bool:
    """Whether the machine, and the container that this is, have memory for the whole model."""
    parameters = HFFolder(folder).num_parameters()
    return parameters * _BYTES_A_PARAMETER * _ROOM <= _available_memory()


def _available_memory() -> int:
    """Bytes that could be taken."""
    available: int = psutil.virtual_memory().available
    try:  # version 2, where all but the root group have these
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        taken = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - taken)


def _loader_path() -> dict[str, str]:
    """Where the system finds shared libraries: in some images torch does not load without it."""
    return {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
