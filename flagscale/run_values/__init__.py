"""The values of one run: what people give in KFP's form or to `submit`, checked in one place.

`check_run` reads them as a recipe is read. `python -m pipelines submit` asks it before anything is
sent, and so does the first step of every pipeline, because the form is a door as well.
"""

from flagscale.run_values.checking import LISTS, MEASURED, MET, SECTIONS, check_run
from flagscale.run_values.fields import FIELDS, Field
from flagscale.run_values.made import Made, PlatformFacts

__all__ = [
    "FIELDS",
    "LISTS",
    "MEASURED",
    "MET",
    "SECTIONS",
    "Field",
    "Made",
    "PlatformFacts",
    "check_run",
]
