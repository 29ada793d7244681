import itertools
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from flagscale.data import python_docs
from flagscale.data.python_docs import python_documents
from flagscale.errors import UserError


def test_all_of_it() -> None:
    documents = list(python_documents())
    texts = [text for _, text in documents]
    assert len(texts) == len(set(texts)) > 300
    assert sum(map(len, texts)) > 1_000_000
    assert all(200 <= len(text) < 50_000 for text in texts)
    assert sorted(map(len, texts))[len(texts) * 95 // 100] <= 8_100
    names = [name for name, _ in documents]
    assert "topic for #1" in names
    assert "module json.decoder #1" in names
    assert not any(".test" in name or "site-packages" in name for name in names)


def test_a_module_reads_like_its_help() -> None:
    source = (
        b'"""About it."""\nclass A(int):\n    """A."""\n    def f(self, x=1):\n        """F."""\n'
    )
    assert python_docs._describe("m", source) == [
        "module m\n\nAbout it.",
        "class m.A(int)\n\nA.",
        "m.A.f(self, x=1)\n\nF.",
    ]


def test_same_order_and_nothing_imported() -> None:
    code = (
        "import itertools, sys; from flagscale.data.python_docs import python_documents\n"
        "for name, _ in itertools.islice(python_documents(), 250): sys.stdout.write(name + ';')\n"
        "assert not {'antigravity', 'asyncio', 'bdb'} & set(sys.modules)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    }
    assert outputs == {"".join(f"{n};" for n, _ in itertools.islice(python_documents(), 250))}


def test_no_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="no library sources in"):
        next(python_documents())
