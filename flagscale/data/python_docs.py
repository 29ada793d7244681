"""The Python interpreter's own documentation as a corpus: real text with nothing to download.

Language topics (what `help("for")` shows) come first, then the modules of the standard library: a
module's docstring and those of its classes and functions. What is long is cut between paragraphs,
so that no single document decides what a held-out split measures. Sources are parsed, never
imported. The text depends on the interpreter's version.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from flagscale.errors import UserError

_SHORTEST = 200  # characters; shorter ones say little beyond their name
_LONGEST = 8_000  # characters; cut where the paragraph fits no more
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "turtledemo", "_bundled"}


def python_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text), in the same order whenever the interpreter is the same.

    Raises:
        UserError: this interpreter comes without its library's sources.
    """
    seen = set()
    for name, paragraphs in itertools.chain(_topics(), _modules()):
        for number, text in enumerate(_join(paragraphs), 1):
            if len(text) >= _SHORTEST and text not in seen:
                seen.add(text)
                yield f"{name} #{number}", text
    if not seen:
        raise UserError(
            f"data.source='python-docs': no library sources in {sysconfig.get_path('stdlib')}; "
            "use another interpreter, or name a source of text"
        )


def _join(paragraphs: list[str]) -> Iterator[str]:
    """Documents of whole paragraphs, of at most `_LONGEST` characters or one paragraph each."""
    document = ""
    for paragraph in paragraphs:
        if document and len(document) + len(paragraph) > _LONGEST:
            yield document
            document = ""
        document = f"{document}\n\n{paragraph}" if document else paragraph
    yield document


def _topics() -> Iterator[tuple[str, list[str]]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip().split("\n\n")


def _modules() -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or _SKIPPED_FOLDERS.intersection(parts):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        yield f"module {name}", _describe(name, path.read_bytes())


def _describe(name: str, source: bytes) -> list[str]:
    """The docstrings of a module and of what it defines, each below its heading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            return []
    return [f"{heading}\n\n{doc}" for heading, doc in _docstrings(name, tree)]


def _docstrings(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of `node` and of the classes and functions inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc and doc.strip():
            yield _heading(name, node), doc.strip()
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(f"{name}.{child.name}", child)


def _heading(name: str, node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"module {name}"
