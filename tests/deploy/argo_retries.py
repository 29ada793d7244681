"""Which attempts Argo repeats, read from its ConfigMap `workflow-controller-configmap`.

`docs/retries.md` and `processNodeRetries` of Argo Workflows 4: the policy is asked for the kind of
failure, then the expression. Expressions are those of expr-lang, as far as one needs them here;
what is not known is an error, as it is to Argo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

CONFIG_MAP, KEY = "workflow-controller-configmap", "workflowDefaults"
KINDS = {
    "Always": ("Failed", "Error"),
    "OnFailure": ("Failed",),
    "OnError": ("Error",),
    "OnTransientError": (),  # by the controller's own pattern
}
_TOKEN = re.compile(r'\s*("[^"]*"|\d+|[A-Za-z_][\w.]*|\|\||&&|[=!]=|[!()\[\],])')
_OPERATORS = {"||": 1, "&&": 2, "==": 3, "!=": 3, "in": 3, "contains": 3}  # binding strength


class ExpressionError(ValueError):
    """Argo would fail the step that it is asked about."""


@dataclass(frozen=True)
class Attempt:
    """An attempt that ended badly, as `lastRetry` says it; Argo writes numbers as texts."""

    status: str
    exitCode: str = "-1"  # noqa: N815 - Argo's
    message: str = ""
    duration: str = "60"


VANISHED = Attempt("Error", message="pod deleted")
STOPPED = Attempt("Failed", "143", "Error (exit code 143)")
KILLED = Attempt("Failed", "137", "Error (exit code 137)")
OUT_OF_MEMORY = Attempt("Failed", "137", "OOMKilled (exit code 137)")
MISTAKE = Attempt("Failed", "1", "Error (exit code 1)")
DAG = Attempt("Failed", message="child 'distillation-x4k9z-1' failed")  # one that holds a mistake


@dataclass(frozen=True)
class Policy:
    """The retryStrategy that every template gets.

    Attributes:
        given: whether there is one; without it only the steps' own counts are there.
        limit: of the DAGs around the steps; None: without end.
        kinds: states of an attempt that are repeated.
        expression: must hold too; None: there is none.
    """

    given: bool
    limit: int | None
    kinds: tuple[str, ...]
    expression: str | None

    @classmethod
    def read(cls, data: Mapping[str, str] | None) -> Policy:
        """From the ConfigMap's data."""
        defaults = yaml.safe_load((data or {}).get(KEY) or "") or {}
        templates = (defaults.get("spec") or {}).get("templateDefaults") or {}
        strategy = templates.get("retryStrategy") or {}
        expression = strategy.get("expression")
        default = "Always" if expression else "OnFailure"
        kinds = KINDS[strategy.get("retryPolicy") or default]
        limit = strategy.get("limit")
        return cls(bool(strategy), None if limit is None else int(limit), kinds, expression)

    def repeats(self, attempt: Attempt) -> bool:
        """Whether another attempt follows, as long as there are some left."""
        if attempt.status not in self.kinds:
            return False
        return self.expression is None or evaluate(self.expression, {"lastRetry": asdict(attempt)})

    def faults(self) -> list[str]:
        """What it does wrong; nothing for the policy of deploy/components/retry-policy."""
        wanted = {
            "a pod that vanished": (VANISHED, True),
            "a pod that was stopped (143)": (STOPPED, True),
            "a pod that was killed (137)": (KILLED, True),
            "a step out of memory": (OUT_OF_MEMORY, False),
            "a mistake": (MISTAKE, False),
        }
        found = [
            f"{name} is {'not ' if is_wanted else ''}repeated"
            for name, (attempt, is_wanted) in wanted.items()
            if self.repeats(attempt) != is_wanted
        ]
        if self.given and self.repeats(DAG):
            times = "without end" if self.limit is None else f"{self.limit} times more"
            found.append(f"each DAG around a failed step begins again, {times}")
        elif self.given and self.limit is None:
            found.append("a DAG around a vanished pod begins again without end: there is no limit")
        return found


def evaluate(expression: str, names: Mapping[str, Any]) -> bool:
    """What an expression says; raises `ExpressionError`."""
    tokens, at = [], 0
    while expression[at:].strip():
        found = _TOKEN.match(expression, at)
        if found is None:
            raise ExpressionError(f"{expression[at:]!r}: not of an expression")
        tokens.append(found[1])
        at = found.end()
    parser = _Parser([*tokens, ""], names)
    value = parser.binary(0)
    if parser.next() or not isinstance(value, bool):
        raise ExpressionError(f"{expression!r}: no condition")
    return value


class _Parser:
    """Reads and evaluates at once; both sides of an operator are always read."""

    def __init__(self, tokens: list[str], names: Mapping[str, Any]) -> None:
        self.tokens, self.names = tokens, names

    def next(self, expected: str | None = None) -> str:
        token = self.tokens.pop(0)
        if expected is not None and token != expected:
            raise ExpressionError(f"{token!r} in place of {expected!r}")
        return token

    def binary(self, strength: int) -> Any:
        left = self.unary()
        while _OPERATORS.get(self.tokens[0], 0) > strength:
            operator = self.next()
            left = _apply(operator, left, self.binary(_OPERATORS[operator]))
        return left

    def unary(self) -> Any:
        token = self.next()
        if token == "!":
            value = self.unary()
            if not isinstance(value, bool):
                raise ExpressionError(f"!{value!r}: no condition")
            return not value
        if token == "(":
            value = self.binary(0)
            self.next(")")
            return value
        if token == "[":
            return self._items()
        if token[:1] == '"':
            return token[1:-1]
        if token.isdigit():
            return int(token)
        return self._named(token)

    def _items(self) -> list[Any]:
        items = [self.binary(0)]
        while self.tokens[0] == ",":
            self.next()
            items.append(self.binary(0))
        self.next("]")
        return items

    def _named(self, token: str) -> Any:
        if token == "asInt":
            self.next("(")
            value = self.binary(0)
            self.next(")")
            return int(value)
        value: Any = self.names
        for part in token.split("."):
            if part not in value:
                raise ExpressionError(f"{token}: unknown")
            value = value[part]
        return value


def _apply(operator: str, left: Any, right: Any) -> bool:
    sides = {"||": (bool, bool), "&&": (bool, bool), "contains": (str, str)}
    kinds = sides.get(operator, (object, list if operator == "in" else type(left)))
    if not (isinstance(left, kinds[0]) and isinstance(right, kinds[1])):
        raise ExpressionError(f"{left!r} {operator} {right!r}: of other kinds")
    results = {
        "||": lambda: left or right,
        "&&": lambda: left and right,
        "==": lambda: left == right,
        "!=": lambda: left != right,
        "in": lambda: left in right,
        "contains": lambda: right in left,
    }
    return bool(results[operator]())
