"""Keeps secrets out of what is printed and stored: logs, errors, notes, MLflow, recipes.

Secrets reach a process as environment variables. Known by their names (`HF_TOKEN`,
`AWS_SECRET_ACCESS_KEY`, ... and those that `FLAGSCALE_SECRET_VARIABLES` lists, with commas) or as
the password in a URL, their values are replaced by `***`, plain, URL-encoded, escaped or in base64,
wherever `mask` is applied: `mask_output` applies it to everything that Python writes to stdout and
stderr. It does not see what C code or other programs write to the file descriptors, nor a value
that is written piece by piece.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from functools import lru_cache
from typing import Any, TextIO, cast
from urllib.parse import quote, quote_plus, unquote, urlsplit, urlunsplit

from flagscale import variables

HIDDEN = "***"
_SHORTEST = 8  # characters: a shorter value would also hide harmless words
_SECRET_NAME = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIALS?|CONNECTION_STRING|"
    r"(SECRET|ACCESS|API|PRIVATE|ACCOUNT|STORAGE|ENCRYPTION|SIGNING|AUTH|SHARED)_?KEY(_ID)?|"
    r"(^|_)(PASS|PAT|COOKIES?)|_PWD)$",  # as whole words; `PWD` alone is a folder
    re.IGNORECASE,
)
# What stands before the `@` of a URL. A password may hold what ends a host (`/`, quotes, `<`, `>`),
# as SQLAlchemy takes it; but https://host:8080/a@b has a port and a path, save where a database is.
# A user without a password is one only of a web server: abfs://container@account is a place.
_USER_INFO = re.compile(
    r"""
    (?P<scheme> https?:// | (?P<database> (postgres(ql)?|mysql|mariadb|mssql|oracle)(\+\w+)?:// )
              | :// )
    (?P<user_info>
        [^/\s:'"<>[]*: (?(database) | (?! \d+[/'"<>] ))  ((?!://)[^\s@])+ (@[^\s@/'"<>]+)*
      | (?: (?<=https://) | (?<=http://) | (?=[^/\s:]*:) )  [^/\s'"<>]+
    )
    (?=@)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SIGNED = re.compile(
    r"(?<=[?&])((?:[\w.-]*[_-])?(?:token|signature|sig|password|secret|credential|api_?key|"
    r"access_?key)(?:_?id)?)=([^&\s'\"<>]+)",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name is expected to hold a secret."""
    return _SECRET_NAME.search(name) is not None


def mask(text: str) -> str:
    """The text with every secret of this process's environment, and any URL's, hidden."""
    pattern = _pattern(tuple(os.environ.items()))
    if pattern is not None:
        text = pattern.sub(HIDDEN, text)
    return hide_in_urls(text)


def hide_in_urls(text: str) -> str:
    """The text with `user:password@` and signed queries of URLs hidden."""
    return _SIGNED.sub(rf"\1={HIDDEN}", _USER_INFO.sub(rf"\g<scheme>{HIDDEN}", text))


def has_credentials(text: str) -> bool:
    """Whether the text holds a URL with a user, a password, a token or a signature in it."""
    return hide_in_urls(text) != text


def split_credentials(url: str) -> tuple[str, str | None, str | None]:
    """A URL without its credentials, the user, and the password; None for what is not there."""
    parts = urlsplit(url)
    user_info, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None, None
    user, colon, password = user_info.partition(":")
    clean = urlunsplit(parts._replace(netloc=host))
    return clean, unquote(user), unquote(password) if colon else None


def mask_output() -> None:
    """From here on, hide secrets in all that this process writes to `sys.stdout` and `stderr`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, MaskedStream):
            setattr(sys, name, MaskedStream(stream))


def masked(stream: TextIO) -> TextIO:
    """The stream, with secrets hidden in what is written."""
    return cast(TextIO, MaskedStream(stream))


class MaskedStream:
    """A text stream that hides secrets in what is written; else the stream that it is given."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write with secrets hidden; gives the length of `text`, as whoever writes expects."""
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the stream has
        return getattr(self._stream, name)


@lru_cache(maxsize=8)
def _pattern(environment: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    """Matches every form of every secret in the environment, the longest first."""
    forms = {form for value in _secrets(environment) for form in _forms(value)}
    long = sorted((form for form in forms if len(form) >= _SHORTEST), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, long))) if long else None


def _secrets(environment: tuple[tuple[str, str], ...]) -> set[str]:
    values, found = dict(environment), set()
    named = {name.strip() for name in values.get(variables.SECRETS, "").split(",")}
    for prefix in ("", "FLAGSCALE_"):
        if not values.get(f"{prefix}MLFLOW_TRACKING_PASSWORD"):  # the user is a token then
            named.add(f"{prefix}MLFLOW_TRACKING_USERNAME")
    for name, value in environment:
        is_secret = name in named or is_secret_name(name)
        if is_secret and not os.path.exists(value):  # of a file, only its place
            found.update([value, value.strip()])
        for match in _USER_INFO.finditer(value):
            user_info = match["user_info"]
            password = user_info.partition(":")[2] or user_info
            found.update([user_info, password, unquote(password)])
    return {value for value in found if len(value) >= _SHORTEST}


def _forms(value: str) -> set[str]:
    """How a value may stand in a text: as it is, line by line, escaped, encoded."""
    lines = [line.strip() for line in value.splitlines()]
    plain = {value, *(line for line in lines if len(line) >= _SHORTEST)}
    forms = set(plain)
    for text in plain:
        forms |= {quote(text), quote(text, safe=""), quote_plus(text)}
        forms |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        forms.add(repr(text)[1:-1])
    return forms | _base64_forms(value)


def _base64_forms(value: str) -> set[str]:
    """What of a value's base64 is the same whatever stands before and after it."""
    forms = set()
    raw = value.encode()
    for before in range(3):  # bytes before it in its group of three, as in `user:password`
        whole = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
        cut = (before + len(raw)) % 3  # the last character then depends on what follows
        part = whole[(0, 2, 3)[before] : len(whole) - (1 if cut else 0)]
        forms |= {part, part.replace("+", "-").replace("/", "_")}
    return forms
