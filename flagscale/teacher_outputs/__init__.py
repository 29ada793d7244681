"""What a teacher answered, sample by sample, kept as an artifact of kind `teacher-outputs`.

    manifest.json               what it is: see `OutputsFacts`; which samples are there, their size
    facts.json                  the former part of that, for whoever goes on writing
    train/00000-00000.records   the records of samples, one after the other
    train/00000-00000.index     where each is, and its checksum
    validation/...

The first number of a shard is its writer's, the second counts that writer's shards. A record is
what a codec made of one sample (`hidden`, `sampled`, `top_k`: a file each). Which seed a training
has, in which order, how many at once and on which layout it takes the samples, nothing here knows.
"""

from flagscale.teacher_outputs.ahead import ReadAhead
from flagscale.teacher_outputs.codecs import codec_of
from flagscale.teacher_outputs.facts import KIND, OutputsFacts
from flagscale.teacher_outputs.reader import TeacherOutputs
from flagscale.teacher_outputs.values import Codec, Hidden, SparseTargets
from flagscale.teacher_outputs.writer import OutputsWriter

__all__ = [
    "KIND",
    "Codec",
    "Hidden",
    "OutputsFacts",
    "OutputsWriter",
    "ReadAhead",
    "SparseTargets",
    "TeacherOutputs",
    "codec_of",
]
