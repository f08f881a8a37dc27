"""The records of a sweep's result file, typed. Times in ms on the clock of whoever measured them.

session     one start of the runner: configuration, environment, measured bandwidth
server      one server that took part: what GetModel said, how long it took to serve
sample      one run
failure     one run that failed, with the error's text
infeasible  one cell that can never run: prompt + output > context
end         how a session ended
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gptjet.benchmarks.design import RunKey
from gptjet.benchmarks.results import ResultsError, read_records

SESSION, SERVER, SAMPLE = "session", "server", "sample"
FAILURE, INFEASIBLE, END = "failure", "infeasible", "end"


class _Record(BaseModel):
    # Fields that a later version adds do not stop this one from reading.
    model_config = ConfigDict(frozen=True, extra="ignore")


class CellFields(_Record):
    """Which cell a record is about. `hardware` is what was really there."""

    session: str
    hardware: str
    model: str
    backend: str
    weight_type: str
    input_tokens: int
    output_tokens: int


class ServerTimings(_Record):
    """The server's own timings of a request; the wire message Timings says what each is."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    e2e_ms: float


class Sample(CellFields):
    """One run, measured at the client with a monotonic clock from the call on.

    ttft_ms  until the first token had arrived
    itl_ms   between the arrivals of two chunks with tokens, output_tokens - 1 of them
    e2e_ms   until the stream had ended
    """

    run: int
    block: int
    position: int
    started_at: str
    load: float
    ttft_ms: float
    itl_ms: tuple[float, ...]
    e2e_ms: float
    server: ServerTimings

    @property
    def key(self) -> RunKey:
        """Its identity."""
        return _key(self, self.run)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole exchange, as the published experiment counts."""
        return self.output_tokens / self.e2e_ms * 1000

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None where there is no second one."""
        return sum(self.itl_ms) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class Failure(CellFields):
    """One run that failed. `error` is one line."""

    run: int
    error: str

    @property
    def key(self) -> RunKey:
        """Its identity."""
        return _key(self, self.run)


class Infeasible(CellFields):
    """A cell that cannot run. `reason` is one line."""

    reason: str


class Session(_Record):
    """One start of the runner. The mappings are plain JSON data, as recorded."""

    session: str
    started_at: str
    config: Mapping[str, Any]
    hardware: str
    hardware_verified: bool
    model: str
    model_note: str | None = None
    servers: str
    quick: bool = False
    environment: Mapping[str, Any]
    bandwidth: Mapping[str, Any] | None = None
    geometry: Mapping[str, Any] | None = None
    identity: Mapping[str, Any]


class Results:
    """The records of one or more files, without duplicates.

    A success stands over a failure of the same run. The same run measured twice is kept once, the
    first time, and counted in `duplicates`.
    """

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.samples: dict[RunKey, Sample] = {}
        self.failures: dict[RunKey, Failure] = {}
        self.infeasible: dict[RunKey, Infeasible] = {}
        self.duplicates = 0

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Results:
        """Read and merge. Raises ResultsError."""
        results = cls()
        for path in paths:
            for number, record in enumerate(read_records(path), start=1):
                try:
                    results.add(record)
                except ValidationError as error:
                    problem = error.errors()[0]
                    where = ".".join(str(part) for part in problem["loc"])
                    raise ResultsError(
                        f"{path}: record {number} ({record['kind']}): {where}: {problem['msg']}"
                    ) from error
        return results

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one record; kinds that are not a sweep's are passed over."""
        kind = record["kind"]
        if kind == SESSION:
            session = Session.model_validate(record)
            self.sessions[session.session] = session
        elif kind == SAMPLE:
            sample = Sample.model_validate(record)
            if sample.key in self.samples:
                self.duplicates += self.samples[sample.key] != sample
                return
            self.samples[sample.key] = sample
            self.failures.pop(sample.key, None)
        elif kind == FAILURE:
            failure = Failure.model_validate(record)
            if failure.key not in self.samples:
                self.failures[failure.key] = failure
        elif kind == INFEASIBLE:
            cell = Infeasible.model_validate(record)
            self.infeasible[_key(cell, -1)] = cell


def _key(record: CellFields, run: int) -> RunKey:
    return RunKey(
        record.hardware,
        record.model,
        record.backend,
        record.weight_type,
        record.input_tokens,
        record.output_tokens,
        run,
    )
