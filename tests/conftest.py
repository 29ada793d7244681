"""Fixtures that several folders of tests share."""

import importlib.util
import os
from pathlib import Path

import pytest

# Threads of tiny models wait for each other longer than they work, above all on a busy machine.
# Before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny trained Llama and its tokenizer, made once a session."""
    path = Path(__file__).with_name("tiny_teacher.py")
    spec = importlib.util.spec_from_file_location("tiny_teacher", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tiny-teacher")
    module.make_teacher(folder)
    return folder
