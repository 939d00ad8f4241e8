"""A thin JSON client of the API server: dicts in, dicts out.

In: a kubeconfig or a pod's service account, read by the official client, which also renews tokens. Out: ``request``,
``apply`` and ``watch``. Nothing is parsed into the official client's models, which costs several times the CPU.
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
"""A request on which the server says nothing for so long is given up, and its connection with it."""
_REQUEST_SECONDS = 30.0
_IDLE_SECONDS = 5.0
"""How long an idle connection is kept: less than ``_SILENCE_SECONDS``, so that where all connections have gone silent at
once, whatever is tried again is tried on a new one."""
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
    """The API server refused.

    Attributes:
        status: the HTTP status.
        reason: Kubernetes' word for it, as NotFound.
        message: what the server says to people.
    """

    status: int
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {self.message}"

    @classmethod
    def from_body(cls, status: int, body: bytes) -> "ApiError":
        """The error in a Status object, or in whatever a proxy answered instead."""
        try:
            said = json.loads(body)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            said = {"message": body[:200].decode(errors="replace")}
        return cls(status=status, reason=str(said.get("reason", "")), message=str(said.get("message", "")))


def words(error: BaseException) -> str:
    """What an error says; its name where it says nothing."""
    return str(error) or type(error).__name__


def _client(configuration: client.Configuration, *, pool_size: int) -> client.ApiClient:
    configuration.connection_pool_maxsize = pool_size
    api = client.ApiClient(configuration)
    api.rest_client = _Connections(configuration)
    return api


def path(kind: str, *, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
    """The address of a collection, an object or a part of one."""
    prefix, plural = RESOURCES[kind]
    parts = ["", prefix, *(["namespaces", namespace] if namespace else []), plural, name, subresource]
    return "/".join(p for p in parts if p is not None)


def path_of(obj: Raw, *, subresource: str | None = None) -> str:
    """The address of an object."""
    meta = obj["metadata"]
    return path(obj["kind"], namespace=meta.get("namespace"), name=meta["name"], subresource=subresource)


def version_of(obj: Raw) -> int:
    """The resourceVersion as a number: Kubernetes 1.35 says that they compare, and etcd's always did."""
    return int(obj["metadata"].get("resourceVersion", 0))


class _Connections(RESTClientObject):
    """The official client's connections, kept idle for less long than it would."""

    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=self.maxsize, ssl=self.ssl_context, keepalive_timeout=_IDLE_SECONDS)


class NotLeading(Exception):
    """A change that only the leader may make."""


class Kube:
    """One connection pool to one API server.

    Args:
        api: the official client.
        may_change: asked before every request but GET.
    """

    def __init__(self, api: client.ApiClient, *, may_change: Callable[[], bool] = lambda: True) -> None:
        self._api, self._may_change = api, may_change

    @classmethod
    async def connect(cls, *, kubeconfig: Path | None = None, pool_size: int = 32) -> "Kube":
        """Connect as a pod's service account, or else as the kubeconfig's user."""
        configuration = client.Configuration()
        if kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST") and _SERVICE_ACCOUNT.exists():
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            file = str(kubeconfig) if kubeconfig is not None else None
            await config.load_kube_config(file, client_configuration=configuration)  # type: ignore[no-untyped-call]
        return cls(_client(configuration, pool_size=pool_size))

    def apart(self, *, pool_size: int) -> "Kube":
        """A pool of its own to the same API server, for what must not wait for a connection."""
        return Kube(_client(self.configuration, pool_size=pool_size))

    def fenced(self, may_change: Callable[[], bool]) -> "Kube":
        """The same pool, for one who may change the cluster only while ``may_change`` says so."""
        return Kube(self._api, may_change=may_change)

    @property
    def configuration(self) -> client.Configuration:
        """Where the API server is, and the files that identify this client."""
        configuration = self._api.configuration
        assert isinstance(configuration, client.Configuration)
        return configuration

    async def authorization(self) -> str:
        """The Authorization header, as ``Bearer ...``; empty where a certificate identifies this client."""
        return await self._api.configuration.get_api_key_with_prefix("BearerToken", alias="authorization") or ""

    async def close(self) -> None:
        """Close all connections."""
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
        """One request.

        Raises:
            ApiError: the server answered with an error, or something between it and us did.
            aiohttp.ClientError, TimeoutError: it did not answer.
            NotLeading: this one may not change the cluster any more.
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
        """The object or list at an address."""
        return await self.request("GET", address, query=query)

    async def apply(self, obj: Raw, *, subresource: str | None = None) -> Raw:
        """Server-side apply: make the fields of ``obj`` true, take away those that an earlier apply set and this does not."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        address = path_of(obj, subresource=subresource)
        return await self.request("PATCH", address, body=obj, query=query, content_type=_APPLY)

    async def delete(self, address: str, *, uid: str) -> bool:
        """Delete an object and, in the background, what it owns; False if it was gone, or another has its name."""
        only = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        try:
            await self.request("DELETE", address, body={"apiVersion": "v1", "kind": "DeleteOptions", **only})
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            return False
        return True

    async def pages(self, address: str, *, query: Mapping[str, str], size: int = 500) -> AsyncIterator[Raw]:
        """A list, page by page."""
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
        """Watch events after ``version``, bookmarks among them.

        Args:
            address: of a collection.
            query: selectors.
            version: the resourceVersion of the last event that is known.
            seconds: after how long the server ends the stream.
            silence_seconds: how much longer than that it may say nothing.

        Raises:
            ApiError: the server refused, or sent an ERROR event; 410 means that ``version`` is too old.
            aiohttp.ClientError, TimeoutError: the connection broke, or fell silent.
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
            raise NotLeading(f"{method} {address}: this replica does not lead any more")
        return await self._api.call_api(method, url, header_params=headers, body=body, _request_timeout=timeout)
