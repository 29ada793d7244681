from pathlib import Path

import pytest

from flagscale.errors import UserError
from flagscale.execution.trainjob.nodes import accelerators_of, processes_per_node, shared_folder
from flagscale.recipe import ParallelismRecipe


def test_ranks_on_a_node():
    one = ParallelismRecipe()
    assert processes_per_node(one, nodes=2, accelerator_count=8) == 8
    assert processes_per_node(one, nodes=2, accelerator_count=0) == 1
    four = ParallelismRecipe(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert processes_per_node(four, nodes=2, accelerator_count=0) == 2
    assert processes_per_node(four, nodes=3, accelerator_count=0) == 4
    assert processes_per_node(ParallelismRecipe(processes=3), nodes=2, accelerator_count=0) == 3
    with pytest.raises(UserError, match=r"processes=4 on each node, but a node has 2 accelerators"):
        processes_per_node(ParallelismRecipe(processes=4), nodes=2, accelerator_count=2)


def test_nodes_need_a_folder_that_all_of_them_see(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_SHARED", "s3://bucket/x")
    with pytest.raises(UserError, match=r"FLAGSCALE_SHARED=s3://bucket/x: a TrainJob needs a"):
        shared_folder({})
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no such folder"):
        shared_folder({})
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path))
    assert shared_folder({"checkpoints": tmp_path / "checkpoints"}) == tmp_path
    with pytest.raises(UserError, match=r"checkpoints=/tmp/flagscale must lie under"):
        shared_folder({"checkpoints": Path("/tmp/flagscale")})


def test_a_count_that_is_none_is_refused() -> None:
    assert accelerators_of("8") == 8
    for text in ("four", "", "-1", "8.0"):
        with pytest.raises(UserError, match="training_accelerator_count="):
            accelerators_of(text)
