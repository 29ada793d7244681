"""A headless Chromium, driven over the DevTools protocol: how people see a page."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
_PHONE, _DESK, _PAPER = 390, 1280, 687  # px: a narrow phone, a laptop, A4 between margins of 14 mm


class Browser:
    """One tab."""

    def __init__(self, url: str, folder: Path) -> None:
        """Take hold of it.

        Args:
            url: of the tab's socket.
            folder: for the pages that it is shown.
        """
        self._socket = websocket.create_connection(url, suppress_origin=True, timeout=60)
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []
        self._folder = folder
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._do(f"{domain}.enable")

    def check(self, html: str) -> None:
        """A page of ours shows itself whole, complains of nothing and asks for nothing.

        On a phone, a desk and paper, in light and dark.

        Args:
            html: the page.
        """
        page = self._folder / "page.html"
        page.write_text(html, encoding="utf-8")
        self._events.clear()
        for media, scheme, width in (
            ("screen", "light", _DESK),
            ("screen", "dark", _PHONE),
            ("print", "dark", _PAPER),
        ):
            shape = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
            self._do("Emulation.setDeviceMetricsOverride", **shape)
            feature = {"name": "prefers-color-scheme", "value": scheme}
            self._do("Emulation.setEmulatedMedia", media=media, features=[feature])
            self._do("Page.navigate", url=page.as_uri())
            self._until("Page.loadEventFired")
            wide = self.value("document.documentElement.scrollWidth")
            assert wide <= width, f"{wide} px of {width} in {media}"
            ground = self.value("getComputedStyle(document.body).color")
            is_dark = ground == "rgb(232, 237, 243)"
            assert is_dark == ((media, scheme) == ("screen", "dark")), f"{ground} in {media}"
        assert self.asked == {page.as_uri()}, self.asked
        assert self.complaints == [], self.complaints

    def open(self, url: str, until: str) -> None:
        """Show a page of somebody else's on a desk.

        Args:
            url: of the page.
            until: what is true in it when it is there, in JavaScript.
        """
        self._events.clear()
        shape = {"width": _DESK, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self._do("Emulation.setDeviceMetricsOverride", **shape)
        self._do("Page.navigate", url="about:blank")  # or only what follows the # would change
        self._do("Page.navigate", url=url)
        deadline = time.monotonic() + 300
        while not self.value(until):
            assert time.monotonic() < deadline, self.value("document.body.innerText")
            time.sleep(0.2)

    @property
    def asked(self) -> set[str]:
        """URLs of all that the page has loaded."""
        return {event["params"]["request"]["url"] for event in self._named("requestWillBeSent")}

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What the console and the log say."""
        names = ("consoleAPICalled", "exceptionThrown", "entryAdded")
        return [event["params"] for name in names for event in self._named(name)]

    def value(self, expression: str) -> Any:
        """Of JavaScript, in the page; None where it raises."""
        return self._do("Runtime.evaluate", expression=expression)["result"].get("value")

    def _named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self._events if event["method"].endswith(f".{name}")]

    def _do(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer: dict[str, Any] = json.loads(self._socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._events.append(answer)

    def _until(self, method: str) -> None:
        while not any(event["method"] == method for event in self._events):
            self._events.append(json.loads(self._socket.recv()))
        self._events = [event for event in self._events if event["method"] != method]

    def close(self) -> None:
        """The whole browser, with all its processes."""
        self._do("Browser.close")
        self._socket.close()


@contextmanager
def browsed(folder: Path) -> Iterator[Browser]:
    """A browser while the body runs.

    Args:
        folder: an empty one.
    """
    assert PROGRAM is not None
    command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={folder}/profile", "about:blank"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:  # it says where its own socket is
            if line.startswith("DevTools listening on "):
                break
        address = line.split("ws://")[1].split("/")[0]
        [tab, *_] = _tabs(address)
        browser = Browser(tab["webSocketDebuggerUrl"], folder)
        try:
            yield browser
        finally:
            browser.close()
            process.wait(60)
    finally:
        process.kill()
        process.wait()


def _tabs(address: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://{address}/json/list", timeout=60) as answer:
        return [one for one in json.load(answer) if one["type"] == "page"]
