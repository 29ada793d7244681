"""Exports are loaded by forks of a warm process."""

from collections.abc import Iterator

import pytest

from tests.flagscale.fork_server import ForkServer


@pytest.fixture(scope="module", autouse=True)
def forked_loaders(fork_server: ForkServer) -> Iterator[None]:
    """Of transformers; `models/test_fresh_process.py` has those that find nothing of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flagscale.models.fresh_process.python", lambda: fork_server.python("-I"))
        yield
