"""What a load run is: plain data that the parent decides and the workers are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from gptjet.benchmarks.load.workload import WorkloadSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run against one server.

    concurrency  requests running at once, of all processes together; None: an open loop
    timeout_s    deadline of each request
    warmup       requests sent one after the other by each process before the run, not counted
    drain_s      how long requests may still take after the last one was sent
    tls          see `transport.tls_to_json`
    """

    target: str
    workload: WorkloadSpec
    concurrency: int | None = None
    timeout_s: float = 300.0
    warmup: int = 2
    drain_s: float = 30.0
    processes: int = 1
    connections: int = 1
    tls: Mapping[str, str] | None = None

    @property
    def mode(self) -> str:
        """ "open" or "closed"."""
        return "open" if self.concurrency is None else "closed"

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The spec that `to_json` wrote."""
        return cls(**{**fields, "workload": WorkloadSpec(**fields["workload"])})

    def concurrency_of(self, worker: int) -> int:
        """A worker's share of the concurrency; shares differ by one at most."""
        assert self.concurrency is not None, "a closed loop has one"
        whole, rest = divmod(self.concurrency, self.processes)
        return whole + (worker < rest)
