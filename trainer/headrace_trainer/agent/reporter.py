"""Sends the pod's progress: rank 0's latest report, to the operator or to a file that the local body reads."""

import logging
import threading
from datetime import UTC, datetime
from pathlib import Path

import urllib3

from headrace_api.contract import REPORT_AFTER_HEADER, Progress, ProgressReport, ResolvedStage
from headrace_api.faults import Outcome
from headrace_trainer.agent.settings import Settings
from headrace_trainer.stage import write_atomically

_HTTP_INTERVAL_SECONDS = 2.0
_FILE_INTERVAL_SECONDS = 0.25
_FINISH_SECONDS = 3.0
_MOST_SECONDS = 60.0
"""Between two reports, whatever the operator asks for."""

log = logging.getLogger("headrace.agent")


class Reporter:
    """Sends progress from its own thread, so that an unresponsive operator blocks nobody.

    A lost report does no harm: the next one replaces it.
    """

    def __init__(self, resolved: ResolvedStage, settings: Settings) -> None:
        self._resolved, self._settings = resolved, settings
        self._url = resolved.progress_url or ""
        self._interval = _FILE_INTERVAL_SECONDS if self._url.startswith("file:") else _HTTP_INTERVAL_SECONDS
        self._http = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(connect=2, read=5))
        self._news = threading.Condition()
        self._newest: Progress | None = None
        self._sent: Progress | None = None
        self._last = False
        self._pause = self._interval
        """Until numbers alone are sent again: the operator asks for more where many pods report."""
        if self._url and settings.index == 0:  # only pod 0 reports
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def send(self, progress: Progress) -> None:
        """Queue a report. It is sent if it is new, at most once per interval; mere numbers may have to wait longer."""
        with self._news:
            self._newest = progress
            self._news.notify()

    def finish(self, outcome: Outcome) -> None:
        """Send the last report at once, so that a checkpoint saved while stopping becomes known."""
        with self._news:
            if self._newest is not None:
                phase = "Done" if outcome.fault is None else "Stopped"
                update = {
                    "phase": phase,
                    "message": outcome.message[:1024],
                    "time": datetime.now(UTC),
                    "endpoint": None,
                }
                self._newest = self._newest.model_copy(update=update)
            self._last = True
            self._news.notify()
        if self._url and self._settings.index == 0:
            self._thread.join(_FINISH_SECONDS)

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._last or self._newest != self._sent)
                progress, last = self._newest, self._last
            if progress is not None and progress != self._sent and self._deliver(progress):
                self._sent = progress
            if last:
                return
            with self._news:
                self._news.wait_for(lambda: self._last, self._interval)
                self._news.wait_for(lambda: self._last or self._has_news(), self._pause - self._interval)

    def _has_news(self) -> bool:
        """Whether the newest report differs from the last one in more than numbers."""
        newest, sent = self._newest, self._sent
        if newest is None or sent is None:
            return newest is not None
        return (newest.phase, newest.endpoint, newest.checkpoint) != (sent.phase, sent.endpoint, sent.checkpoint)

    def _deliver(self, progress: Progress) -> bool:
        if not self._url.startswith("file:"):
            return self._post(progress)
        try:
            text = progress.model_dump_json(by_alias=True, exclude_none=True)
            write_atomically(Path(self._url.removeprefix("file://")), text)
        except OSError as error:
            log.warning("failed to write progress: %s", error)
            return False
        return True

    def _post(self, progress: Progress) -> bool:
        headers = {"Content-Type": "application/json"}
        try:
            if self._settings.token_file is not None:
                headers["Authorization"] = f"Bearer {self._settings.token_file.read_text().strip()}"
            answer = self._http.request("POST", self._url, body=self._envelope(progress), headers=headers)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            log.warning("failed to report progress: %s", error)
            return False
        if answer.status >= 300:
            log.warning("progress report rejected: %s %s", answer.status, answer.data[:200].decode(errors="replace"))
            return False
        asked = float(answer.headers.get(REPORT_AFTER_HEADER, "0"))
        self._pause = min(max(asked, self._interval), _MOST_SECONDS)
        return True

    def _envelope(self, progress: Progress) -> str:
        report = ProgressReport(namespace=self._resolved.namespace, run=self._resolved.run, progress=progress)
        return report.model_dump_json(by_alias=True, exclude_none=True)
