"""Small teacher outputs for the tests of this room."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from flagscale.artifacts import new_artifact
from flagscale.teacher_outputs import KIND, OutputsFacts, OutputsWriter, TeacherOutputs, codec_of

S, H, V = 5, 8, 300
CODECS = {
    "fp32": {"name": "hidden", "dtype": "fp32", "hidden_size": H},
    "bf16": {"name": "hidden", "dtype": "bf16", "hidden_size": H},
    "sampled": {"name": "sampled", "temperature": 2.0, "draws": 12, "seed": 3},
    "topk": {"name": "topk", "temperature": 2.0, "top_k": 16},
}


def facts(codec: str | dict = "fp32", **changed: object) -> OutputsFacts:
    values: dict = {
        "codec": CODECS[codec] if isinstance(codec, str) else codec,
        "teacher": "sha256:t",
        "dataset": "sha256:d",
        "tokenizer": "sha256:k",
        "seq_length": S,
        "reset_attention_mask": True,
        "params_dtype": "fp32",
        "vocab_size": V,
    }
    return OutputsFacts(**values | changed)


def answers(of: OutputsFacts, sample: int) -> torch.Tensor:
    """What the teacher says to a sample, [s, h] or [s, V]."""
    width = of.codec.get("hidden_size", of.vocab_size)
    generator = torch.Generator().manual_seed(sample)
    return 3 * torch.randn(of.seq_length, width, generator=generator)


def encoded(of: OutputsFacts, split: str, samples: list[int]) -> list[bytes]:
    answers_bsx = torch.stack([answers(of, sample) for sample in samples])
    return codec_of(of).encode(answers_bsx, split, samples)


def make(folder: Path, of: OutputsFacts, splits: Mapping[str, list[int]]) -> TeacherOutputs:
    """An artifact with these samples."""
    with new_artifact(folder, KIND, {}) as staging:
        writer = OutputsWriter(staging.path, of)
        for split, samples in splits.items():
            writer.write(split, samples, encoded(of, split, samples))
        staging.facts = writer.finish({"train": 9, "validation": 2})
    return TeacherOutputs.open(folder)
