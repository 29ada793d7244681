"""Models of artifacts on ranks: the same logits as in one process."""

from pathlib import Path

import pytest
import torch
from logits_worker import logits_on_rank

from flagscale.execution.launch import call_on_ranks
from flagscale.recipe import LayoutRecipe, ModelsRecipe

LAYOUTS = [(2, 1), (1, 2), (2, 2)]


@pytest.fixture
def tokens(teacher: Path) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (2, 24), generator=generator).tolist()


@pytest.fixture
def alone(teacher: Path, tokens: list[list[int]], tmp_path: Path) -> torch.Tensor:
    logits_on_rank(teacher, ModelsRecipe(), tokens, tmp_path)
    return torch.load(tmp_path / "logits.pt")


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_logits_on_ranks_are_those_of_one_process(
    tensor: int,
    pipeline: int,
    teacher: Path,
    tokens: list[list[int]],
    alone: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    layout = LayoutRecipe(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    models = ModelsRecipe(parallelism=layout)
    memory = call_on_ranks(
        "test",
        logits_on_rank,
        models.processes,
        artifact=teacher,
        models=models,
        tokens=tokens,
        output=tmp_path,
    )
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), alone, atol=1e-5, rtol=1e-5)
    assert len(memory["host"]) == tensor * pipeline
    assert min(memory["host"]) > 10**8  # torch alone takes more
    parts = [torch.load(tmp_path / f"part-{rank}.pt") for rank in range(tensor * pipeline)]
    held = [part for part in parts if part is not None]
    assert len(held) == tensor  # those of the last stage
    whole = torch.cat(held, dim=-1)[..., : alone.size(-1)]
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)
