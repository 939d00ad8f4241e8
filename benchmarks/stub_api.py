"""An API server for benchmarks of the operator: it keeps objects and counts requests, and does nothing else.

No admission, no controllers, no real watches: what is measured against it is the operator's own cost.
"""

import asyncio
import itertools
import json
import threading
from collections import Counter
from typing import Any

from aiohttp import web

Json = dict[str, Any]

KINDS = {
    "configmaps": ("/api/v1", "ConfigMap"),
    "pods": ("/api/v1", "Pod"),
    "services": ("/api/v1", "Service"),
    "serviceaccounts": ("/api/v1", "ServiceAccount"),
    "deployments": ("/apis/apps/v1", "Deployment"),
    "jobs": ("/apis/batch/v1", "Job"),
    "leases": ("/apis/coordination.k8s.io/v1", "Lease"),
    "events": ("/apis/events.k8s.io/v1", "Event"),
    "trainingruns": ("/apis/headrace.dev/v1alpha1", "TrainingRun"),
    "trainingruntimes": ("/apis/headrace.dev/v1alpha1", "TrainingRuntime"),
}


class StubApi:
    """Objects by kind and name, served from a thread."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        """Of each method and kind; watches count as WATCH, lists as LIST."""
        self.port = 0
        self._objects: dict[str, dict[tuple[str, str], Json]] = {plural: {} for plural in KINDS}
        self._versions = itertools.count(1)
        self._loop = asyncio.new_event_loop()

    def add(self, plural: str, obj: Json, *, uid: str = "") -> Json:
        """Keep an object; returns it with what a server adds."""
        meta = obj["metadata"]
        name = (meta.get("namespace", ""), meta["name"])
        stored = {"uid": uid or f"{plural}-{meta['name']}", "generation": 1, **meta, "resourceVersion": self._next()}
        self._objects[plural][name] = {"apiVersion": KINDS[plural][0].split("/", 2)[2], "kind": KINDS[plural][1], **obj}
        self._objects[plural][name]["metadata"] = stored
        return self._objects[plural][name]

    def start(self) -> None:
        """Serve."""
        ready = threading.Event()

        async def listen() -> None:
            app = web.Application(client_max_size=2**24)
            app.router.add_route("*", "/{address:.*}", self._serve)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.port = runner.addresses[0][1]
            ready.set()

        def run() -> None:
            self._loop.run_until_complete(listen())
            self._loop.run_forever()

        threading.Thread(target=run, daemon=True).start()
        ready.wait()

    def kubeconfig(self) -> Json:
        """How to reach it."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stub",
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "stub"}}],
            "clusters": [{"name": "stub", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "stub", "user": {"token": "stub"}}],
        }

    def _next(self) -> str:
        return str(next(self._versions))

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        plural = next((p for p in KINDS if p in parts), None)
        if plural is None:
            return web.json_response(await self._other(request))
        rest = parts[parts.index(plural) + 1 :]
        if rest:
            namespace = parts[parts.index("namespaces") + 1] if "namespaces" in parts else ""
            return await self._object(request, plural, (namespace, rest[0]))
        if request.method == "POST":
            self.requests["POST", plural] += 1
            return web.json_response(self.add(plural, await request.json()), status=201)
        if request.query.get("watch") == "true":
            return await self._watch(request, plural)
        return self._list(request, plural)

    async def _other(self, request: web.Request) -> Json:
        """Discovery, and whose a token is: a token here is the name of its pod."""
        if request.path.endswith("/tokenreviews"):
            self.requests["POST", "tokenreviews"] += 1
            return _review((await request.json())["spec"]["token"], self._objects["pods"])
        if request.path == "/api":
            return {"versions": ["v1"]}
        if request.path == "/apis":
            version = {"groupVersion": "headrace.dev/v1alpha1", "version": "v1alpha1"}
            return {"groups": [{"name": "headrace.dev", "versions": [version], "preferredVersion": version}]}
        verbs = ["get", "list", "watch", "patch"]
        served = [(plural, kind) for plural, (prefix, kind) in KINDS.items() if prefix == request.path]
        resources = [{"name": p, "singularName": "", "kind": k, "namespaced": True, "verbs": verbs} for p, k in served]
        return {"kind": "APIResourceList", "resources": resources}

    async def _object(self, request: web.Request, plural: str, name: tuple[str, str]) -> web.Response:
        self.requests[request.method, plural] += 1
        known = self._objects[plural].get(name)
        if known is None:
            return web.json_response({"kind": "Status", "reason": "NotFound", "message": "not found"}, status=404)
        if request.method in ("PATCH", "PUT"):
            told = await request.json()
            known = self.add(plural, {**known, **told, "metadata": {**known["metadata"], **told["metadata"]}})
        return web.json_response(known)

    def _list(self, request: web.Request, plural: str) -> web.Response:
        self.requests["LIST", plural] += 1
        items, start = list(self._objects[plural].values()), int(request.query.get("continue") or 0)
        end = start + int(request.query.get("limit", len(items) or 1))
        meta = {"resourceVersion": self._next(), "continue": str(end) if end < len(items) else ""}
        return web.json_response({"kind": f"{KINDS[plural][1]}List", "metadata": meta, "items": items[start:end]})

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        """A stream without changes, that ends with a bookmark."""
        self.requests["WATCH", plural] += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(float(request.query["timeoutSeconds"]))
        bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": self._next()}}}
        await response.write(json.dumps(bookmark).encode() + b"\n")
        return response


def _review(token: str, pods: dict[tuple[str, str], Json]) -> Json:
    namespace, _, name = token.partition("/")
    pod = pods.get((namespace, name))
    if pod is None:
        return {"status": {"authenticated": False}}
    extra = {"pod-name": [name], "pod-uid": [pod["metadata"]["uid"]]}
    user = {
        "username": f"system:serviceaccount:{namespace}:any",
        "extra": {f"authentication.kubernetes.io/{key}": value for key, value in extra.items()},
    }
    return {"status": {"authenticated": True, "audiences": ["headrace-progress"], "user": user}}
