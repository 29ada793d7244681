"""A step as a pod runs it: `pod.py COMPONENT ARGUMENTS`, with a disk (TMPDIR) of its own.

ARGUMENTS is JSON: parameters as they are, artifacts as `{"artifact": path}`.
"""

import importlib
import json
import sys

from kfp import dsl


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    component = getattr(importlib.import_module(f"components.{name}.component"), name)
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
