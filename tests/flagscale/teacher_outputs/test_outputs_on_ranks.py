import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flagscale.teacher_outputs import OutputsWriter, codec_of
from tests.flagscale.teacher_outputs.outputs import CODECS, encoded, facts
from tests.flagscale.teacher_outputs.outputs_worker import VOCABULARIES, logits_of

WORKER = Path(__file__).parent / "outputs_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., object]) -> Path:
    """What the ranks left."""
    found = tmp_path_factory.mktemp("ranks")
    with pytest.raises(subprocess.CalledProcessError):  # they were killed
        torchrun(2, WORKER, found)
    return found


def test_ranks_that_share_the_vocabulary_make_what_one_process_makes(folder: Path) -> None:
    first, second = (pickle.loads((folder / f"records-{rank}").read_bytes()) for rank in range(2))
    assert first == second
    for (padded, codec, dtype), records in first.items():
        one = codec_of(facts(CODECS[codec], vocab_size=VOCABULARIES[padded]))
        alone = one.encode(logits_of(padded, dtype), "train", [4, 2])
        if padded % 256 == 0:  # each slice is whole blocks
            assert records == alone, (padded, codec, dtype)
        else:  # the sums are rounded otherwise
            assert list(map(len, records)) == list(map(len, alone))
            assert one.decode(records).tokens_bsk.equal(one.decode(alone).tokens_bsk)


def test_killed_ranks_are_gone_on_from_by_another_number_of_them(folder: Path) -> None:
    of, wanted = facts("sampled"), list(range(5000))
    killed = folder / "killed"
    missing = OutputsWriter(killed, of).missing("train", wanted)
    there = sorted(set(wanted) - set(missing))
    assert set(range(1, 22, 2)) <= set(there)  # of the second rank, before it was killed
    assert missing
    writers = [OutputsWriter(killed, of, rank) for rank in range(3)]
    for sample in missing[:30]:
        writers[sample % 3].write("train", [sample], encoded(of, "train", [sample]))
    for writer in writers:
        writer.close()
    assert OutputsWriter(killed, of).missing("train", wanted) == missing[30:]
    told = OutputsWriter(killed, of).finish({"train": 5000})
    assert told["samples"]["train"]["stored"] == len(there) + 30
