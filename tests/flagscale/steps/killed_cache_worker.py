"""cache-teacher, killed with -9: `torchrun 1 killed_cache_worker.py WORK OUTPUT TEACHER DATASET`.

The third pass of the teacher is on the disk by half.
"""

import os
import signal
import sys
from pathlib import Path

from flagscale.recipe import MetRecipe, TeacherOutputsRecipe
from flagscale.steps.cache_teacher import cache_teacher
from flagscale.teacher_outputs import OutputsWriter

SAMPLES = 40


def main(work: str, output: str, teacher: str, dataset: str) -> None:
    write, passes = OutputsWriter.write, []

    def killed(writer: OutputsWriter, split: str, samples: list[int], records: list[bytes]) -> None:
        passes.append(samples)
        if len(passes) == 3:
            write(writer, split, samples[:1], records[:1])
            os.kill(os.getpid(), signal.SIGKILL)
        write(writer, split, samples, records)

    OutputsWriter.write = killed
    met = MetRecipe(train=((1, SAMPLES),))
    cache_teacher(TeacherOutputsRecipe(), met, Path(teacher), Path(dataset), work, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
