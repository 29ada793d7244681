"""The Hugging Face hub: which of its failures pass by themselves."""

from __future__ import annotations

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from flagscale.patience import is_away


def is_hub_away(error: BaseException) -> bool:
    """Whether the hub is away or overloaded; what it refuses (401, 403, 404) stays refused.

    Where it is not to be asked (`HF_HUB_OFFLINE`), nothing passes.
    """
    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return False
    return is_away(error, httpx2.TransportError)
