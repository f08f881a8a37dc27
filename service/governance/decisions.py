"""From findings in one text to records of the audit log and items of the review queue.

A text can have a thousand matches of one rule: that is one record with their number, the first few
places and their digests.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gptjet.service.governance.folding import fold
from gptjet.service.governance.guard import Finding
from gptjet.service.governance.review import Flagged

MOST_SPANS = 16
MOST_EXCERPT_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose text it is. `field` is its place in the message; for an output the sequence's."""

    request_id: str
    method: str
    direction: str
    field: str


class Digests:
    """Stands for a text without telling it: HMAC-SHA256 with a key that stays on this machine.

    A plain hash of a telephone number is found out by trying them all. Texts that fold to the same
    have the same digest.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, rule: str, matched: str) -> str:
        """32 hexadecimal digits for what a rule found."""
        message = f"{rule}\0{fold(matched)}".encode(errors="surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:32]


@dataclass
class _Tally:
    count: int = 0
    written: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    excerpts: list[str] = field(default_factory=list)


class DecisionLog:
    """The decisions about one text, as records are due: the first of a rule at once, the rest of
    its matches when the text ends.
    """

    def __init__(
        self,
        origin: Origin,
        policy: str,
        digests: Digests,
        *,
        excerpts: bool,
        on_decision: Callable[[str, str, str], None],
    ) -> None:
        """`on_decision` is told (direction, rule, action) once, with the first record of them."""
        self._on_decision = on_decision
        self._origin = origin
        self._policy = policy
        self._digests = digests
        self._excerpts = excerpts
        self._tallies: dict[tuple[str, str], _Tally] = {}
        self._taken = 0

    def take(
        self, findings: Sequence[Finding], *, final: bool
    ) -> tuple[list[dict[str, object]], list[Flagged]]:
        """Records and review items that are due; `findings` is the whole list each time."""
        new, self._taken = findings[self._taken :], len(findings)
        flagged: list[Flagged] = []
        for finding in new:
            tally = self._tallies.setdefault((finding.rule.name, finding.action), _Tally())
            tally.count += 1
            if len(tally.spans) < MOST_SPANS:
                flagged += self._note(finding, tally)
        records: list[dict[str, object]] = []
        for (rule, action), tally in self._tallies.items():
            due = tally.count > tally.written if final else tally.written == 0
            if due:
                if not tally.written:
                    self._on_decision(self._origin.direction, rule, action)
                tally.written = tally.count
                records.append(self._record(rule, action, tally))
        return records, flagged

    def _note(self, finding: Finding, tally: _Tally) -> list[Flagged]:
        rule = finding.rule.name
        # What has no text of its own (a length) is told apart by its request.
        digest = self._digests.of(rule, finding.matched or f"request {self._origin.request_id}")
        excerpt = (finding.before + finding.matched)[:MOST_EXCERPT_CHARACTERS]
        tally.spans.append((finding.start, finding.end))
        is_new = digest not in tally.digests
        tally.digests.append(digest)
        if self._excerpts:
            tally.excerpts.append(excerpt)
        if finding.action != "flag" or not is_new:
            return []
        return [
            Flagged(
                rule=rule,
                digest=digest,
                request_id=self._origin.request_id,
                method=self._origin.method,
                direction=self._origin.direction,
                field=self._origin.field,
                start=finding.start,
                end=finding.end,
                # SQLite holds UTF-8.
                excerpt=excerpt.encode(errors="replace").decode() if self._excerpts else None,
            )
        ]

    def _record(self, rule: str, action: str, tally: _Tally) -> dict[str, object]:
        record: dict[str, object] = {
            "event": "decision",
            "request_id": self._origin.request_id,
            "method": self._origin.method,
            "direction": self._origin.direction,
            "field": self._origin.field,
            "rule": rule,
            "action": action,
            "count": tally.count,
            "spans": list(tally.spans),
            "digests": list(tally.digests),
            "policy": self._policy,
        }
        if self._excerpts:
            record["excerpts"] = list(tally.excerpts)
        return record
