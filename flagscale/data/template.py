"""A chat template: conversations -> texts, and where in them answers stand.

An answer is learnt behind what the template writes before it when it is to be given: the messages
up to it and the prompt to answer. Answers share a text as long as this is the same text. Templates
of reasoning models write earlier answers without their thoughts: there, each answer has a text of
its own.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from flagscale.data.messages import ASSISTANT, Conversation, Message
from flagscale.data.rows import BadRow
from flagscale.data.standing import Place, calls, find, pieces, tool_names
from flagscale.errors import UserError
from flagscale.recipe.chat_template import variables

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)
_OPENING = 64  # characters of an answer that a prompt may begin it with
Span = tuple[int, int]


class Answer(NamedTuple):
    """Where an answer stands in a text.

    Attributes:
        spans: what is learnt, in characters.
        is_exact: each text of the message is there as it is, blanks at its ends included.
        is_marked: the template's marks, where it has any, hold all of it.
        end: behind the message's texts; what follows ends the turn. None beside tool calls.
    """

    spans: list[Span]
    end: int | None
    is_exact: bool = True
    is_marked: bool = True


class Rendering(NamedTuple):
    """A text of a conversation.

    Attributes:
        text: what the template has written.
        answers: those that are learnt in it, in order.
        is_asked: everything that is no answer stands in it.
    """

    text: str
    answers: list[Answer]
    is_asked: bool


class ChatTemplate:
    """The chat template of a tokenizer. Safe to call from several threads.

    Args:
        tokenizer: has one.
        arguments: further variables of the template.

    Raises:
        UserError: there is no template, it cannot be read, or it knows no such variable.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any]) -> None:
        try:
            self._template = tokenizer.get_chat_template()
            self._with_tools = tokenizer.get_chat_template(tools=[])
            known = variables(self._template) | variables(self._with_tools)
        except ValueError as error:
            raise UserError(
                "data.format='chat': the tokenizer has no chat_template that can be used, which "
                "says how a conversation is written; give one in data.chat_template: its text, or "
                "a file such as an instruct model's chat_template.jinja "
                f"({str(error)[:120]})"
            ) from error
        unknown = sorted(arguments.keys() - known)
        if unknown:
            raise UserError(
                f"data.chat_template_kwargs: {', '.join(unknown)}: the tokenizer's chat template "
                f"knows no such variable; it has: {', '.join(sorted(known))}"
            )
        self._variables: dict[str, Any] = {**tokenizer.special_tokens_map, **arguments}
        self._lock = threading.Lock()  # of jinja's marks, which know one rendering at a time
        self.tells_the_date = "strftime_now" in known and "date_string" not in arguments

    def render(self, conversation: Conversation, last_only: bool, where: str) -> list[Rendering]:
        """The texts in which a conversation's answers are learnt, each answer in one of them.

        Args:
            conversation: has an answer.
            last_only: learn the last answer alone.
            where: the row, for messages.

        Raises:
            BadRow: the template refuses the conversation, or leaves a part of an answer, the tools
                or the documents out.
        """
        # Templates differ in what they take for an answer that is nothing but a call. The first
        # would never be written as a text of its own.
        contents = ("", None) if any(m["content"] is None for m in conversation.messages) else ("",)
        refused: BadRow | None = None
        for content in contents:
            messages = [
                {**m, "content": content} if m["content"] is None else m
                for m in conversation.messages
            ]
            try:
                with self._lock:
                    row = _Row(self, conversation._replace(messages=messages), where)
                    return row.renderings(last_only)
            except BadRow as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def template_for(self, conversation: Conversation) -> str:
        """Tokenizers may have one for conversations with tools."""
        return self._template if conversation.tools is None else self._with_tools

    @property
    def variables(self) -> dict[str, Any]:
        """What every rendering is given."""
        return self._variables


class _Row:
    """A conversation on its way through a template."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, where: str) -> None:
        self._conversation = conversation
        self._messages = conversation.messages
        self._where = where
        self._template = template.template_for(conversation)
        self._is_marked = _MARKED.search(self._template) is not None
        self._variables = {**template.variables, **conversation.arguments}
        known = variables(self._template)
        beside = {"tools": conversation.tools, "documents": conversation.documents}
        given = {name for name, value in beside.items() if value} | conversation.arguments.keys()
        if given - known:
            raise BadRow(
                where,
                f"the chat template does not write {', '.join(sorted(given - known))}, which the "
                f"row has; give one that does in data.chat_template, or leave the column out",
            )

    def renderings(self, last_only: bool) -> list[Rendering]:
        numbers = [
            i
            for i, message in enumerate(self._messages)
            if message["role"] == ASSISTANT and message.get("weight", 1)
        ]
        found: list[tuple[str, list[Answer], int]] = []
        for number in numbers[-1:] if last_only else numbers:
            text, answer = self._answer(number)
            before = found.pop() if found and text.startswith(found[-1][0]) else ("", [], 0)
            found.append((text, [*before[1], answer], number))
        return [
            Rendering(text, answers, self._is_asked(text, number))
            for text, answers, number in found
        ]

    def _answer(self, number: int) -> tuple[str, Answer]:
        """The text up to an answer, and where in it that stands."""
        message = self._messages[number]
        text, marks = self._write(number + 1)
        prompt = self._prompt(number)
        is_prompted = bool(prompt) and text.startswith(prompt)
        shared = len(prompt) if is_prompted else _shared(prompt, text)
        places = self._places(message, number, text, shared, is_prompted)
        is_exact = all(place.is_exact for place in places)
        end = None if message.get("tool_calls") else places[-1].stop if places else shared
        start = shared
        if places and not is_prompted:
            start = min(start, places[0].start) if prompt else places[0].start
        if not self._is_marked:
            return text, Answer([(start, len(text))], end, is_exact)
        spans = [mark for mark in marks if mark[1] > start]
        held = all(any(a <= max(p.start, start) and p.stop <= b for a, b in spans) for p in places)
        return text, Answer(spans, end, is_exact, held and bool(spans))

    def _prompt(self, number: int) -> str:
        """What is written before an answer is given; empty where the template refuses that."""
        for prompt in (True, False):
            with suppress(BadRow):  # as where a conversation begins with an answer
                return self._write(number, prompt)[0]
        return ""

    def _places(
        self, message: Message, number: int, text: str, shared: int, is_prompted: bool
    ) -> list[Place]:
        """Where an answer's texts stand: behind the prompt, or begun by it (`<think>`)."""
        places: list[Place] = []
        for key, piece in pieces(message):
            after = places[-1].stop if places else 0
            place = find(piece, text, max(after, shared)) if is_prompted else None
            if place is None:
                place = find(piece, text, max(after, _begun(piece, text, shared)))
            if place is None:
                place = find(piece, text, max(after, shared))
            if place is None:
                raise BadRow(
                    self._where,
                    f"message {number + 1}: the chat template does not write all of its {key} "
                    f"({piece[:40]!r}); give one that does in data.chat_template, or drop that "
                    "part from the data",
                )
            places.append(place)
        for piece in calls(message):
            if find(piece, text, shared) is None:
                raise BadRow(
                    self._where,
                    f"message {number + 1}: the chat template does not write its tool_calls "
                    f"({piece[:40]!r}); give one that does in data.chat_template",
                )
        return places

    def _is_asked(self, text: str, number: int) -> bool:
        missing = [
            name for name in tool_names(self._conversation.tools or []) if find(name, text) is None
        ]
        if missing:
            raise BadRow(
                self._where,
                f"the chat template does not write the tools {', '.join(missing)}; give one that "
                "does in data.chat_template",
            )
        return all(
            find(message["content"] or "", text) is not None
            for message in self._messages[:number]
            if message["role"] != ASSISTANT
        )

    def _write(self, number: int, prompt: bool = False) -> tuple[str, list[Span]]:
        """The first messages' text, and the template's marks of answers in it."""
        try:
            # Its annotation speaks of a single text.
            written: Any = render_jinja_template(
                [self._messages[:number]],
                tools=self._conversation.tools,
                documents=self._conversation.documents,
                chat_template=self._template,
                return_assistant_tokens_mask=self._is_marked,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except _TEMPLATE_ERRORS as error:
            raise BadRow(
                self._where,
                "the chat template refuses this conversation: "
                f"{type(error).__name__}: {str(error)[:200]}",
            ) from error
        texts, marks = written
        return texts[0], marks[0] if self._is_marked else []


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _begun(piece: str, text: str, end: int) -> int:
    """Where a piece begins whose beginning is the end of `text[:end]`, blanks aside; else `end`."""
    wanted = "".join(piece[:_OPENING].split())
    for start in range(max(0, end - _OPENING), end):
        begun = "".join(text[start:end].split())
        if begun and wanted.startswith(begun) and not text[start].isspace():
            return start
    return end
