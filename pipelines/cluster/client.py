"""KFP's client, made to ask for the server's health once and with a limit of time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3

from pipelines.cluster.access import TokenFile
from pipelines.cluster.connection import Connection
from pipelines.cluster.connection_errors import NotKfp

TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, to answer


class Client(kfp.Client):
    """As KFP's, but for its questions after the server's health."""

    health: dict[str, Any] | None = None

    def get_kfp_healthz(self, sleep_duration: int = 5) -> kfp_server_api.V2beta1GetHealthzResponse:
        """See KFP, which asks again until it is answered."""
        api = self._healthz_api
        answer = api.healthz_service_get_healthz(_request_timeout=TIMEOUT_SECONDS)
        try:
            self.health = json.loads(api.api_client.last_response.data)
        except ValueError:
            raise NotKfp from None  # a login page, most often
        if not isinstance(self.health, dict):
            raise NotKfp
        return answer

    def version(self) -> str | None:
        """The server's release, if it says it: the UI's server does, the API's only once did."""
        health = self.health or {}
        if "apiServerTagName" in health:
            return health["apiServerTagName"]
        try:
            old = self._healthz_api.api_client.call_api(
                "/apis/v1beta1/healthz",
                "GET",
                response_type="object",
                auth_settings=["Bearer"],
                _return_http_data_only=True,
                _request_timeout=TIMEOUT_SECONDS,
            )
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError):
            return None
        return old.get("tag_name") if isinstance(old, dict) else None

    def upload_version(
        self, path: Path, name: str, pipeline: str, description: str, tags: Mapping[str, str]
    ) -> kfp_server_api.V2beta1PipelineVersion:
        """Upload a version of a pipeline with its tags, which KFP's own method has no argument for.

        A server before 2.17 keeps no tags, and takes no offence.

        Args:
            path: compiled.
            name: of the version.
            pipeline: its id.
            description: of the version.
            tags: keys and values of at most 63 characters.
        """
        return self._upload_api.upload_pipeline_version(
            str(path),
            name=name,
            pipelineid=pipeline,
            description=description,
            tags=json.dumps(tags),
            _request_timeout=TIMEOUT_SECONDS,
        )


def connect(connection: Connection) -> Client:
    """A client that has asked the server for its health."""
    values = {f.name: getattr(connection, f.name) for f in fields(connection)}
    token_file = values.pop("token_file")
    if token_file is not None:
        values["credentials"] = TokenFile(token_file)
    # `kubeflow` is the client's word for "none given": it finds KFP there in a cluster.
    values["namespace"] = connection.namespace or "kubeflow"
    values["ssl_ca_cert"] = connection.ssl_ca_cert and str(connection.ssl_ca_cert)
    client = Client(**values)
    if client.health is None:
        client.get_kfp_healthz()
    return client
