"""What a source's documents say, and files for it."""

import json
from pathlib import Path

from flagscale.data.sources import documents
from flagscale.recipe import DataRecipe


def texts(source: object, **options: object) -> list[str]:
    return [d.text for d in documents(DataRecipe(source=str(source), **options).corpora[0])]


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
