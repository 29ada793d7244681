"""Every field, of the recipe, of a platform and of what a run may change, has bounds."""

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flagscale.errors import UserError
from flagscale.execution.trainjob.nodes import NodePods
from flagscale.recipe import Recipe, parse_section
from pipelines.platform import Platform
from tests.flagscale.minimal_recipe import MINIMAL

# Looked through by validators of their own.
ANY = {
    "ArchitectureRecipe.heterogeneous_layers_config",
    "CandidatesRecipe.vary",
    "DataRecipe.chat_template_kwargs",
    "SweepRecipe.vary",
}


def parts(kind: Any, notes: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The plain types in a type expression, each with what is said of it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own = [
            said
            for note in inner[1:]
            for said in (note.metadata if isinstance(note, FieldInfo) else [note])
        ]
        yield from parts(inner[0], (*own, *notes))
    elif origin in (Union, types.UnionType):
        for one in inner:
            yield from parts(one, notes)
    elif origin in (tuple, list, dict):
        for one in inner:
            if one is not Ellipsis:
                yield from parts(one)
    elif origin is Literal or kind is type(None):
        return
    else:
        yield kind, notes


def fields(kind: type[BaseModel]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, plain type and bounds of every field in a section and in those inside of it."""
    for name, field in kind.model_fields.items():
        for plain, notes in parts(field.annotation, tuple(field.metadata)):
            if inspect.isclass(plain) and issubclass(plain, BaseModel):
                yield from fields(plain)
            else:
                yield f"{kind.__name__}.{name}", plain, notes


FIELDS = [*fields(Recipe), *fields(Platform), *fields(NodePods)]


def is_bounded(plain: Any, notes: tuple[Any, ...]) -> bool:
    kinds = {type(note) for note in notes}
    below = {annotated_types.Ge, annotated_types.Gt} & kinds
    above = {annotated_types.Le, annotated_types.Lt} & kinds
    if plain in (int, float):
        return bool(below and above)
    if plain is str:
        return annotated_types.MaxLen in kinds or any(
            getattr(n, "pattern", None) and "{1,9}" in n.pattern for n in notes
        )
    return plain is bool


@pytest.mark.parametrize("name", sorted({name for name, *_ in FIELDS} - ANY))
def test_a_field_has_bounds(name: str) -> None:
    for found, plain, notes in FIELDS:
        if found == name:
            assert is_bounded(plain, notes), (
                f"{name}: {plain} with {notes} takes what no run can do"
            )


def test_all_sections_are_looked_at() -> None:
    sections = {name.partition(".")[0] for name, *_ in FIELDS}
    assert {"TrainingRecipe", "CorpusRecipe", "LayoutRecipe", "SweepRecipe", "Pods"} <= sections
    assert len(FIELDS) > 150


NO_RUN_CAN: list[tuple[str, Mapping[str, Any], str]] = [
    ("export", {"registered_model_name": "acme/tiny"}, "must have no / and no :"),
    ("export", {"registered_model_name": "a:1"}, "must have no / and no :"),
    ("export", {"registered_model_name": ""}, "must not be blank"),
    ("export", {"registered_model_name": " \t"}, "must not be blank"),
    ("export", {"registered_model_name": "x" * 300}, "at most 256 characters"),
    ("export", {"registered_model_name": ".."}, "must not read like a path"),
    ("export", {"registered_model_name": "a\nb"}, "must be one line of text, and holds '\\n'"),
    ("tracking", {"experiment": " "}, "must not be blank"),
    ("tracking", {"experiment": "x" * 257}, "at most 256 characters"),
    ("training", {"seed": 20261128123456}, "less than or equal to 2147483647"),
    ("training", {"train_iters": True}, "must be a number, not true"),
    ("training", {"timing_log_level": True}, "must be a number, not true"),
    ("training", {"lr": 1e300}, "less than or equal to 1"),
    ("training", {"lr": True}, "must be a number, not true"),
    ("training", {"lr": 0.5, "weight_decay": 4}, "lr=0.5 with weight_decay=4.0"),
    ("training", {"adam_eps": 1e-300}, "greater than or equal to"),
    ("training", {"parallelism": {"processes": 10**9}}, "less than or equal to 65536"),
    ("student", {"num_layers": 2**40}, "less than or equal to"),
    ("distillation", {"temperature": 1e-5}, "greater than or equal to 0.01"),
    ("distillation", {"intermediate_layer_pairs": [["a b", "c"]]}, "should match pattern"),
    ("data", {"source": ""}, "must not be blank"),
    ("data", {"source": "a/" + "x" * 256}, "no part between / may be longer than 255 bytes"),
    ("data", {"source": "ab\0c"}, "must be one line of text, and holds '\\x00'"),
    ("data", {"eod_token": "a\0"}, "holds the character 0"),
    ("data", {"text_field": ""}, "must not be blank"),
    ("data", {"max_documents": 3}, "max_documents=3: training, validation and test together"),
    ("data", {"validation_fraction": 1e-300}, "validation_fraction=1e-300 leaves nothing"),
    ("teacher", {"source": " "}, "must not be blank"),
    ("evaluation", {"max_documents": 1}, "greater than or equal to 2"),
    ("evaluation", {"prompts": ["a", ""]}, "must not be blank"),
    ("evaluation", {"prompts": ["a", "\ud800"]}, "unable to parse raw data as a unicode string"),
    ("evaluation", {"bootstrap_samples": 10**9}, "less than or equal to 1000000"),
]


@pytest.mark.parametrize(("section", "values", "said"), NO_RUN_CAN)
def test_what_no_run_can_do_is_refused_when_it_is_read(
    section: str, values: Mapping[str, Any], said: str
) -> None:
    whole = {**MINIMAL, section: {**MINIMAL.get(section, {}), **values}}
    with pytest.raises(UserError) as error:
        parse_section(Recipe, whole, where="recipe")
    assert said in str(error.value)
    assert section in str(error.value)


@pytest.mark.parametrize("name", ["a..b", "a.-b", "-a", "a-", "a\n", "é", "x" * 64, ""])
def test_names_that_kubernetes_refuses(name: str) -> None:
    with pytest.raises(UserError, match="name="):
        parse_section(Recipe, {**MINIMAL, "name": name}, where="recipe")


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(UserError) as error:
        parse_section(Recipe, {**MINIMAL, "name": "x" * 10_000}, where="recipe")
    assert len(str(error.value)) < 1000
    assert "(10,002 characters)" in str(error.value)
