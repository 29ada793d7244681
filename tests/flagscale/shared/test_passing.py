"""What of an object store is waited out: a server that comes back, and what it says meanwhile."""

import logging
import socket
import ssl
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import botocore.exceptions
import pytest
import s3fs
from moto.s3.responses import S3Response

from flagscale.errors import UserError
from flagscale.patience import pauses
from flagscale.shared import store
from flagscale.shared.passing import passes
from flagscale.shared.store import ObjectStore

Answer = tuple[int, dict[str, str], str]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ours, and none of the libraries' own attempts."""
    monkeypatch.setenv("FLAGSCALE_PATIENCE_SECONDS", "0.01")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[Answer]], list[str]]:
    """Lets the server give these answers to the next requests of a kind, then work."""

    def answer(method: str, answers: list[Answer]) -> list[str]:
        asked: list[str] = []
        work = getattr(S3Response, method)

        def respond(self: S3Response, *arguments: object) -> object:
            asked.append(method)
            return answers.pop(0) if answers else work(self, *arguments)

        monkeypatch.setattr(S3Response, method, respond)
        return asked

    return answer


def error(status: int, code: str) -> Answer:
    content = f"<Error><Code>{code}</Code><Message>told by the server</Message></Error>"
    return status, {"Content-Type": "application/xml"}, content


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, "InternalError"),
        (502, "BadGateway"),
        (503, "ServiceUnavailable"),
        (429, "TooManyRequests"),
        (400, "RequestTimeout"),
    ],
)
def test_passing_answers_are_waited_out(
    bucket: str, answer: Callable, caplog: pytest.LogCaptureFixture, status: int, code: str
) -> None:
    asked = answer("put_object", [error(status, code)] * 2)
    ObjectStore(bucket).write("a", b"content")
    assert ObjectStore(bucket).read("a") == b"content"
    assert len(asked) == 3
    told = [record.getMessage() for record in caplog.records]
    assert [f"cannot access {bucket}/a: " in line for line in told] == [True, True]
    assert all("trying again in 0 s" in line for line in told)


def test_after_minutes_it_is_given_up(bucket: str, answer: Callable) -> None:
    asked = answer("put_object", [error(503, "ServiceUnavailable")] * 99)
    with pytest.raises(UserError, match=r"/a: cannot be written: .*told by the server"):
        ObjectStore(bucket).write("a", b"")
    assert len(asked) == len(pauses()) + 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (404, "NoSuchBucket"),
        (400, "InvalidRequest"),
        (501, "NotImplemented"),
    ],
)
def test_lasting_answers_are_told_at_once(
    bucket: str, answer: Callable, status: int, code: str
) -> None:
    asked = answer("put_object", [error(status, code)] * 99)
    with pytest.raises(UserError, match=r"/a: cannot be written"):
        ObjectStore(bucket).write("a", b"")
    assert len(asked) == 1


def test_who_is_not_patient_is_told_at_once(bucket: str, answer: Callable) -> None:
    asked = answer("put_object", [error(503, "ServiceUnavailable")] * 99)
    with pytest.raises(UserError):
        ObjectStore(bucket, patient=False).below("folder").write("a", b"")
    assert len(asked) == 1


def test_an_upload_goes_on_with_the_files_that_failed(
    bucket: str, answer: Callable, tmp_path: Path
) -> None:
    files = {}
    for number in range(20):
        files[f"{number:02}"] = tmp_path / str(number)
        files[f"{number:02}"].write_text(str(number))
    ObjectStore(bucket).put(files)
    asked = answer("put_object", [error(500, "InternalError")])
    ObjectStore(bucket).put(files)
    assert len(asked) <= 20 + store._AT_ONCE
    answer("get_object", [error(500, "InternalError")])
    ObjectStore(bucket).get({name: tmp_path / "back" / name for name in files})
    assert {p.name: p.read_text() for p in (tmp_path / "back").iterdir()} == {
        name: path.read_text() for name, path in files.items()
    }


def test_a_server_that_comes_back_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, s3_server: str
) -> None:
    """Nobody listens at first; then the same address answers."""
    import boto3
    from moto.server import ThreadedMotoServer

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: connections are refused
        port = taken.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        servers = []
        name = f"bucket-{uuid.uuid4().hex[:8]}"

        class Begin(logging.Handler):
            """Starts the server once the store has waited for it."""

            def emit(self, record: logging.LogRecord) -> None:
                if not servers:
                    taken.close()
                    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
                    servers.append(server)
                    server.start()
                    boto3.client("s3").create_bucket(Bucket=name)

        begin = Begin()
        monkeypatch.setattr(logging.getLogger("flagscale.patience"), "handlers", [begin])
        ObjectStore(f"s3://{name}").write("a", b"content")
        assert ObjectStore(f"s3://{name}").read("a") == b"content"
        servers[0].stop()


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(113, "No route to host"), True),
        (OSError(5, "Input/output error"), False),
        (PermissionError("no"), False),
        (ValueError("no"), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), True),
        (botocore.exceptions.SSLError(endpoint_url="https://x", error="certificate"), False),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), True),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), False),
        (chained(OSError("?"), ConnectionRefusedError()), True),
        (chained(ConnectionError(), ssl.SSLCertVerificationError("expired")), False),
        (
            chained(
                botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
                socket.gaierror(socket.EAI_NONAME, "unknown"),
            ),
            False,
        ),
    ],
    ids=repr,
)
def test_what_passes(error: BaseException, expected: bool) -> None:
    assert passes(error) is expected


def test_a_cause_that_was_raised_from_its_effect() -> None:
    effect, cause = OSError("?"), ConnectionResetError()
    effect.__cause__, cause.__cause__ = cause, effect
    assert passes(effect)
