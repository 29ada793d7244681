"""Errors name a right value where a field knows one, and nothing that follows from other errors."""

from typing import Annotated, Any

import pytest
from pydantic import Field, model_validator

from flagscale.errors import UserError
from flagscale.recipe import Section, parse_section

Size = Annotated[str, Field(pattern="^[0-9]+Gi$", examples=["16Gi"])]
Label = Annotated[str, Field(pattern="^[a-z]+$", examples=["pool", "zone"])]


class Disk(Section):
    size: Size = "1Gi"
    modes: tuple[Annotated[int, Field(ge=0)], ...] = Field((1,), min_length=1)


class Machine(Section):
    memory: Size = Field("8Gi", description="with a description, as everywhere")
    swap: Size | None = None
    own: str = Field("a", pattern="^[a-z]$", examples=["b"])
    plain: str = Field("a", pattern="^[a-z]$")
    labels: dict[Label, Size] | None = None
    sizes: tuple[Size, ...] = ()
    disks: dict[str, Disk] | None = None
    first: Disk | None = None

    @model_validator(mode="after")
    def _check(self) -> "Machine":
        if self.memory == "0Gi":
            raise ValueError("no memory")
        return self


def said(values: dict[str, Any]) -> list[str]:
    """The lines of the error, but the first."""
    with pytest.raises(UserError) as caught:
        parse_section(Machine, values, where="m")
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("values", "place", "example"),
    [
        ({"memory": "16GB"}, "memory='16GB'", "16Gi"),
        ({"memory": None}, "memory=None", "16Gi"),
        ({"swap": "16GB"}, "swap='16GB'", "16Gi"),
        ({"own": "1"}, "own='1'", "b"),
        ({"labels": {"a": "1"}}, "labels.a='1'", "16Gi"),
        ({"labels": {"1": "1Gi"}}, "labels.1.[key]='1'", "pool or zone"),
        ({"sizes": ["1Gi", "x"]}, "sizes.1='x'", "16Gi"),
        ({"disks": {"a": {"size": "x"}}}, "disks.a.size='x'", "16Gi"),
        ({"first": {"size": "x"}}, "first.size='x'", "16Gi"),
    ],
)
def test_an_example_is_shown(values: dict[str, Any], place: str, example: str) -> None:
    (line,) = said(values)
    assert line.startswith(f"{place}: ")
    assert line.endswith(f", e.g. {example}")


@pytest.mark.parametrize("values", [{"plain": "1"}, {"first": 5}, {"memory": "0Gi"}, {"me": "1"}])
def test_where_there_is_none_nothing_is_made_up(values: dict[str, Any]) -> None:
    (line,) = said(values)
    assert "e.g." not in line


def test_unknown_fields_inside_of_mappings_bring_the_nearest_name() -> None:
    assert said({"disks": {"a": {"sise": 1}}})[0].endswith("unknown field; did you mean 'size'?")
    assert said({"first": {"sise": 1}})[0].endswith("unknown field; did you mean 'size'?")


def test_a_list_with_wrong_items_is_not_called_too_short() -> None:
    assert said({"first": {"modes": ["RWX"]}})[0].startswith("first.modes.0='RWX': ")
    assert len(said({"first": {"modes": ["RWX"]}})) == 1
    assert "at least 1 item" in said({"first": {"modes": []}})[0]
    assert len(said({"first": {"modes": []}, "sizes": ["x"]})) == 2
