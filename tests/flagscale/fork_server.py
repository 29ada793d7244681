"""python and torchrun for tests: processes are forks of one that has imported what they run.

Most of a tiny test's process is its imports: seconds each. A fork has them already, and nothing
else of the tests before it. Everything after the start is the same: processes of their own that
hear signals, gloo between ranks, an exit code. The start of Python and torchrun itself are tried in
`tests/flagscale/execution` and in the pipelines' tests.

    python fork_server.py serve SOCKET
    python fork_server.py SOCKET RANKS [-I] SCRIPT.py ARGUMENT...
    python fork_server.py SOCKET RANKS -m MODULE ARGUMENT...
    python fork_server.py SOCKET RANKS -c CODE ARGUMENT...

RANKS is 0 for a process that is no rank.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

PRELOADED = (
    "flagscale.execution.launch",
    "flagscale.steps.prepare_data",
    "flagscale.steps.prepare_teacher",
    "flagscale.steps.convert_student",
    "flagscale.steps.cache_teacher",
    "flagscale.steps.distil_student",
    "flagscale.steps.evaluate",
    "flagscale.steps.export_student",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.llama.modeling_llama",
)
_PATIENCE = 30  # seconds that torchrun gives ranks after SIGTERM when one of them has failed


class ForkServer:
    """Started by the first command that is asked for; ends with this process.

    Args:
        folder: for its socket.
    """

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "socket"
        self._process: subprocess.Popen[bytes] | None = None

    def python(self, *what: object) -> list[str]:
        """What runs a script, `-m` and a module or `-c` and code as `python` would.

        The code runs in another process than the one that this command starts, which passes
        SIGTERM and SIGINT on, ends as that does, and takes it along when it is killed.
        """
        return self.command(0, *what)

    def command(self, ranks: int, *what: object) -> list[str]:
        """What runs a script, or `-m` and a module, in as many ranks and ends with their code."""
        if self._process is None:
            command = [sys.executable, __file__, "serve", str(self._socket)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, **pipes)
            assert self._process.stdout.readline() == b"ready\n"
        return _client(self._socket, ranks, *what)

    def close(self) -> None:
        """End it; its ranks end with those that wait for them."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()


def _client(path: object, ranks: int, *what: object) -> list[str]:
    return [*map(str, (sys.executable, "-I", "-S", __file__, path, ranks, *what))]


def serve(path: str) -> None:
    """Fork for each that connects, until standard input ends. No thread may run here."""
    import gc
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    loader = importlib.import_module("flagscale.models.fresh_process")
    loader.python = lambda: _client(path, 0, "-I")
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who serve
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        os.write(1, b"ready\n")
        os.dup2(2, 1)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _serve_one(connection)
            connection.close()


def _serve_one(connection: socket.socket) -> None:
    """Fork the processes, wait for them, answer with their exit code."""
    text, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    request = json.loads(text)
    for file, number in zip(files, (1, 2), strict=True):
        os.dup2(file, number)
        os.close(file)
    ranks = request["processes"]
    if not ranks:
        pid = os.fork()
        if pid == 0:
            connection.close()
            _run(request["environment"], request)
        connection.send(f"{_wait([pid], connection)}\n".encode())
        os._exit(0)
    read, write = os.pipe()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(write)
            connection.close()
            _run(_rank_environment(rank, read, request), request)
        pids.append(pid)

    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # has threads
    os.write(write, f"{store.port:05d}".encode() * ranks)
    connection.send(f"{int(_wait(pids, connection) != 0)}\n".encode())
    os._exit(0)


def _wait(pids: list[int], connection: socket.socket) -> int:
    """Until all have ended; the others are ended when one has failed, or nobody waits any more.

    Numbers of signals that arrive are passed on.

    Returns:
        0, or what the first one that failed ended with: its exit code, or minus a signal.
    """
    running = {os.pidfd_open(pid): pid for pid in pids}
    asker: list[socket.socket] = [connection]
    code, patience = 0, None
    while running:
        ready, _, _ = select.select([*running, *asker], [], [], patience)
        signals = connection.recv(16) if connection in ready else b""
        for number in signals:
            _tell(running, number)
        if not ready or (connection in ready and not signals):
            _tell(running, signal.SIGKILL)
            asker, patience = [], None
        for file in running.keys() & set(ready):
            _, status = os.waitpid(running.pop(file), 0)
            if status and not code:
                code, patience = os.waitstatus_to_exitcode(status), _PATIENCE
                _tell(running, signal.SIGTERM)
    return code


def _tell(running: dict[int, int], number: int) -> None:
    for file in running:
        signal.pidfd_send_signal(file, number)


def _rank_environment(rank: int, port: int, request: dict) -> dict[str, str]:
    """With what torchrun gives a rank; blocks until there is a port."""
    return request["environment"] | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(request["processes"]),
        "LOCAL_WORLD_SIZE": str(request["processes"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.read(port, 5).decode(),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "forked",
    }


def _run(environment: dict[str, str], request: dict) -> None:
    """The whole life of a process."""
    import runpy
    import traceback
    import types

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    added = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in added if path and path not in sys.path]
    code = 0
    try:
        kind, *others = request["what"]
        if kind == "-m":
            sys.argv = others
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = [kind, *others[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(others[0], vars(main))  # as Python does
        else:
            sys.argv = others if kind == "-I" else [kind, *others]
            if kind != "-I":
                sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ask(path: str, ranks: str, *what: str) -> int:
    """Have it run, with this process' environment, folder and output.

    Returns:
        Its exit code, or minus the signal that ended it.
    """
    request = {
        "processes": int(ranks),
        "what": what,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        text = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [text], [1, 2])
        connection.sendall(text[sent:])
        answer = connection.recv(16)
        return int(answer) if answer else 1


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        code = ask(*sys.argv[1:])
        if code < 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        sys.exit(code)
