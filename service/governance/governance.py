"""Governance of one server: its policy, kept up to date, and its decisions, written down."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjet.service.governance.audit import AuditLog, Fsync
from gptjet.service.governance.decisions import DecisionLog, Digests, Origin
from gptjet.service.governance.guard import Finding, Guard
from gptjet.service.governance.policy import Chain, Policy, load_policy
from gptjet.service.governance.policy_file import Direction, PolicyError
from gptjet.service.governance.recorder import Recorder, RecorderCounters
from gptjet.service.governance.review import Flagged, ReviewError, ReviewQueue
from gptjet.service.governance.sequence_guard import Cleared, SequenceGuard, TokenBytes
from gptjet.service.log import get_logger

logger = get_logger(__name__)

AUDIT_FILE = "audit.jsonl"
REVIEW_FILE = "review.sqlite"
KEY_FILE = "digest.key"
# Longer texts are judged in a thread: the event loop serves other streams.
_INLINE_CHARACTERS = 2_048
_KEY_BYTES = 32


class GovernanceError(Exception):
    """Governance cannot start: the policy or its folder is not usable."""


class BlockedError(Exception):
    """A rule with action block, or a reviewer's rejection, ends the request."""

    def __init__(self, rule: str, direction: Direction, field: str) -> None:
        super().__init__(f"{field}: blocked by the {direction} policy, rule {rule!r}")
        self.rule = rule
        self.direction = direction
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class GovernanceSettings:
    """What the operator says; the server's settings of the same names say what each is."""

    policy: Path
    folder: Path
    fail_open: bool = False
    excerpts: bool = False
    audit_max_bytes: int = 64 * 1024 * 1024
    audit_files: int = 8
    audit_fsync: Fsync = "second"
    timeout_s: float = 2.0


@dataclass(frozen=True, slots=True)
class ReloadResult:
    """What became of a reload; where it is not ok, the policy before it goes on.

    changed  the policy read says something else than the one before it
    """

    ok: bool
    message: str
    changed: bool = False


@dataclass(frozen=True, slots=True)
class FieldText:
    """One text of a message.

    rewritable  a redacted version can take its place; else what would be redacted is blocked
    context     what stands before it: a prompt before its candidate
    patterns_only  a name made by a program: only rules of patterns say something about it
    """

    field: str
    text: str
    rewritable: bool = True
    context: str = ""
    patterns_only: bool = False


class Governance:
    """Judges texts by the current policy. Belongs to one event loop; `reload` is for any thread.

    Raises GovernanceError where the policy or the folder cannot be used (the folder only where
    decisions must be written: failing open it may come back later).
    """

    def __init__(self, settings: GovernanceSettings) -> None:
        self._settings = settings
        self._reloading = threading.Lock()
        try:
            self._policy = load_policy(settings.policy)
        except PolicyError as error:
            raise GovernanceError(str(error)) from error
        self._seen = _fingerprint(self._policy)
        self._decisions: Counter[tuple[str, str, str]] = Counter()
        self._recorder = Recorder(
            AuditLog(
                settings.folder / AUDIT_FILE,
                max_bytes=settings.audit_max_bytes,
                keep=settings.audit_files,
                fsync=settings.audit_fsync,
            ),
            lambda: ReviewQueue(settings.folder / REVIEW_FILE),
            fail_open=settings.fail_open,
            timeout_s=settings.timeout_s,
            on_tick=self._reload_if_changed,
        )
        try:
            settings.folder.mkdir(parents=True, exist_ok=True)
            self._digests = Digests(_read_key(settings.folder / KEY_FILE))
            self._recorder.check()
        except (OSError, ReviewError) as error:
            reason = f"governance_dir {settings.folder}: {_reason(error)}"
            if not settings.fail_open:
                raise GovernanceError(reason) from error
            logger.error("governance: decisions cannot be recorded", reason=reason)
            if not hasattr(self, "_digests"):
                self._digests = Digests(secrets.token_bytes(_KEY_BYTES))

    @property
    def policy(self) -> Policy:
        """The policy in force; requests that run keep the one they began with."""
        return self._policy

    @property
    def counters(self) -> RecorderCounters:
        """What was recorded and what was not."""
        return self._recorder.counters

    def decided(self) -> dict[tuple[str, str, str], int]:
        """Texts in which a rule found something, by (direction, rule, action); for any thread.

        What the policy in force may decide is there from the start, with 0. A text that a rule
        found something in many times counts once, as does one that ended before its caller let it.
        """
        counts: dict[tuple[str, str, str], int] = {
            (direction, rule.name, rule.action): 0
            for direction, chain in self._policy.chains.items()
            for rule in chain.rules
        }
        # Copied at once: the event loop may count beside a scrape.
        counts.update(tuple(self._decisions.items()))
        return counts

    @property
    def num_unrecorded(self) -> int:
        """Decisions and findings that could not be written to the audit log or the queue."""
        counters = self.counters
        return counters.failed + counters.dropped + counters.review_failed

    @property
    def num_pending(self) -> int | None:
        """Items that wait for a reviewer, as of about a second ago; None: it cannot be read."""
        return self._recorder.num_pending

    def start(self) -> None:
        """Start writing and watching the file."""
        self._recorder.start()
        logger.info("governance", policy=str(self._settings.policy), rules=len(self._policy.rules))

    def close(self) -> None:
        """Write what is waiting and close the files."""
        self._recorder.close()

    def reload(self) -> ReloadResult:
        """Read the policy file again. A file that is not usable changes nothing."""
        with self._reloading:
            # Before it is read: a change while it is read is seen again.
            self._seen = _fingerprint(self._policy)
            try:
                policy = load_policy(self._settings.policy)
            except PolicyError as error:
                logger.error(
                    "governance: the new policy is not usable, the old one goes on",
                    reason=str(error),
                )
                return ReloadResult(False, str(error))
            changed = policy.digest != self._policy.digest
            if policy.files != self._policy.files:
                self._seen = _fingerprint(policy)
            self._policy = policy
        message = f"{len(policy.rules)} rules" + ("" if changed else ", as before")
        logger.info("governance: policy read", rules=len(policy.rules), changed=changed)
        return ReloadResult(True, message, changed)

    async def judge(
        self,
        texts: Sequence[FieldText],
        direction: Direction,
        *,
        request_id: str = "",
        method: str = "",
    ) -> list[str]:
        """The texts as they may go on, in their order.

        Raises BlockedError, and RecordError where the decision could not be written down.
        """
        policy = self._policy
        chain = policy.chains[direction]
        if not chain.rules:
            return [item.text for item in texts]
        size = sum(len(item.text) for item in texts)
        if size <= _INLINE_CHARACTERS:
            judged = [self._judge(item, chain) for item in texts]
        else:
            judged = await asyncio.to_thread(lambda: [self._judge(item, chain) for item in texts])
        blocked: BlockedError | None = None
        for item, (_, findings) in zip(texts, judged, strict=True):
            if findings:
                origin = Origin(request_id, method, direction, item.field)
                log = self._log(origin, policy)
                await self._record(log, findings, final=True)
                last = findings[-1]
                if last.action == "block" and blocked is None:
                    blocked = BlockedError(last.rule.name, direction, item.field)
        if blocked is not None:
            raise blocked
        return [text for text, _ in judged]

    def output(
        self, token_bytes: TokenBytes, *, request_id: str, method: str, context: str
    ) -> OutputPolicy | None:
        """What judges the output of one request; None where there are no rules for it.

        context  the prompt's text, "" where it is echoed
        """
        policy = self._policy
        if not policy.chains["output"].rules:
            return None
        return OutputPolicy(self, policy, token_bytes, request_id, method, context)

    def is_rejected(self, rule: str, matched: str) -> bool:
        """A reviewer has rejected this text for this rule."""
        rejected = self._recorder.rejected
        return bool(rejected) and (rule, self._digests.of(rule, matched)) in rejected

    def _judge(self, item: FieldText, chain: Chain) -> tuple[str, list[Finding]]:
        guard = Guard(chain, self.is_rejected, item.context, patterns_only=item.patterns_only)
        guard.push(item.text)
        guard.finish()
        findings = guard.findings
        if item.rewritable:
            return guard.release(), findings
        # Not to be rewritten: what would be redacted ends the request, as what is blocked does.
        for position, finding in enumerate(findings):
            if finding.action != "flag":
                blocked = Finding(
                    finding.rule,
                    "block",
                    finding.start,
                    finding.end,
                    finding.matched,
                    finding.before,
                )
                return "", [*findings[:position], blocked]
        return item.text, findings

    def _log(self, origin: Origin, policy: Policy) -> DecisionLog:
        return DecisionLog(
            origin,
            policy.digest,
            self._digests,
            excerpts=self._settings.excerpts,
            on_decision=self._count,
        )

    def _count(self, direction: str, rule: str, action: str) -> None:
        self._decisions[direction, rule, action] += 1

    async def _record(self, log: DecisionLog, findings: Sequence[Finding], *, final: bool) -> None:
        records, flagged = log.take(findings, final=final)
        if records:
            await self._recorder.record(records, flagged)

    def _record_later(
        self, records: Sequence[dict[str, object]], flagged: Sequence[Flagged]
    ) -> None:
        if records or flagged:
            self._recorder.record_later(records, flagged)

    def _reload_if_changed(self) -> None:
        """In a thread of its own: a long list takes a while, and decisions go on being written."""
        fingerprint = _fingerprint(self._policy)
        if fingerprint != self._seen:
            self._seen = fingerprint
            threading.Thread(target=self.reload, name="gptjet-policy", daemon=True).start()


class OutputPolicy:
    """The output rules over the sequences of one request."""

    def __init__(
        self,
        governance: Governance,
        policy: Policy,
        token_bytes: TokenBytes,
        request_id: str,
        method: str,
        context: str,
    ) -> None:
        self._governance = governance
        self._policy = policy
        self._chain = policy.chains["output"]
        self._token_bytes = token_bytes
        self._request_id = request_id
        self._method = method
        self._context = context
        self._guards: dict[int, SequenceGuard[Any]] = {}
        self._logs: dict[int, DecisionLog] = {}

    async def push(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[Any],
        *,
        is_prompt: bool,
        final: bool,
    ) -> Cleared[Any]:
        """What may leave of one step of one sequence, decisions about it written down before.

        Look at `blocked` afterwards. Raises RecordError.
        """
        guard = self._guards.get(index)
        if guard is None:
            guard = self._guards[index] = SequenceGuard(
                self._chain, self._governance.is_rejected, self._token_bytes, self._context
            )
        cleared = guard.push(text, token_ids, logprobs, is_prompt=is_prompt, final=final)
        if guard.findings:
            await self._governance._record(
                self._log_of(index),
                guard.findings,
                final=final or guard.blocked is not None,
            )
        return cleared

    def blocked(self, index: int) -> BlockedError | None:
        """What ends the request, if something does."""
        guard = self._guards.get(index)
        if guard is None or guard.blocked is None:
            return None
        return BlockedError(guard.blocked.rule.name, "output", _output_field(index))

    def forbids(self, text: str) -> bool:
        """Whether a text by itself must not be shown: a likely token's, a stop string."""
        return self._chain.enforces and self._chain.forbids(text)

    def close(self) -> None:
        """The request has ended, perhaps early: what is not yet written down, later."""
        for index, guard in self._guards.items():
            if guard.findings:
                records, flagged = self._log_of(index).take(guard.findings, final=True)
                self._governance._record_later(records, flagged)

    def _log_of(self, index: int) -> DecisionLog:
        log = self._logs.get(index)
        if log is None:
            origin = Origin(self._request_id, self._method, "output", _output_field(index))
            log = self._logs[index] = self._governance._log(origin, self._policy)
        return log


def _output_field(index: int) -> str:
    return f"sequences[{index}]"


def _fingerprint(policy: Policy) -> tuple[object, ...]:
    """Changes when one of the policy's files does; a file that is away for a moment has none."""
    marks: list[object] = []
    for path in policy.files:
        try:
            status = path.stat()
        except OSError:
            marks.append(None)
        else:
            marks.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(marks)


def _read_key(path: Path) -> bytes:
    """The key of this folder's digests, drawn where there is none. Raises OSError."""
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            os.write(descriptor, secrets.token_bytes(_KEY_BYTES))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(temporary, path)  # unlike a rename, never over another process's key
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise OSError(f"{path.name} must hold {_KEY_BYTES} bytes, it has {len(key)}")
    return key


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
