"""Megatron-Core -> Hugging Face folder, by ModelOpt's exporter, and proof that it loads."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from megatron.core.models.gpt import GPTModel
from modelopt.torch.export import export_mcore_gpt_to_hf
from safetensors.torch import load_file
from transformers import AutoConfig

from flagscale.megatron.shape import ModelShape
from flagscale.models import reload_hf
from flagscale.models.hf_import import EMBEDDING, OUTPUT_LAYER
from flagscale.models.origin import ORIGIN_JSON

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reloaded:
    """What transformers makes of an exported folder.

    Attributes:
        logits_bsv: float32 [b, s, vocabulary].
        text: greedy continuation of the prompt.
    """

    logits_bsv: torch.Tensor
    text: str


def export_to_hf(
    model: GPTModel,
    shape: ModelShape,
    template: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a whole (not tensor-parallel) model as a Hugging Face folder.

    Rows of the padded vocabulary are dropped. Call within `platform.runtime()`.

    Args:
        model: plain, without a teacher.
        shape: of the model.
        template: `hf/` of its artifact: the model's own configuration, and the tokenizer.
        folder: existing folder to write into.
        dtype: of the weights on disk.
    """
    shutil.copytree(
        template, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ORIGIN_JSON)
    )
    config = AutoConfig.from_pretrained(template)
    config.dtype = dtype
    config.save_pretrained(folder)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as name:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            export_mcore_gpt_to_hf(model, str(template), dtype=dtype, export_dir=name)
        state: dict[str, torch.Tensor] = {}
        for shard in sorted(Path(name).glob("*.safetensors")):  # one a layer
            state |= {key: value.to(dtype) for key, value in load_file(shard).items()}
    for key in (EMBEDDING, OUTPUT_LAYER):
        if key in state:
            state[key] = state[key][: shape.vocab_size].clone()
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    for path in folder.glob("*.safetensors"):  # written readable by its owner alone
        shutil.copymode(folder / "config.json", path)


@torch.no_grad()
def round_weights(model: GPTModel, dtype: torch.dtype) -> None:
    """Round every weight to what `dtype` can hold, in place; the model stays in its own dtype.

    An export in bfloat16 must equal the model that has the same rounded weights: comparing it with
    the unrounded one would need a tolerance that hides mistakes.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def reload_in_fresh_process(folder: Path, tokens: torch.Tensor, prompt: Sequence[int]) -> Reloaded:
    """Load an exported folder with transformers alone, in a process of its own.

    The process gets neither this project's environment variables nor its packages' start-up code:
    what it loads is what anybody would load. It runs on the CPU, in float32.

    Args:
        folder: the exported folder.
        tokens: int64 [b, s].
        prompt: tokens to continue.

    Raises:
        RuntimeError: the process failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-reload-") as name:
        request, answer = Path(name, "request.json"), Path(name, "answer.safetensors")
        request.write_text(json.dumps({"tokens": tokens.tolist(), "prompt": list(prompt)}))
        done = subprocess.run(  # noqa: S603 - our own script
            [sys.executable, "-I", reload_hf.__file__, str(folder), str(request), str(answer)],
            env={**_loader_path(), "PATH": os.defpath, "HOME": name, "HF_HUB_OFFLINE": "1"},
            cwd=name,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last_words = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"transformers cannot load the exported {folder}: {last_words}")
        return Reloaded(logits_bsv=load_file(answer)["logits"], text=json.loads(done.stdout))


def _loader_path() -> dict[str, str]:
    """Where the system finds shared libraries: in some images torch does not load without it."""
    return {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
