"""A web server of a folder that has troubles: it answers 503, hangs up, or breaks off half-way.

It also speaks as much of the Hugging Face hub's protocol as fetching a model or a dataset takes.
"""

import hashlib
import json
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "c" * 40
HANGS_UP, HALF = "hangs up", "half"


class WebServer:
    """The server.

    Attributes:
        folder: what it serves; `/OWNER/NAME/resolve/REVISION/FILE` is FILE in it.
        troubles: of the next requests for files, one each: a status, `HANGS_UP` or `HALF`; 200 is
            none.
        requests: what was asked for.
        tells: whether it says when a file was changed.
        commit: of everything on the hub that it plays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.troubles: list[int | str] = []
        self.requests: list[str] = []
        self.tells = True
        self.commit = COMMIT
        handler = type("Handler", (_Handler,), {"web": self})
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(handler, directory=str(folder))
        )
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.web.requests.append(f"{self.command} {self.path}")
        self._half = False
        if "/tree/" in self.path:
            self._send_tree(self.path.partition("?")[0].split("/tree/")[1].partition("/")[2])
            return
        if self.path.startswith("/api/"):
            names = [path.name for path in sorted(self.web.folder.iterdir()) if path.is_file()]
            siblings = [{"rfilename": name} for name in names]
            self._send_json({"id": "o/n", "sha": self.web.commit, "siblings": siblings})
            return
        trouble = self.web.troubles.pop(0) if self.web.troubles else None
        if trouble == HANGS_UP:
            self.close_connection = True
        elif isinstance(trouble, int) and trouble != 200:
            self.send_error(trouble)
        else:
            self._half = trouble == HALF
            self._is_hub = "/resolve/" in self.path
            if self._is_hub:
                self.path = "/" + self.path.split("/resolve/")[1].split("/", 1)[1]
                if not (self.web.folder / self.path[1:]).is_file():
                    self._missing()
                    return
            if self.command == "HEAD":
                super().do_HEAD()
            else:
                super().do_GET()

    def send_header(self, keyword: str, value: str) -> None:
        if self.web.tells or keyword != "Last-Modified":
            super().send_header(keyword, value)

    def end_headers(self) -> None:
        if getattr(self, "_is_hub", False):
            path = self.web.folder / self.path[1:]
            self.send_header("X-Repo-Commit", self.web.commit)
            if path.is_file():
                self.send_header("ETag", hashlib.sha1(path.read_bytes()).hexdigest())
        super().end_headers()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self._half:
            text = source.read()
            outputfile.write(text[: len(text) // 2])
            self.close_connection = True
        else:
            shutil.copyfileobj(source, outputfile)

    def _send_tree(self, name: str) -> None:
        """What the hub says of a folder's files, all below it."""
        folder = self.web.folder / name
        if not folder.is_dir():
            self._missing()
            return
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self._send_json(
            [
                {
                    "type": "file",
                    "path": str(path.relative_to(self.web.folder)),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
        )

    def _missing(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
