"""Progress out of the pod: the newest heartbeat of rank 0 to the operator, or to a file that the local body reads."""

import logging
import time
from datetime import UTC, datetime
from pathlib import Path

import urllib3
from pydantic import ValidationError

from headrace_api.contract import Progress, ProgressReport, ResolvedStage
from headrace_api.faults import Outcome
from headrace_trainer.agent.settings import Settings
from headrace_trainer.stage import HEARTBEATS, write_atomically

_HTTP_INTERVAL_SECONDS = 2.0
_FILE_INTERVAL_SECONDS = 0.25

log = logging.getLogger("headrace.agent")


class Reporter:
    """Sends a pod's progress. Losing a report is harmless: the next one replaces it."""

    def __init__(self, resolved: ResolvedStage, settings: Settings) -> None:
        self._resolved, self._settings = resolved, settings
        self._url = resolved.progress_url or ""
        self._http = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(connect=2, read=5))
        self._last_sent = 0.0
        self._last: Progress | None = None

    def newest(self) -> Progress | None:
        """The newest heartbeat of the pod's first rank, or None before there is one."""
        rank = self._settings.index * self._resolved.stage.compute.ranks
        try:
            text = (self._settings.scratch / HEARTBEATS / f"{rank}.json").read_text()
            return Progress.model_validate_json(text)
        except (FileNotFoundError, ValidationError):
            return None

    def send(self, progress: Progress, *, now: bool = False) -> None:
        """Send a report, if it is news and the last one is long enough ago; only the pod with index 0 speaks."""
        interval = _FILE_INTERVAL_SECONDS if self._url.startswith("file:") else _HTTP_INTERVAL_SECONDS
        due = now or time.monotonic() - self._last_sent >= interval
        if not self._url or self._settings.index != 0 or not due or progress == self._last:
            return
        self._last_sent = time.monotonic()
        if self._url.startswith("file:"):
            text = progress.model_dump_json(by_alias=True, exclude_none=True)
            write_atomically(Path(self._url.removeprefix("file://")), text)
            self._last = progress
        elif self._post(progress):
            self._last = progress

    def finish(self, outcome: Outcome) -> None:
        """Send what the ranks said last, so that a checkpoint made while stopping is known."""
        progress = self.newest()
        if progress is not None:
            phase = "Done" if outcome.fault is None else "Stopped"
            update = {"phase": phase, "message": outcome.message[:1024], "time": datetime.now(UTC), "endpoint": None}
            self.send(progress.model_copy(update=update), now=True)

    def _post(self, progress: Progress) -> bool:
        headers = {"Content-Type": "application/json"}
        try:
            if self._settings.token_file is not None:
                headers["Authorization"] = f"Bearer {self._settings.token_file.read_text().strip()}"
            answer = self._http.request("POST", self._url, body=self._envelope(progress), headers=headers)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            log.warning("progress was not reported: %s", error)
            return False
        if answer.status >= 300:
            log.warning("progress was refused: %s %s", answer.status, answer.data[:200].decode(errors="replace"))
        return answer.status < 300

    def _envelope(self, progress: Progress) -> str:
        report = ProgressReport(namespace=self._resolved.namespace, run=self._resolved.run, progress=progress)
        return report.model_dump_json(by_alias=True, exclude_none=True)
