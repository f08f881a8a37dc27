"""What happened to one request, and the latencies that follow from it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

OK = "OK"
WRONG_LENGTH = "WRONG_LENGTH"
"""Answered, but not with as many tokens as were asked for."""
UNFINISHED = "UNFINISHED"
"""Still running when the time to drain was over; cancelled then."""
INTERRUPTED = "INTERRUPTED"
"""Still running when a person ended the run: neither a success nor a failure of the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request on the client's clock, in ns after the start of the run.

    intended_ns  when it should have been sent. Every latency counts from here, so that a client
                 that is late cannot hide a wait (coordinated omission). Closed loop: `sent_ns`
    arrivals     (when, how many tokens) of each message with tokens
    status       OK, the name of a gRPC status, or one of this module's words
    server       the server's own timings of it, in ms; empty where it gave none
    """

    index: int
    intended_ns: int
    sent_ns: int
    ended_ns: int
    arrivals: tuple[tuple[int, int], ...]
    status: str
    prompt_tokens: int | None
    asked_tokens: int
    was_cut: bool = False
    server: Mapping[str, float] | None = None

    @property
    def is_ok(self) -> bool:
        """Whether it was answered in full."""
        return self.status == OK

    @property
    def output_tokens(self) -> int:
        """Tokens that arrived."""
        return sum(count for _, count in self.arrivals)

    @property
    def late_ns(self) -> int:
        """How long after its intended time it was sent."""
        return self.sent_ns - self.intended_ns

    @property
    def ttft_ns(self) -> int | None:
        """Time to first token; None where none came."""
        return self.arrivals[0][0] - self.intended_ns if self.arrivals else None

    @property
    def itl_ns(self) -> tuple[int, ...]:
        """Inter-token latencies, one a token after the first; 0 within one message."""
        if not self.arrivals:
            return ()
        gaps = [0] * (self.arrivals[0][1] - 1)
        for (before, _), (now, count) in itertools.pairwise(self.arrivals):
            gaps += [now - before, *([0] * (count - 1))]
        return tuple(gaps)

    @property
    def tpot_ns(self) -> int | None:
        """Time per output token, the first excluded; None for fewer than two tokens."""
        if self.output_tokens < 2:
            return None
        return round((self.arrivals[-1][0] - self.arrivals[0][0]) / (self.output_tokens - 1))

    @property
    def e2e_ns(self) -> int:
        """Until the stream has ended, which is after its last token."""
        return self.ended_ns - self.intended_ns

    def to_json(self) -> dict[str, Any]:
        """Exact: whole ns."""
        return {
            "index": self.index,
            "status": self.status,
            "intended_ns": self.intended_ns,
            "sent_ns": self.sent_ns,
            "ended_ns": self.ended_ns,
            "arrivals": [list(arrival) for arrival in self.arrivals],
            "prompt_tokens": self.prompt_tokens,
            "asked_tokens": self.asked_tokens,
            "was_cut": self.was_cut,
            "server": dict(self.server or {}),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The sample that `to_json` wrote; further fields are left alone."""
        return cls(
            index=fields["index"],
            status=fields["status"],
            intended_ns=fields["intended_ns"],
            sent_ns=fields["sent_ns"],
            ended_ns=fields["ended_ns"],
            arrivals=tuple((when, count) for when, count in fields["arrivals"]),
            prompt_tokens=fields["prompt_tokens"],
            asked_tokens=fields["asked_tokens"],
            was_cut=fields["was_cut"],
            server=fields["server"] or None,
        )
