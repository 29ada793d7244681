"""Whether the run's arguments ask for ModelOpt."""

from __future__ import annotations

from typing import Any


def modelopt_args_enabled(args: Any) -> bool:  # noqa: ANN401 - Arguments or a Megatron namespace
    """Whether the model is to be converted by ModelOpt: a teacher is named."""
    return getattr(args, "export_kd_teacher_load", None) is not None
