"""A step's log: one line a message on stdout, without the chatter of libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from flagscale.secrets import mask_output

_QUIET_LOGGERS = {
    **dict.fromkeys(
        (
            "alembic",
            "mlflow",
            "urllib3",
            "httpx",
            "datasets",
            "matplotlib",
            "filelock",
            "modelopt",
            "botocore",
            "aiobotocore",
        ),
        logging.WARNING,
    ),
    "megatron": logging.WARNING,
    "megatron.core.datasets": logging.ERROR,  # warns of splits that are not asked for
}
# Notes of the libraries about features that are not installed here, or about one another.
_QUIET_WARNINGS = (
    ".*Apex.*",
    ".*[Tt]ransformer[_ ]?[Ee]ngine.*",
    ".*is deprecated.*",
    ".*flash.attn.*",
    ".*CUDA is not available.*",
    ".*is not tested with nvidia-modelopt.*",
    ".*we are deprecating ShardedTensor.*",
    ".*already has an intermediate output stored.*",
    ".*CUDA_DEVICE_MAX_CONNECTIONS.*",
)


def configure_logging() -> None:
    """One line a message, straight to stdout: KFP shows a step's stdout as its log."""
    mask_output()
    logging.basicConfig(
        level=os.environ.get("FLAGSCALE_LOG_LEVEL", "INFO").upper(),
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    # huggingface_hub names a logger by its file's path and tells it of every temporary folder.
    for handler in logging.getLogger().handlers:
        handler.addFilter(
            lambda record: (
                record.levelno >= logging.WARNING or "huggingface_hub" not in record.pathname
            )
        )
    for name, level in _QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    warnings.formatwarning = _one_line
    for pattern in _QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return f"{category.__name__}: {message} ({filename}:{lineno})"
