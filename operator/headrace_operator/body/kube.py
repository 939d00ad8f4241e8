"""A thin JSON client for the API server: dicts in, dicts out.

In: a kubeconfig or a pod's service account, loaded by the official client, which also renews tokens. Out: ``request``,
``apply`` and ``watch``. The official client's models are skipped: parsing into them costs several times the CPU.
"""

import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.rest import RESTClientObject

from headrace_api import GROUP, VERSION
from headrace_operator.body.raw import Raw

FIELD_MANAGER = "headrace"
_APPLY = "application/apply-patch+yaml"
_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 10.0
"""A request is abandoned, with its connection, once the server has been silent for this long."""
_REQUEST_SECONDS = 30.0
_IDLE_SECONDS = 5.0
"""How long an idle connection is kept. Shorter than ``_SILENCE_SECONDS``: when all connections go silent at once, a
retry opens a new one."""
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

RESOURCES: dict[str, tuple[str, str]] = {
    "ConfigMap": ("api/v1", "configmaps"),
    "Deployment": ("apis/apps/v1", "deployments"),
    "Job": ("apis/batch/v1", "jobs"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
    "Pod": ("api/v1", "pods"),
    "Service": ("api/v1", "services"),
    "ServiceAccount": ("api/v1", "serviceaccounts"),
    "TrainingRun": (f"apis/{GROUP}/{VERSION}", "trainingruns"),
    "TrainingRuntime": (f"apis/{GROUP}/{VERSION}", "trainingruntimes"),
    "Event": ("apis/events.k8s.io/v1", "events"),
    "TokenReview": ("apis/authentication.k8s.io/v1", "tokenreviews"),
}


@dataclass
class ApiError(Exception):
    """An error answer from the API server.

    Attributes:
        status: the HTTP status.
        reason: the machine-readable reason, such as NotFound.
        message: the human-readable message.
    """

    status: int
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {self.message}"

    @classmethod
    def from_body(cls, status: int, body: bytes) -> "ApiError":
        """Parse a Status object, or whatever a proxy sent instead."""
        try:
            said = json.loads(body)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            said = {"message": body[:200].decode(errors="replace")}
        return cls(status=status, reason=str(said.get("reason", "")), message=str(said.get("message", "")))


def words(error: BaseException) -> str:
    """The error's message, or its type if it has none."""
    return str(error) or type(error).__name__


def _client(configuration: client.Configuration, *, pool_size: int) -> client.ApiClient:
    configuration.connection_pool_maxsize = pool_size
    api = client.ApiClient(configuration)
    api.rest_client = _Connections(configuration)
    return api


def path(kind: str, *, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
    """The URL path of a collection, object or subresource."""
    prefix, plural = RESOURCES[kind]
    parts = ["", prefix, *(["namespaces", namespace] if namespace else []), plural, name, subresource]
    return "/".join(p for p in parts if p is not None)


def path_of(obj: Raw, *, subresource: str | None = None) -> str:
    """The URL path of an object."""
    meta = obj["metadata"]
    return path(obj["kind"], namespace=meta.get("namespace"), name=meta["name"], subresource=subresource)


def version_of(obj: Raw) -> int:
    """resourceVersion as a number. Comparable: Kubernetes 1.35 promises it, and with etcd it always was."""
    return int(obj["metadata"].get("resourceVersion", 0))


class _Connections(RESTClientObject):
    """The official client's connection pool, with a shorter idle timeout."""

    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=self.maxsize, ssl=self.ssl_context, keepalive_timeout=_IDLE_SECONDS)


class NotLeading(Exception):
    """Raised when a replica that does not lead tries to change the cluster."""


class Kube:
    """One connection pool to one API server.

    Args:
        api: the official client.
        may_change: consulted before every request except GET.
    """

    def __init__(self, api: client.ApiClient, *, may_change: Callable[[], bool] = lambda: True) -> None:
        self._api, self._may_change = api, may_change

    @classmethod
    async def connect(cls, *, kubeconfig: Path | None = None, pool_size: int = 32) -> "Kube":
        """Connect as the pod's service account, or else as the kubeconfig's user."""
        configuration = client.Configuration()
        if kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST") and _SERVICE_ACCOUNT.exists():
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            file = str(kubeconfig) if kubeconfig is not None else None
            await config.load_kube_config(file, client_configuration=configuration)  # type: ignore[no-untyped-call]
        return cls(_client(configuration, pool_size=pool_size))

    def apart(self, *, pool_size: int) -> "Kube":
        """A separate connection pool to the same API server, for requests that must not queue behind others."""
        return Kube(_client(self.configuration, pool_size=pool_size))

    def fenced(self, may_change: Callable[[], bool]) -> "Kube":
        """The same pool, but changes are refused unless ``may_change`` allows them."""
        return Kube(self._api, may_change=may_change)

    @property
    def configuration(self) -> client.Configuration:
        """The API server's address and this client's credentials."""
        configuration = self._api.configuration
        assert isinstance(configuration, client.Configuration)
        return configuration

    async def authorization(self) -> str:
        """The Authorization header (``Bearer ...``); empty if the client uses a certificate."""
        return await self._api.configuration.get_api_key_with_prefix("BearerToken", alias="authorization") or ""

    async def close(self) -> None:
        await self._api.close()  # type: ignore[no-untyped-call]

    async def request(
        self,
        method: str,
        address: str,
        *,
        body: Raw | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Raw:
        """Send one request.

        Raises:
            ApiError: the server, or a proxy in between, answered with an error.
            aiohttp.ClientError, TimeoutError: no answer.
            NotLeading: this replica may not change the cluster.
        """
        timeout = aiohttp.ClientTimeout(
            total=_REQUEST_SECONDS, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS
        )
        response = await self._send(method, address, body, query, content_type, timeout)
        data = await response.read()
        if response.status >= 400:
            raise ApiError.from_body(response.status, data)
        try:
            parsed = json.loads(data)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise ApiError(response.status, "NotAnObject", f"{method} {address}: {data[:200].decode(errors='replace')}")
        return parsed

    async def get(self, address: str, **query: str) -> Raw:
        """Fetch an object or list."""
        return await self.request("GET", address, query=query)

    async def apply(self, obj: Raw, *, subresource: str | None = None) -> Raw:
        """Server-side apply: set the fields of ``obj``; remove those that only an earlier apply set."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        address = path_of(obj, subresource=subresource)
        return await self.request("PATCH", address, body=obj, query=query, content_type=_APPLY)

    async def delete(self, address: str, *, uid: str) -> bool:
        """Delete an object, and what it owns in the background. False if it is gone or its name belongs to another."""
        only = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        try:
            await self.request("DELETE", address, body={"apiVersion": "v1", "kind": "DeleteOptions", **only})
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            return False
        return True

    async def pages(self, address: str, *, query: Mapping[str, str], size: int = 500) -> AsyncIterator[Raw]:
        """List, page by page."""
        token = ""
        while True:
            wanted = {**query, "limit": str(size), **({"continue": token} if token else {})}
            page = await self.request("GET", address, query=wanted)
            yield page
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def watch(
        self, address: str, *, query: Mapping[str, str], version: str, seconds: float, silence_seconds: float = 5.0
    ) -> AsyncIterator[Raw]:
        """Stream watch events after ``version``, bookmarks included.

        Args:
            address: of the collection.
            query: selectors.
            version: resourceVersion of the last known event.
            seconds: when the server ends the stream.
            silence_seconds: how long past that the connection may stay open.

        Raises:
            ApiError: the server refused or sent an ERROR event; 410 means that ``version`` is too old.
            aiohttp.ClientError, TimeoutError: the connection broke or went silent.
        """
        wanted = {**query, "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version}
        wanted["timeoutSeconds"] = str(round(seconds))
        timeout = aiohttp.ClientTimeout(total=round(seconds) + silence_seconds, sock_connect=_CONNECT_SECONDS)
        response = await self._send("GET", address, None, wanted, "application/json", timeout)
        stream = response.response
        try:
            if response.status >= 400:
                raise ApiError.from_body(response.status, await stream.read())
            async for line in stream.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    said = event["object"]
                    raise ApiError(said.get("code", 500), said.get("reason", ""), said.get("message", ""))
                yield event
        finally:
            stream.close()

    async def _send(
        self,
        method: str,
        address: str,
        body: Raw | None,
        query: Mapping[str, str] | None,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> Any:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        method, url, headers, _, _ = await self._api.param_serialize(
            method,
            address,
            query_params=list((query or {}).items()),
            header_params=headers,
            auth_settings=["BearerToken"],
        )
        if method != "GET" and not self._may_change():
            raise NotLeading(f"{method} {address}: this replica no longer leads")
        return await self._api.call_api(method, url, header_params=headers, body=body, _request_timeout=timeout)
