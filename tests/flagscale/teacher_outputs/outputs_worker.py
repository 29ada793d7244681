"""One of two ranks that make teacher outputs: `torchrun ... outputs_worker.py FOLDER`.

Both encode logits of which each has half the vocabulary, and leave the records; then each writes a
sample after the other into FOLDER/killed, until the second is killed and the first with it.
"""

import os
import pickle
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from outputs import CODECS, answers, encoded, facts

from flagscale.teacher_outputs import OutputsWriter, codec_of

VOCABULARIES = {384: 300, 100: 97, 2**17 + 256: 2**17 + 9}  # with padding: without


def logits_of(padded: int, dtype: torch.dtype) -> torch.Tensor:
    logits = torch.stack([answers(facts(vocab_size=padded, codec={}), n) for n in (4, 2)])
    return logits.to(dtype)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, records = dist.get_rank(), {}
    for padded, vocab_size in VOCABULARIES.items():
        for codec in ("sampled", "topk"):
            for dtype in (torch.float32, torch.bfloat16):
                mine = logits_of(padded, dtype).chunk(2, -1)[rank]
                made = codec_of(facts(CODECS[codec], vocab_size=vocab_size))
                key = (padded, codec, dtype)
                records[key] = made.encode(mine, "train", [4, 2], dist.group.WORLD)
    (folder / f"records-{rank}").write_bytes(pickle.dumps(records))

    writer = OutputsWriter(folder / "killed", facts("sampled"), rank)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    for sample in range(rank, 10**6, 2):
        writer.write("train", [sample], encoded(facts("sampled"), "train", [sample]))
        if sample == 21:
            signal.setitimer(signal.ITIMER_REAL, 0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
