"""Podman for the tests: its socket, a base image made by debootstrap, the project's images.

Nothing here depends on a registry of images. Where pip and apt fetch from is read from this
machine's own settings; a build is given them as mounted files, so that no image keeps them.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import docker

ROOT = Path(__file__).parents[2]
BASE = "localhost/flagscale-test-base:latest"
PROGRAMS = ("podman", "runc", "debootstrap", "initdb", "runuser")
_PIP_SETTINGS = ("cert", "extra-index-url", "find-links", "index-url", "timeout", "trusted-host")
_MIRROR = "http://deb.debian.org/debian"

# runc sets a container's resource limits even where it may not: then no container starts.
_RUNTIME = """\
#!{python}
import json, os, sys

words = sys.argv[1:]
for word, following in zip(words, [*words[1:], ""]):
    if word in ("--bundle", "-b", "--process", "-p"):
        path = following if "p" in word.strip("-")[:1] else os.path.join(following, "config.json")
        with open(path) as stream:
            config = json.load(stream)
        config.get("process", config).pop("rlimits", None)
        with open(path, "w") as stream:
            json.dump(config, stream)
os.execvp("runc", ["runc", *words])
"""
_CONFIGURATION = """\
[containers]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc-without-limits"
[engine.runtimes]
runc-without-limits = ["{runtime}"]
"""


def missing() -> list[str]:
    """Programs that are not installed; `.ci/run` names their packages."""
    where = os.pathsep.join([os.environ["PATH"], *postgresql_folders()])
    return [name for name in PROGRAMS if shutil.which(name, path=where) is None]


def postgresql_folders() -> list[str]:
    """Where Debian keeps PostgreSQL's programs."""
    return [str(p) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]


@dataclass
class Engine:
    """Podman, with settings of its own in a folder."""

    folder: Path

    @property
    def socket(self) -> str:
        return f"unix://{self.folder}/podman.sock"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "DOCKER_HOST": self.socket,
        }

    def start(self) -> subprocess.Popen[bytes]:
        """Start the service behind the socket."""
        runtime = self.folder / "runtime"
        runtime.write_text(_RUNTIME.format(python=sys.executable))
        runtime.chmod(0o755)
        text = _CONFIGURATION.format(runtime=runtime)
        (self.folder / "containers.conf").write_text(text)
        command = ["podman", "system", "service", "--time", "0", self.socket]
        service = subprocess.Popen(command, env=self.environment)
        deadline = time.monotonic() + 60
        while not (self.folder / "podman.sock").exists():
            assert service.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return service

    def podman(
        self, *arguments: str, stdin: IO[bytes] | None = None, secrets: dict[str, str] | None = None
    ) -> str:
        """What podman prints; secrets go through its environment, as `--env=NAME` takes them."""
        result = subprocess.run(
            ["podman", *arguments],
            env={**self.environment, **(secrets or {})},
            stdin=stdin,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return result.stdout.strip()

    def client(self) -> docker.DockerClient:
        return docker.DockerClient(base_url=self.socket, timeout=60)

    def has(self, image: str) -> bool:
        command = ["podman", "image", "exists", image]
        return subprocess.run(command, env=self.environment, check=False).returncode == 0

    def make_base(self) -> None:
        """A bare Debian with Python, as this machine's apt gets it; once a machine."""
        if self.has(BASE):
            return
        suite, mirror = debian()
        root = self.folder / "base"
        packages = "--include=python3,python3-venv,ca-certificates"
        command = ["debootstrap", "--variant=minbase", packages, suite, str(root), mirror]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
            shutil.rmtree(root / waste, ignore_errors=True)
        tar = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
        self.podman("import", "-", BASE, stdin=tar.stdout)
        assert tar.wait() == 0
        shutil.rmtree(root)

    def build(self, *kinds: str) -> dict[str, str]:
        """The project's images from their Dockerfiles; kind -> name."""
        environment = {
            **self.environment,
            "BIN": str(Path(sys.executable).parent),
            "BUILDER": "podman",
            "BASE_IMAGE": BASE,
            "BUILD_OPTIONS": shlex.join(self._build_options()),
        }
        command = [ROOT / "images/build.sh", *kinds]
        # On a busy machine runc may fail to start ("sealing memfd copy: Device or resource busy");
        # layers that were built stay, so another attempt is short, and a true mistake fails again.
        if subprocess.run(command, env=environment).returncode:
            subprocess.run(command, env=environment, check=True)
        from components.image import VERSION

        return {kind: f"flagscale-distillation:{VERSION}-{kind}" for kind in kinds}

    def _build_options(self) -> list[str]:
        settings = pip_settings()
        file = self.folder / "pip.conf"
        file.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in settings.items()))
        options = ["--isolation=chroot", "--network=host", f"--volume={file}:/etc/pip.conf:ro"]
        options += [f"--volume={path}:{path}:ro" for path in _local_paths(settings)]
        if "find-links" in settings:  # torch without CUDA lies there
            options.append("--build-arg=TORCH_INDEX_URL=")
        return options


def pip_settings() -> dict[str, str]:
    """Where pip fetches from on this machine."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {}
    for key, value in re.findall(r"^(?:global|install|:env:)\.([\w-]+)=(.*)$", lines, re.MULTILINE):
        if key in _PIP_SETTINGS:
            found[key] = shlex.split(value)[0]
    return found


def _local_paths(settings: dict[str, str]) -> list[str]:
    """Files and folders that pip's settings name; beside an index lie its files."""
    found = set()
    for key, value in settings.items():
        for place in value.split():
            path = Path(place.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                found.add(str(path.parent if key.endswith("index-url") else path))
    return sorted(found)


def debian() -> tuple[str, str]:
    """This machine's suite and its mirror; elsewhere than on Debian the newest that has 3.11."""
    release = platform.freedesktop_os_release()
    if release.get("ID") != "debian":
        return "bookworm", _MIRROR
    suite = release["VERSION_CODENAME"]
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(CREATED_BY)"]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in lines.splitlines():
        site, codename, made = line.split(maxsplit=2)
        if codename == suite and made == "Packages" and "security" not in site:
            return suite, site
    return suite, _MIRROR
