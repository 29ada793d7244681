"""The Hugging Face hub: which of its failures pass by themselves, and what it holds just now."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name

from flagscale.patience import is_away, patiently

_COMMIT = re.compile("[0-9a-f]{40}")
_SECONDS = 10.0


def is_hub_away(error: BaseException) -> bool:
    """Whether the hub is away or overloaded; what it refuses (401, 403, 404) stays refused.

    Where it is not to be asked (`HF_HUB_OFFLINE`), nothing passes.
    """
    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return False
    return is_away(error, httpx2.TransportError)


def commit_of(source: str, revision: str | None, repo_type: str) -> str | None:
    """The commit that a branch or tag of a repository stands for.

    Where the hub cannot be asked it is the one that was fetched last, which then is what is used.

    Args:
        source: the repository's id.
        revision: None: the main branch.
        repo_type: `model` or `dataset`.

    Returns:
        None where nobody says.
    """
    if revision and _COMMIT.fullmatch(revision):
        return f"commit {revision}"

    def ask() -> str | None:
        return (
            HfApi().repo_info(source, repo_type=repo_type, revision=revision, timeout=_SECONDS).sha
        )

    try:
        found = patiently(ask, f"ask for the commit of {source}", is_hub_away)
    except (OSError, ValueError, httpx2.HTTPError):  # the hub's own are among them
        name = repo_folder_name(repo_id=source, repo_type=repo_type)
        ref = Path(constants.HF_HUB_CACHE) / name / "refs" / (revision or "main")
        found = ref.read_text().strip() if ref.is_file() else None
    return found and f"commit {found}"
