"""Writes decisions down in a thread of its own, so that a slow disk holds up no request.

The queue to that thread is bounded. What becomes of a request whose decision cannot be written is
a setting: fail closed (the default) refuses it, fail open lets it pass. Both count it; the log says
it when it begins and when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gptjet.service.governance.audit import AuditLog
from gptjet.service.governance.review import Flagged, ReviewError, ReviewQueue
from gptjet.service.log import get_logger

logger = get_logger(__name__)

MOST_WAITING = 4_096
_TICK_S = 1.0
_END_S = 5.0


class RecordError(Exception):
    """A decision was not written down, so the request it is about is refused."""


@dataclass
class RecorderCounters:
    """What was written and what was not, since the start; written by several threads."""

    written: int = 0
    failed: int = 0
    dropped: int = 0
    timed_out: int = 0
    review_failed: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    records: Sequence[Mapping[str, object]]
    flagged: Sequence[Flagged]
    done: Callable[[Exception | None], None] | None = field(default=None)


class Recorder:
    """The audit log and the review queue behind one thread.

    open_queue  makes the ReviewQueue, in the thread that uses it; tried again when it failed
    on_tick     called about once a second in that thread
    """

    def __init__(
        self,
        audit: AuditLog,
        open_queue: Callable[[], ReviewQueue],
        *,
        fail_open: bool,
        timeout_s: float,
        on_tick: Callable[[], None],
    ) -> None:
        self._audit = audit
        self._open_queue = open_queue
        self._fail_open = fail_open
        self._timeout_s = timeout_s
        self._on_tick = on_tick
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._review: ReviewQueue | None = None
        self._review_version: int | None = None
        self._complaint: str | None = None
        self.counters = RecorderCounters()
        self.rejected: frozenset[tuple[str, str]] = frozenset()
        self.num_pending: int | None = None
        self._has_added = False

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="gptjet-governance", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Use both files once, before the thread runs. Raises OSError or ReviewError."""
        self._audit.append([{"event": "start"}])
        try:
            self._refresh()
        finally:
            self._drop_queue()  # SQLite's connections belong to their thread

    def close(self) -> None:
        """Write what is waiting, and end; a disk that hangs is left behind."""
        thread, self._thread = self._thread, None
        if thread is None:
            self._close_files()
            return
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=_END_S)
        thread.join(_END_S)

    async def record(
        self, records: Sequence[Mapping[str, object]], flagged: Sequence[Flagged]
    ) -> None:
        """Write records and queue findings.

        Failing closed it returns when they are written and raises RecordError where they are not
        within the timeout; failing open it waits for nothing.
        """
        if self._fail_open:
            self.record_later(records, flagged)
            return
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if written.done():
                return
            if error is None:
                written.set_result(None)
            else:
                written.set_exception(RecordError(str(error)))

        def done(error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(settle, error)

        self._put(_Job(records, flagged, done))
        try:
            async with asyncio.timeout(self._timeout_s):
                await written
        except TimeoutError:
            self.counters.timed_out += 1
            self._complain(f"a decision was not written within {self._timeout_s:g} s")
            raise RecordError("a decision was not written in time") from None

    def record_later(
        self, records: Sequence[Mapping[str, object]], flagged: Sequence[Flagged]
    ) -> None:
        """Write records without waiting for it; for a request that has ended anyway."""
        with contextlib.suppress(RecordError):
            self._put(_Job(records, flagged))

    def _put(self, job: _Job) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.counters.dropped += len(job.records)
            self._complain(f"{MOST_WAITING} decisions wait to be written")
            raise RecordError("too many decisions wait to be written") from None

    # --- the thread ---

    def _run(self) -> None:
        next_tick = time.monotonic() + _TICK_S
        while True:
            try:
                job = self._jobs.get(timeout=max(0.0, next_tick - time.monotonic()))
            except queue.Empty:
                self._tick()
                next_tick = time.monotonic() + _TICK_S
                continue
            if job is None:
                break
            self._write(job)
            if time.monotonic() >= next_tick:
                self._tick()
                next_tick = time.monotonic() + _TICK_S
        self._close_files()

    def _write(self, job: _Job) -> None:
        error: Exception | None = None
        try:
            self._audit.append(job.records)
        except Exception as raised:  # noqa: BLE001 - whatever it is, the thread must go on
            error = raised
            self.counters.failed += len(job.records)
        else:
            self.counters.written += len(job.records)
        if job.flagged:
            try:
                self._queue().add(job.flagged)
                self._has_added = True
            except Exception as raised:  # noqa: BLE001
                error = error or raised
                self.counters.review_failed += len(job.flagged)
                self._drop_queue()
        if error is None:
            self._recover()
        else:
            self._complain(str(error))
        if job.done is not None:
            job.done(error)

    def _tick(self) -> None:
        try:
            self._audit.sync(if_due=True)
            self._refresh()
        except (OSError, ReviewError) as error:
            self._drop_queue()
            self.num_pending = None
            self._complain(str(error))
        try:
            self._on_tick()
        except Exception as error:
            logger.error("governance: the watch of the policy failed", exc_info=error)

    def _queue(self) -> ReviewQueue:
        if self._review is None:
            self._review = self._open_queue()
            self._review_version = None
        return self._review

    def _drop_queue(self) -> None:
        if self._review is not None:
            self._review.close()
            self._review = None

    def _refresh(self) -> None:
        review = self._queue()
        version = review.data_version()
        is_changed = version != self._review_version
        # A version does not tell of what the same connection has written.
        if is_changed or self._has_added:
            self._has_added = False
            self.num_pending = review.num_pending()
        if is_changed:
            self.rejected = review.rejected()
            self._review_version = version

    def _close_files(self) -> None:
        self._audit.close()
        self._drop_queue()

    def _complain(self, reason: str) -> None:
        """Once, until it works again: a full disk must not fill the log, too."""
        if self._complaint is None:
            self._complaint = reason
            logger.error("governance: decisions cannot be recorded", reason=reason)

    def _recover(self) -> None:
        if self._complaint is not None:
            self._complaint = None
            logger.warning(
                "governance: decisions are recorded again",
                failed=self.counters.failed,
                dropped=self.counters.dropped,
            )
