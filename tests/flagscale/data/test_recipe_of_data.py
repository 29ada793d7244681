import pytest

from flagscale.errors import UserError
from flagscale.recipe import DataRecipe, parse_section

CHAT = {"source": "a", "format": "chat"}
ONE = {"name": "one", "source": "a.jsonl"}


def parse(**values: object) -> DataRecipe:
    return parse_section(DataRecipe, values, where="data")


def test_one_corpus() -> None:
    (corpus,) = parse(source="a.txt", text_field="body", max_documents=4).corpora
    assert (corpus.source, corpus.text_field, corpus.max_documents) == ("a.txt", "body", 4)
    assert parse().corpora[0].source == "python-docs"


def test_a_blend() -> None:
    data = parse(blend=[ONE, {"name": "two", "source": "b", "weight": 0.5, "format": "chat"}])
    assert data.source is None
    assert [(c.name, c.weight, c.format) for c in data.corpora] == [
        ("one", 1.0, "auto"),
        ("two", 0.5, "chat"),
    ]
    assert parse(**data.model_dump(mode="json")) == data


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "a", "blend": [ONE]}, "source='a' and blend are both given; give one of them"),
        ({"source": None}, "source=null and no blend: give one of the two"),
        ({"blend": []}, r"blend=\[\]: name at least one corpus"),
        ({"blend": [ONE | {"weight": 0}]}, r"blend.0.weight=0: .*greater than or equal to"),
        ({"blend": [ONE | {"weight": -0.5}]}, r"blend.0.weight=-0.5: .*greater than or equal to"),
        ({"blend": [ONE, ONE]}, "blend: one: names must differ"),
        ({"blend": [ONE | {"name": "a/b"}]}, "blend.0.name='a/b'"),
        ({"blend": [{"name": "a"}]}, "blend.0.source: required"),
        ({"blend": [ONE], "text_field": "body"}, "text_field='body' does nothing beside blend"),
        ({"source": "a", "train_on": "last"}, "train_on: does nothing without conversations"),
        ({"blend": [ONE], "chat_template": "{{ messages }}"}, "chat_template: does nothing"),
        (CHAT | {"train_on": "first"}, "train_on='first'"),
        (CHAT | {"chat_template": "no/file.jinja"}, "no template's text .* No such file"),
        (CHAT | {"chat_template": "{% if messages %}"}, "the chat template is none: line 1: "),
        (CHAT | {"chat_template": "{{ text }}"}, "the chat template writes no messages"),
        (
            CHAT | {"chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs: tools: comes from the rows",
        ),
        (
            CHAT | {"chat_template": "{{ messages }}", "chat_template_kwargs": {"thinking": True}},
            "thinking: the chat template knows no such variable; it has: messages",
        ),
        ({"blend": [ONE], "max_documents": 5}, "max_documents=5 does nothing beside blend"),
        (
            {"blend": [ONE | {"wieght": 2}]},
            "blend.0.wieght=2: unknown field; did you mean",
        ),
    ],
)
def test_what_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(**values)
