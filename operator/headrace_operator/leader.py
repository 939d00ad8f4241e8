"""Leadership by a Lease: one replica acts, the others wait.

In: the Lease's name and this replica's. Out: ``acquire`` returns when this replica leads, ``hold`` when it no longer
does. Another replica takes over when the Lease has not changed for its duration by that replica's own clock, so clocks
need not agree. ``hold`` gives up well before: the old leader has stopped when the new one starts.
"""

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp

from headrace_operator.body.kube import ApiError, Kube, Raw, path

logger = logging.getLogger(__name__)

_MISSES = (ApiError, aiohttp.ClientError, TimeoutError)


@dataclass(frozen=True, kw_only=True)
class LeaseSettings:
    """Names and times of a Lease."""

    namespace: str
    name: str
    identity: str
    duration_seconds: float = 15.0
    give_up_seconds: float = 10.0
    """How long the leader goes on without renewing."""
    retry_seconds: float = 2.0


class Leadership:
    """This replica's claim to a Lease."""

    def __init__(self, kube: Kube, settings: LeaseSettings) -> None:
        self._kube, self._settings = kube, settings
        self._seen: tuple[str, float] = ("", 0.0)
        """The Lease's resourceVersion, and when it was first seen, by this process' clock."""

    async def acquire(self) -> None:
        """Wait until this replica leads."""
        while not await self._try():
            await asyncio.sleep(self._settings.retry_seconds)
        logger.info("%s leads", self._settings.identity)

    async def hold(self) -> None:
        """Renew until that fails for too long, or another replica leads."""
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while loop.time() - renewed < self._settings.give_up_seconds:
            await asyncio.sleep(self._settings.retry_seconds)
            began = loop.time()
            claimed = await self._try(patience=renewed + self._settings.give_up_seconds - began)
            if claimed is False:
                break
            renewed = began if claimed else renewed
        logger.error("%s has lost the Lease %s", self._settings.identity, self._settings.name)

    async def release(self) -> None:
        """Let the next replica lead at once."""
        try:
            lease = await self._kube.get(self._address())
            if lease["spec"].get("holderIdentity") == self._settings.identity:
                await self._write(lease, {"holderIdentity": "", "leaseDurationSeconds": 1})
        except _MISSES as error:
            logger.warning("the Lease was not released: %s", error)

    async def _try(self, *, patience: float | None = None) -> bool | None:
        """Whether this replica leads now; None if the API server did not say."""
        try:
            async with asyncio.timeout(patience):
                return await self._claim()
        except _MISSES as error:
            logger.warning("the Lease %s: %s", self._settings.name, error or type(error).__name__)
            return None

    async def _claim(self) -> bool:
        try:
            lease = await self._kube.get(self._address())
        except ApiError as error:
            if error.status != 404:
                raise
            await self._create()
            return True
        if not may_claim(lease, self._settings.identity, unchanged_seconds=self._unchanged(lease)):
            return False
        await self._write(lease, self._claimed(lease))
        return True

    def _unchanged(self, lease: Raw) -> float:
        version, now = lease["metadata"]["resourceVersion"], asyncio.get_running_loop().time()
        if self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1]

    def _claimed(self, lease: Raw) -> Raw:
        spec, now = lease.get("spec", {}), _micro_time()
        renewed = {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": int(self._settings.duration_seconds),
            "renewTime": now,
        }
        if spec.get("holderIdentity") == self._settings.identity:
            return renewed
        return {**renewed, "acquireTime": now, "leaseTransitions": spec.get("leaseTransitions", 0) + 1}

    async def _create(self) -> None:
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._settings.name, "namespace": self._settings.namespace},
            "spec": self._claimed({}),
        }
        await self._kube.request("POST", path("Lease", namespace=self._settings.namespace), body=body)

    async def _write(self, lease: Raw, changes: Raw) -> None:
        """Replace the Lease as it was read: if another replica was faster, the API server refuses."""
        body = {**lease, "spec": {**lease.get("spec", {}), **changes}}
        await self._kube.request("PUT", self._address(), body=body)

    def _address(self) -> str:
        return path("Lease", namespace=self._settings.namespace, name=self._settings.name)


def may_claim(lease: Raw, identity: str, *, unchanged_seconds: float) -> bool:
    """Whether a Lease is this replica's, nobody's, or no longer renewed."""
    spec = lease.get("spec", {})
    holder = spec.get("holderIdentity") or ""
    return holder in ("", identity) or unchanged_seconds > spec.get("leaseDurationSeconds", 0)


def _micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
