"""What hides secrets: any form of them, in any text, and nothing else."""

import base64
import io
import json
import os
import sys
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sqlalchemy import make_url

from flagscale import secrets
from flagscale.errors import UserError
from flagscale.recipe import DataRecipe, parse_section

PLANTED = "Zq7/x+9=tR4 w'e\"B%ü"


@pytest.fixture(autouse=True)
def only_planted_secrets() -> Iterator[None]:
    before = dict(os.environ)
    for name in [n for n in os.environ if secrets.is_secret_name(n)]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=8, max_size=40),
    st.binary(max_size=4),
    st.binary(max_size=4),
)
def test_no_form_of_a_secret_gets_through(value: str, before: bytes, after: bytes) -> None:
    if len(value.strip()) < 8 or any(len(line.strip()) < 8 for line in value.splitlines()):
        return  # what is short hides harmless words: see the module
    os.environ["SOME_API_KEY"] = value
    try:
        for shown in (value, quote(value), quote(value, safe=""), quote_plus(value), repr(value)):
            assert secrets.mask(f"x {shown} y") != f"x {shown} y"
            assert value not in secrets.mask(f"x {shown} y")
        assert secrets.mask(f"a{value}b") == f"a{secrets.HIDDEN}b"
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(before + value.encode() + after).decode()
            masked = secrets.mask(text)
            # At each end at most one whole character of the value is in a group with others.
            whole = encode(value.encode()).decode().rstrip("=")
            assert whole not in masked
            assert len(masked.replace(secrets.HIDDEN, "")) <= len(text) - len(whole) + 4
    finally:
        del os.environ["SOME_API_KEY"]


@pytest.mark.parametrize(
    "shown", [PLANTED, json.dumps(PLANTED), json.dumps(PLANTED, ensure_ascii=False), repr(PLANTED)]
)
def test_escaped_forms(shown: str) -> None:
    os.environ["HF_TOKEN"] = PLANTED
    assert "Zq7" not in secrets.mask(f"cannot log in with {shown}")


def test_each_line_of_a_key() -> None:
    lines = ["MIIEvQIBADANBgkq", "hkiG9w0BAQEFAASC"]
    os.environ["GCS_PRIVATE_KEY"] = "\n".join(["-----BEGIN-----", *lines])
    assert secrets.mask(f"near {lines[1]} there") == "near *** there"
    assert secrets.mask(repr(os.environ["GCS_PRIVATE_KEY"])) == "'***'"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "aws_secret_access_key", "AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_PASSWORD"),
        "FLAGSCALE_MLFLOW_TRACKING_PASSWORD",
        *("AWS_SESSION_TOKEN", "WANDB_API_KEY", "CLIENT_SECRET", "AZURE_STORAGE_KEY"),
        *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY", "PGPASSWORD"),
        *("KFP_COOKIES", "SESSION_COOKIE", "DB_PASS", "PASS", "MYSQL_PWD", "github_pat"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert secrets.is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("PWD", "PATH", "TOKENIZERS_PARALLELISM", "MLFLOW_TRACKING_USERNAME", "HOSTNAME"),
        *("KFP_RUN_ID", "MLFLOW_RUN_ID", "SSH_AUTH_SOCK", "MAX_TOKENS"),
        *("OLDPWD", "MASTER_PATH", "COMPASS", "MULTIPASS", "LD_LIBRARY_PATH", "PASS_COUNT"),
    ],
)
def test_other_names(name: str) -> None:
    assert not secrets.is_secret_name(name)


def test_secrets_that_are_named() -> None:
    os.environ |= {"SSO": "planted-0001", "LOGIN": "planted-0002", "PLACE": "planted-0003"}
    os.environ["FLAGSCALE_SECRET_VARIABLES"] = "LOGIN, SSO,UNSET"
    assert secrets.mask("planted-0001 planted-0002 planted-0003") == "*** *** planted-0003"


@pytest.mark.parametrize(("password", "shown"), [(None, "***"), ("", "***"), ("p4ss", "ghp_Zx81")])
@pytest.mark.parametrize("whose", ["", "FLAGSCALE_"])
def test_a_token_given_as_the_user(password: str | None, shown: str, whose: str) -> None:
    os.environ[f"{whose}MLFLOW_TRACKING_USERNAME"] = "ghp_Zx81"
    if password is not None:
        os.environ[f"{whose}MLFLOW_TRACKING_PASSWORD"] = password
    assert secrets.mask("no user ghp_Zx81") == f"no user {shown}"


def test_the_place_of_a_secret_is_none() -> None:
    os.environ["GOOGLE_APPLICATION_CREDENTIALS"] = __file__
    assert secrets.mask(f"reading {__file__}") == f"reading {__file__}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("get https://me:pa55@host/a failed", "get https://***@host/a failed"),
        ("postgresql://me:p%40ss@host:5432/db", "postgresql://***@host:5432/db"),
        ("s3://key:se@cret@bucket/a@b", "s3://***@bucket/a@b"),
        ("https://hf_abc@huggingface.co/x", "https://***@huggingface.co/x"),
        ("s3://AKIA:se/cr+et@bucket/a@b", "s3://***@bucket/a@b"),
        ("postgresql://me@team:12/ab@db/a@b", "postgresql://***@db/a@b"),
        ("https://h/f?X-Amz-Signature=ab%2Fc&part=1", "https://h/f?X-Amz-Signature=***&part=1"),
        ("https://h/f?part=1&sig=abc", "https://h/f?part=1&sig=***"),
    ],
)
def test_urls(text: str, shown: str) -> None:
    assert secrets.hide_in_urls(text) == shown
    assert secrets.has_credentials(text)
    assert not secrets.has_credentials(shown.replace("***@", "").replace("***", ""))


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/x*.jsonl", "hf://datasets/a/b@main/f", "a@b.example", "python-docs"),
        *("abfs://container@account.dfs.core.windows.net/x", "https://host:8080/a@b?page=2"),
        *("http://127.0.0.1:5000", "sqlite:////a/b.db", "https://h/f?max_tokens=3"),
        *("http://[::1]:8080/a@b", '["https://h:80","a@b"]', "https://a:80 and a@b"),
    ],
)
def test_harmless_places(text: str) -> None:
    assert secrets.hide_in_urls(text) == text


@pytest.mark.parametrize("url", ["http://", "://a:b", '"mysql://host:3306/db",', "http://a:b/c"])
@pytest.mark.timeout(60)  # of a time that grows with the square it would be minutes
def test_a_long_text_ends(url: str) -> None:
    assert secrets.hide_in_urls(url * 20_000) == url * 20_000


_SEEN = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="@%")


@given(st.sampled_from(["postgresql", "mysql+pymysql", "mssql"]), st.text(_SEEN, min_size=1))
def test_any_password_that_sqlalchemy_takes(database: str, password: str) -> None:
    uri = f"{database}://me:{password}@db.example.com:5432/mlflow"
    assume(make_url(uri).password == password)
    assume("://" not in password)  # begins another URL, in a text of many
    assert secrets.hide_in_urls(f"at {uri}:") == f"at {database}://***@db.example.com:5432/mlflow:"


@given(
    st.sampled_from(["https://host", "http://10.0.0.1:8080", "hdfs://node:8020", "s3://bucket"]),
    st.text('ab0@:/.,-"<>?', max_size=20),
)
def test_an_at_in_the_path_is_harmless(place: str, path: str) -> None:
    assume("://" not in path)
    assert secrets.hide_in_urls(f"{place}/{path}") == f"{place}/{path}"


@pytest.mark.parametrize("short", [True, False])
def test_the_password_of_a_url_in_the_environment_is_hidden_anywhere(short: bool) -> None:
    password = "pa55" if short else "pa55%20word"
    os.environ["DATABASE"] = f"postgresql://me:{password}@db/mlflow"
    text = "no access with 'pa55 word' to postgresql://me:pa55%20word@db/mlflow"
    hidden = "'pa55 word'" if short else "'***'"
    assert secrets.mask(text) == f"no access with {hidden} to postgresql://***@db/mlflow"


def test_split_credentials() -> None:
    split = secrets.split_credentials
    assert split("http://me:p%40ss@h:5/x") == ("http://h:5/x", "me", "p@ss")
    assert split("http://me@h") == ("http://h", "me", None)
    assert split("http://h:5/x") == ("http://h:5/x", None, None)


def test_a_stream_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", raw)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    os.environ["HF_TOKEN"] = PLANTED
    secrets.mask_output()
    secrets.mask_output()  # once is enough
    print("a", PLANTED, flush=True)  # noqa: T201
    sys.stdout.writelines(["b ", PLANTED])
    sys.stdout.flush()
    assert sys.stdout.write(PLANTED) == len(PLANTED)
    assert sys.stdout.encoding == "utf-8"
    assert raw.buffer.getvalue().decode() == "a ***\nb ***"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "values",
    [
        {"source": "s3://AKIA:planted-secret@bucket/a"},
        {"tokenizer": "https://me:planted-secret@host/tokenizer"},
        {"blend": [{"name": "a", "source": "https://host/f?token=planted-secret"}]},
        {"source": "s3://AKIA:planted-secret@bucket/a", "soruce": "s3://k:planted-secret@b"},
        {"source": ["s3://AKIA:planted-secret@bucket/a"]},
    ],
)
def test_a_recipe_with_credentials_is_refused(values: dict) -> None:
    with pytest.raises(UserError) as error:
        parse_section(DataRecipe, values, where="recipe r.yaml")
    assert "planted-secret" not in str(error.value)
    assert "***" in str(error.value)


def test_the_refusal_says_what_would_be_right() -> None:
    with pytest.raises(UserError, match=r"source=s3://\*\*\*@b: holds credentials.*AWS_ACCESS_KEY"):
        parse_section(DataRecipe, {"source": "s3://k:s@b"}, where="recipe r.yaml")
