"""Leader election with a Lease: one replica acts, the others stand by.

In: the names of the Lease and of this replica. Out: ``acquire`` returns once this replica leads, ``hold`` once it no
longer does; ``leads`` says at any moment whether it may act. A replica takes over when, by its own clock, the Lease has
not changed for its duration, so clocks need not agree.

With the defaults, a leader that last renewed at 0 s stops acting at 7 s (``give_up_seconds``). Others read the Lease
every 2 s, so they see that renewal by 2 s and take over 10 s later, between 10 s and 12 s. Deleting the Lease changes
nothing: the leader recreates it at its next renewal, and the others wait out its duration before they do.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp

from headrace_operator.body.kube import ApiError, Kube, path, words
from headrace_operator.body.raw import Raw

logger = logging.getLogger(__name__)

_MISSES = (ApiError, aiohttp.ClientError, TimeoutError)


def _now() -> float:
    """A clock that keeps running while the process is stopped or the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, kw_only=True)
class LeaseSettings:
    """Names and timings of a Lease."""

    namespace: str
    name: str
    identity: str
    duration_seconds: float = 10.0
    give_up_seconds: float = 7.0
    """How long the leader keeps acting without a successful renewal."""
    retry_seconds: float = 2.0
    """The interval between renewals, or between reads of another replica's Lease."""
    request_seconds: float = 2.5
    """The timeout of one request. Two can fail before the leader gives up."""


class Leadership:
    """This replica's claim to the Lease."""

    def __init__(self, kube: Kube, settings: LeaseSettings, *, clock: Callable[[], float] = _now) -> None:
        self._kube, self._settings, self._clock = kube, settings, clock
        self._seen: tuple[str, float] | None = None
        """The Lease's resourceVersion (empty if it does not exist), and when it was first seen."""
        self._free_at = float("inf")
        """When another replica's Lease expires unless it changes."""
        self._until = float("-inf")
        """When this replica stops acting unless it renews."""

    def leads(self) -> bool:
        """Whether this replica may act. False right after it was suspended for too long."""
        return self._clock() < self._until

    async def acquire(self) -> None:
        """Wait until this replica leads. A claim that took longer than a renewal lasts is made again."""
        while not (await self._try(self._claim) and self.leads()):
            await asyncio.sleep(self._seconds_to_next_look())
        logger.info("%s leads", self._settings.identity)

    async def hold(self) -> None:
        """Renew until renewals have failed for too long or another replica leads."""
        pause = self._settings.retry_seconds
        while True:
            await asyncio.sleep(pause)
            claimed = await self._try(self._renew) if self.leads() else False
            if claimed is False or not self.leads():
                break
            pause = self._settings.retry_seconds / (1 if claimed else 4)
        self._until = float("-inf")
        logger.error("%s lost the Lease %s", self._settings.identity, self._settings.name)

    async def release(self) -> None:
        """Let the next replica lead at once. Call only when nothing acts any more."""
        self._until = float("-inf")
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                lease = await self._read()
                if lease is not None and _holder(lease) == self._settings.identity:
                    await self._write(lease, {"holderIdentity": "", "leaseDurationSeconds": 1})
        except _MISSES as error:
            logger.warning("failed to release the Lease: %s", words(error))

    async def _try(self, claim: Callable[[], Awaitable[bool]]) -> bool | None:
        """Whether this replica leads; None if unknown. An error is never a win."""
        began = self._clock()
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                claimed = await claim()
        except _MISSES as error:
            logger.warning("Lease %s: %s", self._settings.name, words(error))
            return None
        except Exception:
            logger.exception("Lease %s", self._settings.name)
            return None
        if claimed:
            self._until = began + self._settings.give_up_seconds
        return claimed

    async def _claim(self) -> bool:
        """Take the Lease if it is free or unchanged for its duration; create a missing one after the same wait."""
        lease = await self._read()
        seen_at = self._see(lease)
        self._free_at = seen_at + (duration_of(lease) if lease is not None else self._settings.duration_seconds)
        if self._clock() < self._free_at and (lease is None or _holder(lease) not in ("", self._settings.identity)):
            return False
        if lease is None:
            return await self._create()
        await self._write(lease, self._claimed(lease))
        return True

    async def _renew(self) -> bool:
        """Renew the Lease; recreate it if it is missing. Nobody else does while it is held."""
        lease = await self._read()
        if lease is None:
            return await self._create()
        if _holder(lease) != self._settings.identity:
            return False
        await self._write(lease, self._claimed(lease))
        return True

    def _see(self, lease: Raw | None) -> float:
        """When the current version of the Lease was first seen."""
        version = lease["metadata"]["resourceVersion"] if lease is not None else ""
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, self._clock())
        return self._seen[1]

    def _seconds_to_next_look(self) -> float:
        """The retry interval, or less if the Lease may expire sooner."""
        usual = self._settings.retry_seconds * random.uniform(0.8, 1)
        return min(usual, max(0.1, self._free_at - self._clock()))

    def _claimed(self, lease: Raw) -> Raw:
        spec, now = lease.get("spec") or {}, _micro_time()
        renewed = {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": int(self._settings.duration_seconds),
            "renewTime": now,
        }
        if _holder(lease) == self._settings.identity:
            return renewed
        return {**renewed, "acquireTime": now, "leaseTransitions": (spec.get("leaseTransitions") or 0) + 1}

    async def _read(self) -> Raw | None:
        try:
            return await self._kube.get(self._address())
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    async def _create(self) -> bool:
        """Create the Lease; False if another replica was faster."""
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._settings.name, "namespace": self._settings.namespace},
            "spec": self._claimed({}),
        }
        try:
            await self._kube.request("POST", path("Lease", namespace=self._settings.namespace), body=body)
        except ApiError as error:
            if error.status != 409:
                raise
            return False
        return True

    async def _write(self, lease: Raw, changes: Raw) -> None:
        """Replace the Lease as read. The API server refuses if another replica was faster."""
        body = {**lease, "spec": {**(lease.get("spec") or {}), **changes}}
        await self._kube.request("PUT", self._address(), body=body)

    def _address(self) -> str:
        return path("Lease", namespace=self._settings.namespace, name=self._settings.name)


def _holder(lease: Raw) -> str:
    return str((lease.get("spec") or {}).get("holderIdentity") or "")


def duration_of(lease: Raw) -> float:
    """How long the Lease is held without renewal."""
    return float((lease.get("spec") or {}).get("leaseDurationSeconds") or 0)


def _micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
