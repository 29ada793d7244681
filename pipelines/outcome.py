"""What became of a run's steps, here or on a cluster, in the same words."""

WITHOUT_A_WORD = "it ended without a word: killed, perhaps for want of memory"


class StepGone(RuntimeError):  # noqa: N818 - it reports what happened to a step
    """A step's container is gone, and left no outputs: whatever else failed follows from that."""

    def __init__(self) -> None:
        super().__init__(WITHOUT_A_WORD)


class StepFailed(Exception):  # noqa: N818 - it reports what happened to a step
    """A step ended with an error; the message is the step's own, after its name."""


def duration(seconds: float) -> str:
    """`12 s` or `3 min 20 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
