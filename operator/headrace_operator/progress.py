"""The progress endpoint: pods ``POST`` a ``ProgressReport`` with their own token.

The token is projected: bound to its pod, with this endpoint as its audience. A TokenReview says whose it is, and the
pod's labels say which attempt that is. So a pod can report only for its own attempt.
"""

import asyncio
import hashlib
import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from headrace_api.contract import PROGRESS_PATH, REPORT_AFTER_HEADER, TOKEN_AUDIENCE, ProgressReport
from headrace_operator.body.caches import Cluster, RunKey
from headrace_operator.body.kube import ApiError, Kube, path, words
from headrace_operator.body.raw import Raw
from headrace_operator.body.records import PodRecord
from headrace_operator.metrics import PROGRESS_REPORTS

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
_KNOWN_SECONDS, _REFUSED_SECONDS = 600.0, 5.0
"""How long a TokenReview's answer is cached. A token's owner never changes; the caches know when its pod is gone."""
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_ACCOUNT = "system:serviceaccount:"


REPORTS_PER_SECOND = 250
"""What all pods together are asked to stay below; a report costs a few tenths of a millisecond."""
_PRUNE_SECONDS = 10.0

_TAKEN = PROGRESS_REPORTS.labels(code="204")


@dataclass(frozen=True, kw_only=True)
class PodIdentity:
    """The pod a token was issued to."""

    namespace: str
    name: str
    uid: str


class Refusal(Exception):
    """A rejected report.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def identity(review: Raw) -> PodIdentity:
    """The pod that a TokenReview names.

    Raises:
        Refusal: the token is invalid, for another audience, or not bound to a pod.
    """
    status = review.get("status", {})
    if not status.get("authenticated"):
        raise Refusal(401, f"the token is not valid: {status.get('error') or 'not authenticated'}")
    if TOKEN_AUDIENCE not in status.get("audiences", []):
        raise Refusal(401, f"the token is not for the audience {TOKEN_AUDIENCE}")
    user = status.get("user", {})
    extra = user.get("extra", {})
    if not user.get("username", "").startswith(_ACCOUNT) or not extra.get(_POD_NAME) or not extra.get(_POD_UID):
        raise Refusal(403, "the token is not bound to a pod")
    namespace = user["username"].removeprefix(_ACCOUNT).split(":")[0]
    return PodIdentity(namespace=namespace, name=extra[_POD_NAME][0], uid=extra[_POD_UID][0])


def check(who: PodIdentity, pod: PodRecord | None, report: ProgressReport) -> PodRecord:
    """The pod that makes the report.

    Raises:
        Refusal: the pod may not make this report.
    """
    if pod is None or pod.uid != who.uid or not pod.owner:
        raise Refusal(403, f"pod {who.namespace}/{who.name} does not belong to a run, or is not known yet")
    mine = _attempt(pod.namespace, pod.run, pod.stage, pod.attempt)
    told = _attempt(report.namespace, report.run, report.progress.stage, report.progress.attempt)
    if mine != told:
        raise Refusal(403, f"pod {who.namespace}/{who.name} belongs to {mine} and may not report for {told}")
    if pod.index != 0:
        raise Refusal(403, f"pod {who.namespace}/{who.name} has index {pod.index}; only index 0 reports")
    return pod


def _attempt(namespace: str, run: str, stage: str, number: int) -> str:
    return f"run {namespace}/{run}, stage {stage}, attempt {number}"


class TokenReviews:
    """Asks the API server whose a token is, and caches the answer."""

    def __init__(self, kube: Kube, *, keep: int = 20_000, at_once: int = 16) -> None:
        self._kube, self._keep = kube, keep
        self._known: OrderedDict[bytes, tuple[float, PodIdentity | Refusal]] = OrderedDict()
        self._slots = asyncio.Semaphore(at_once)

    async def identity(self, token: str) -> PodIdentity:
        """The pod a token was issued to.

        Raises:
            Refusal: the token is invalid, or the API server did not answer (503).
        """
        digest, now = hashlib.sha256(token.encode()).digest(), asyncio.get_running_loop().time()
        known = self._known.get(digest)
        if known is None or known[0] < now:
            answer = await self._ask(token)
            seconds = _REFUSED_SECONDS if isinstance(answer, Refusal) else _KNOWN_SECONDS * random.uniform(0.5, 1)
            known = (now + seconds, answer)
            self._known[digest] = known
            self._known.move_to_end(digest)
            if len(self._known) > self._keep:
                self._known.popitem(last=False)
        if isinstance(known[1], Refusal):
            raise known[1]
        return known[1]

    async def _ask(self, token: str) -> PodIdentity | Refusal:
        kind = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}
        spec = {"token": token, "audiences": [TOKEN_AUDIENCE]}
        try:
            async with self._slots:
                review = await self._kube.request("POST", path("TokenReview"), body={**kind, "spec": spec})
            return identity(review)
        except Refusal as refusal:
            return refusal
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            logger.warning("TokenReview: %s", words(error))
            raise Refusal(503, "the API server could not review the token; report again later") from error


class Crowd:
    """How many pods report, and so how often each of them should. Pure: the caller passes the time."""

    def __init__(self) -> None:
        self._heard: dict[str, float] = {}
        self._pruned = 0.0

    def seconds_to_next(self, pod_uid: str, *, now: float) -> float:
        """How long a pod that reported now should wait before it sends mere numbers again."""
        self._heard[pod_uid] = now
        seconds = len(self._heard) / REPORTS_PER_SECOND
        if now - self._pruned > _PRUNE_SECONDS:
            # A pod that was silent for three turns has ended, or has nothing to say.
            oldest = now - 3 * max(seconds, _PRUNE_SECONDS)
            self._heard = {uid: at for uid, at in self._heard.items() if at >= oldest}
            self._pruned = now
        return seconds


class ProgressEndpoint:
    """The HTTP handler.

    Args:
        reviews: identifies tokens.
        cluster: knows the pods and stores the reports.
        news: called for a run whose report may change a decision.
        figures: called for a run, with its uid, whose report only brings new numbers.
        leads: whether this replica acts.
    """

    def __init__(
        self,
        reviews: TokenReviews,
        *,
        cluster: Cluster,
        news: Callable[[RunKey], None],
        figures: Callable[[RunKey, str], None],
        leads: Callable[[], bool],
    ) -> None:
        self._reviews, self._cluster, self._leads = reviews, cluster, leads
        self._news, self._figures = news, figures
        self._crowd = Crowd()

    def add_to(self, app: web.Application) -> None:
        """Serve at ``PROGRESS_PATH``."""
        app.router.add_post(PROGRESS_PATH, self._post)

    async def _post(self, request: web.Request) -> web.Response:
        try:
            pod = await self._take(request)
        except Refusal as refusal:
            PROGRESS_REPORTS.labels(code=str(refusal.status)).inc()
            response = web.json_response({"error": str(refusal)}, status=refusal.status)
            if refusal.status == 503:
                response.force_close()  # so that the pod's next connection may reach the leader
            return response
        _TAKEN.inc()
        seconds = self._crowd.seconds_to_next(pod.uid, now=asyncio.get_running_loop().time())
        return web.Response(status=204, headers={REPORT_AFTER_HEADER: f"{seconds:.1f}"})

    async def _take(self, request: web.Request) -> PodRecord:
        if not self._leads():
            raise Refusal(503, "this replica does not lead; report again later")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refusal(401, "no bearer token in the Authorization header")
        who = await self._reviews.identity(token.strip())
        try:
            report = ProgressReport.model_validate_json(await request.read())
        except ValidationError as error:
            raise Refusal(400, f"not a progress report: {error}") from error
        pod = check(who, self._cluster.pods.get(who.namespace, who.name), report)
        key = RunKey(pod.namespace, pod.run)
        if self._cluster.progress.put(pod.run_uid, report.progress):
            self._news(key)
        else:
            self._figures(key, pod.run_uid)
        return pod
