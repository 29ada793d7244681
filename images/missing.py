"""What pip would install beside what is there, pinned: `python3 images/missing.py REPORT.json`.

REPORT.json is of `pip install --dry-run --report`. Prints lines for a requirements file, which pip
then installs into a folder of its own: with `--target` alone it would copy what is there as well.
Needs Python 3.11 and nothing else.
"""

import json
import sys
from pathlib import Path
from typing import Any


def pins(report: dict[str, Any]) -> list[str]:
    """`name==version` of each package that the report would install."""
    found = [one["metadata"] for one in report["install"]]
    return sorted(f"{package['name']}=={package['version']}" for package in found)


if __name__ == "__main__":
    lines = pins(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.stdout.write("".join(f"{line}\n" for line in lines))
