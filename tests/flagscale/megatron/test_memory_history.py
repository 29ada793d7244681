import pickle

import pytest

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.memory_history import record_memory_history, write_snapshot


@pytest.mark.skipif(platform.HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"record_memory_history=true.*no GPU"):
        record_memory_history(tmp_path / "snapshot.pickle")
    assert list(tmp_path.iterdir()) == []


def test_snapshot_is_written_whole_with_the_rank_in_its_name(tmp_path):
    path = tmp_path / "new" / "memory.pickle"
    for rank in (0, 3):
        written = write_snapshot({"rank": rank}, path, rank)
        assert written == path.with_name(f"memory-rank{rank}.pickle")
        assert pickle.loads(written.read_bytes()) == {"rank": rank}
    assert len(list(path.parent.iterdir())) == 2


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "memory.pickle"
    before = write_snapshot("before", path, 0).read_bytes()
    with pytest.raises(AttributeError, match="lambda"):
        write_snapshot(lambda: None, path, 0)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]
