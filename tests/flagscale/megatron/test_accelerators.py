"""transformer-engine that is installed and does not load, in a process that finds it so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flagscale.errors import UserError
from flagscale.megatron.accelerators import check_accelerators, has_transformer_engine

LOADER = "transformer_engine_torch.so: undefined symbol: _ZNK3c1010TensorImpl4sizeEv"


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a transformer-engine whose `pytorch` runs `code`; ask for it in a new process."""

    def ask(code: str) -> str:
        package = tmp_path / "transformer_engine"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "pytorch.py").write_text(code)
        info = tmp_path / "transformer_engine-2.10.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer_engine\n")
        with (info / "METADATA").open("a") as file:
            file.write("Version: 2.10.0\n")
        question = (
            "from flagscale.megatron.accelerators import has_transformer_engine\n"
            "print(has_transformer_engine())\n"
        )
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", question],
            check=False,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.stdout

    return ask


@pytest.mark.parametrize("kind", ["ImportError", "RuntimeError", "OSError"])
def test_one_that_does_not_load_is_an_error_that_quotes_the_loader(plant, kind):
    said = plant(f"raise {kind}({LOADER!r})")
    assert "UserError: transformer-engine 2.10.0 is installed but does not import" in said
    assert f"{kind}: {LOADER}" in said


def test_one_that_loads_is_there(plant):
    assert plant("").strip() == "True"


def test_none_is_no_error():
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        assert not has_transformer_engine()
    else:
        assert has_transformer_engine()


@pytest.mark.parametrize("count", ["eight", "-1", "1.0"])
def test_a_count_that_is_no_number_is_refused(count, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_ACCELERATOR_COUNT", count)
    with pytest.raises(UserError, match=f"FLAGSCALE_ACCELERATOR_COUNT='{count}': must be a whole"):
        check_accelerators()


def test_fewer_than_the_pod_was_given_are_refused(monkeypatch):
    monkeypatch.setenv("FLAGSCALE_ACCELERATOR_COUNT", "99")
    with pytest.raises(UserError, match=r"=99: .* torch can use [0-9]+ "):
        check_accelerators()
