from pathlib import Path

import pytest
import torch

from flagscale.artifacts import new_artifact
from flagscale.errors import UserError
from flagscale.teacher_outputs import (
    KIND,
    Hidden,
    OutputsFacts,
    OutputsWriter,
    TeacherOutputs,
    codec_of,
)

S, H = 5, 8


def facts(**changed: object) -> OutputsFacts:
    values = {
        "codec": {"name": "hidden", "dtype": "fp32", "hidden_size": H},
        "teacher": "sha256:t",
        "dataset": "sha256:d",
        "tokenizer": "sha256:k",
        "seq_length": S,
        "reset_attention_mask": True,
        "params_dtype": "fp32",
        "vocab_size": 50,
    }
    return OutputsFacts(**values | changed)


def write(folder: Path, of: OutputsFacts, hidden: dict[int, torch.Tensor]) -> TeacherOutputs:
    with new_artifact(folder, KIND, {}) as staging:
        writer = OutputsWriter(staging.path, of)
        for sample, hidden_sh in hidden.items():
            writer.write("train", [sample], codec_of(of).encode(hidden_sh[None], "train", [sample]))
        staging.facts = writer.finish({"train": 9, "validation": 2})
    return TeacherOutputs.open(folder)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_was_written_is_read_in_any_order(tmp_path: Path, dtype: str) -> None:
    of = facts(codec={"name": "hidden", "dtype": dtype, "hidden_size": H})
    hidden = {sample: torch.randn(S, H) for sample in (7, 0, 3)}
    reader = write(tmp_path / "o", of, hidden)
    read = reader.read("train", [3, 7, 3])
    assert isinstance(read, Hidden)
    expected = torch.stack([hidden[3], hidden[7], hidden[3]])
    assert torch.equal(read.hidden_bsh, expected if dtype == "fp32" else expected.bfloat16())
    assert reader.missing("train", [0, 1, 2, 3]) == [1, 2]
    assert reader.manifest_facts["samples"]["train"] == {"stored": 3, "of": 9}


def test_a_sample_that_is_not_there_is_named(tmp_path: Path) -> None:
    reader = write(tmp_path / "o", facts(), {2: torch.randn(S, H)})
    with pytest.raises(UserError, match=r"no answer to sample 4 of train.*samples: all"):
        reader.read("train", [2, 4])
    with pytest.raises(UserError, match="no answer to sample 2 of validation"):
        reader.read("validation", [2])
