"""Kubernetes' API as `make test-cluster` asks it: a ConfigMap, pods, their logs, `exec`."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.deploy.argo_retries import CONFIG_MAP, KEY
from tests.pipelines.cluster.acting_cluster import ActingKfp

_LAUNCHED = "pipelines.kubeflow.org/runtime-role"
_SAVED = "step 61/400, KD 0.03\nvalidation after step 50: KD 0.0071, LM 4.7\n"


class ActingPods:
    """The pods of the runs of an `ActingKfp`; a pod that is struck lets its run go on.

    Attributes:
        execs: commands that were run in pods.
        has_exec: whether the API server knows of `exec`.
    """

    def __init__(self, kfp: ActingKfp) -> None:
        self.kfp = kfp
        self.execs: list[list[str]] = []
        self.has_exec = True

    @contextmanager
    def serving(self, folder: Path) -> Iterator[Path]:
        """Serve on a free port; gives a kubeconfig."""
        app = web.Application()
        pods = "/api/v1/namespaces/kubeflow/pods"
        app.add_routes(
            [
                web.get("/apis/", self._groups),
                web.get("/api/v1/namespaces/kubeflow/configmaps/{name}", self._config_map),
                web.get(pods, self._list),
                web.get(pods + "/{pod}/log", self._log),
                web.get(pods + "/{pod}/exec", self._exec),
                web.delete(pods + "/{pod}", self._delete),
            ]
        )
        loop = asyncio.new_event_loop()
        runner = web.AppRunner(app)
        loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        loop.run_until_complete(site.start())
        port = runner.addresses[0][1]
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield _kubeconfig(folder / "kubeconfig", f"http://127.0.0.1:{port}")
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _groups(self, _: web.Request) -> web.Response:
        names = ["apps", "argoproj.io"]
        names += ["trainer.kubeflow.org"] if self.kfp.acts.trainer else []
        versions = [{"groupVersion": "v1", "version": "v1"}]
        return web.json_response({"groups": [{"name": n, "versions": versions} for n in names]})

    async def _config_map(self, request: web.Request) -> web.Response:
        assert request.match_info["name"] == CONFIG_MAP
        text = f"spec: {{templateDefaults: {{retryStrategy: {self.kfp.acts.policy}}}}}"
        return web.json_response({"metadata": {"name": CONFIG_MAP}, "data": {KEY: text}})

    async def _list(self, request: web.Request) -> web.Response:
        run_id = request.query["labelSelector"].removeprefix("pipeline/runid=")
        names = ["driver-1", "evaluate-1"]
        names += [f"train-{run_id}-{n}" for n in range(2 if run_id in self.kfp.struck else 1)]
        return web.json_response({"items": [_pod(name) for name in names]})

    async def _log(self, request: web.Request) -> web.Response:
        assert request.query["container"] == "main"
        pod = request.match_info["pod"]
        after = self.kfp.acts.resumes_after
        if pod.endswith("-0"):
            return web.Response(text=_SAVED)
        return web.Response(text="" if after is None else f"resuming after step {after} from /mnt")

    async def _delete(self, request: web.Request) -> web.Response:
        self._strike(request.match_info["pod"])
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        if not self.has_exec:
            raise web.HTTPNotFound
        assert request.query["container"] == "main"
        self.execs.append(request.query.getall("command"))
        socket = web.WebSocketResponse(protocols=["v4.channel.k8s.io"])
        await socket.prepare(request)
        self._strike(request.match_info["pod"])
        await socket.send_bytes(b"\x01killed\n")  # standard output
        await socket.send_bytes(b"\x03" + json.dumps({"status": "Success"}).encode())
        await socket.close()
        return socket

    def _strike(self, pod: str) -> None:
        found = re.fullmatch(r"train-(.+)-0", pod)
        assert found
        self.kfp.struck.add(found[1])


def _pod(name: str) -> dict[str, Any]:
    step = {"driver": "distil-student-driver(0)", "evaluate": "evaluate(0).executor(0)"}
    node = step.get(name.split("-")[0], f"distil-student(0).executor({name[-1]})")
    annotations = {"workflows.argoproj.io/node-name": f"distillation-mxbhw(0).root(0).{node}"}
    made = f"2026-11-28T10:43:2{name[-1]}Z"
    return {
        "metadata": {"name": name, "annotations": annotations, "creationTimestamp": made},
        "status": {"phase": "Running"},
    }


def _kubeconfig(path: Path, server: str) -> Path:
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    values = {
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [context],
        "current-context": "c",
    }
    path.write_text(yaml.safe_dump(values))
    return path
