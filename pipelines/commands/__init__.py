"""The commands of `python -m pipelines`, one module each: `add` makes its parser."""
