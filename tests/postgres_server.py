"""A PostgreSQL server of a test's own."""

import contextlib
import glob
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
needs_postgres = pytest.mark.skipif(
    not PROGRAMS and os.environ.get("CI") != "true",  # there it must be
    reason="needs PostgreSQL (Debian: postgresql)",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres(password: str) -> Iterator[int]:
    """Its port; the user `mlflow` has the password, and an empty database of that name."""
    assert PROGRAMS, "PostgreSQL is not installed (Debian: postgresql)"
    programs = Path(PROGRAMS[-1])
    as_postgres = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="mlflow-database-"))  # pytest's own are root's alone
    try:
        note = folder / "password"
        note.write_text(password)
        if as_postgres:
            shutil.chown(folder, "postgres")
            shutil.chown(note, "postgres")
        data, port = folder / "data", free_port()
        rules = ["--auth=scram-sha-256", f"--pwfile={note}", "--username=mlflow", "--no-sync"]
        subprocess.run(
            [*as_postgres, programs / "initdb", *rules, "-D", data], check=True, capture_output=True
        )
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        control = [*as_postgres, programs / "pg_ctl", "-D", data, "-w"]
        log = ["-l", folder / "log"]
        subprocess.run([*control, *log, "-o", options, "start"], check=True, capture_output=True)
        try:
            createdb = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow"]
            known = {**os.environ, "PGPASSWORD": password}
            subprocess.run([*createdb, "mlflow"], env=known, check=True)
            yield port
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True)
    finally:
        shutil.rmtree(folder)
