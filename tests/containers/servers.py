"""PostgreSQL, MLflow in a container of its own, and before it a gate that asks for a password."""

from __future__ import annotations

import base64
import http.client
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from engine import Engine, postgresql_folders

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class PostgreSQL:
    """A database server in a folder, run by the user `postgres`: it refuses to be root's."""

    def __init__(self, folder: Path, password: str) -> None:
        self._bin = Path(postgresql_folders()[0])
        self._data = folder / "data"
        self.port = free_port()
        self.password = password
        folder.mkdir()
        secret = folder / "password"
        secret.write_text(password)
        for path in (folder, secret):
            shutil.chown(path, "postgres")
        self._run("initdb", "-D", self._data, "-U", "mlflow", "-A", "scram-sha-256",
                  f"--pwfile={secret}", "--no-sync")  # fmt: skip
        secret.unlink()
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off -k {folder}"
        log = folder / "log"
        self._run("pg_ctl", "-D", self._data, "-l", log, "-w", "-o", options, "start")
        self._run("createdb", *self._where, "mlflow")

    @property
    def _where(self) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow"]

    def dump(self) -> bytes:
        """Everything that the database holds, as text."""
        return self._run("pg_dump", *self._where, "mlflow")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: object) -> bytes:
        return subprocess.run(
            ["runuser", "-u", "postgres", "--", self._bin / program, *map(str, arguments)],
            cwd="/",
            env={"PATH": os.environ["PATH"], "PGPASSWORD": self.password},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout


@contextmanager
def mlflow_server(
    engine: Engine, image: str, database: PostgreSQL, artifacts: Path
) -> Iterator[int]:
    """MLflow in a container with a read-only root; yields its port."""
    artifacts.mkdir()
    os.chown(artifacts, 1000, 1000)
    port = free_port()
    store = f"postgresql+psycopg2://mlflow@127.0.0.1:{database.port}/mlflow"
    name = engine.podman(
        "run", "--detach", "--network=host", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL",
        "--security-opt=no-new-privileges", "--env=PGPASSWORD",
        "--env=MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false",
        f"--env=MLFLOW_ARTIFACTS_DESTINATION={artifacts}", f"--volume={artifacts}:{artifacts}",
        image, "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1",
        f"--backend-store-uri={store}", "--serve-artifacts",
        secrets={"PGPASSWORD": database.password},
    )  # fmt: skip
    try:
        _wait(engine, name, port)
        yield port
    finally:
        engine.podman("rm", "--force", name)


def _wait(engine: Engine, name: str, port: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline, engine.podman("logs", name)
            time.sleep(0.5)


@contextmanager
def gate(port: int, user: str, password: str) -> Iterator[int]:
    """Passes requests on to a port where they bring the password (HTTP basic); yields its own."""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Basic {token}":
                self._answer(401, {}, b"")
                return
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers))
            found = upstream.getresponse()
            self._answer(found.status, dict(found.headers), found.read())
            upstream.close()

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in _HOP:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
