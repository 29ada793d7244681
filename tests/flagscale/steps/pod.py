"""A step as a pod runs it: `pod.py COMPONENT ARGUMENTS`, with a disk (TMPDIR) of its own.

ARGUMENTS is JSON: parameters as they are, artifacts as `{"artifact": path}`.
"""

import importlib
import json
import sys
from pathlib import Path

from kfp import dsl

import components


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    (file,) = Path(components.__path__[0]).glob(f"*/{name}/component.py")
    module = importlib.import_module(f"components.{file.parents[1].name}.{name}.component")
    component = getattr(module, name)
    component.python_func(
        **{
            key: dsl.Artifact(uri=value["artifact"])
            if isinstance(value, dict) and "artifact" in value
            else value
            for key, value in arguments.items()
        }
    )


if __name__ == "__main__":
    main()
