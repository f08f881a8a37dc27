"""Makes the runs of a sweep: servers up, cells in randomised blocks, every sample on disk at once.

It knows servers only through `connect`, which gives a client for a level; so tests run it against a
fake, the command line against `gptjet serve` or running endpoints.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gptjet.benchmarks import records
from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.design import (
    Block,
    Cell,
    Run,
    RunKey,
    Visit,
    blocks,
    prompt_token_ids,
    too_long,
)
from gptjet.benchmarks.environment import load_average, utc_now, without_paths
from gptjet.benchmarks.measure import MeasureError, measure
from gptjet.benchmarks.records import Results
from gptjet.benchmarks.results import ResultsError, ResultsWriter
from gptjet.benchmarks.server_process import ServerError
from gptjet.benchmarks.sweep_plan import Connect, Connection, Observer, Outcome, SweepPlan
from gptjet.service.client_types import GptjetError, UnavailableError

# A level whose runs fail this often in a row is given up: the rest would fail the same way.
MAX_FAILURES_IN_A_ROW = 3
_WARMUP_TOKENS = 8


@dataclass(slots=True)
class Runner:
    """One session over one configuration.

    earlier            what the file holds already
    measure_bandwidth  called once, before the first server runs, if there is a run to make
    stop_asked         looked at between two runs; true ends the session with KeyboardInterrupt
    """

    plan: SweepPlan
    writer: ResultsWriter
    earlier: Results
    connect: Connect
    observer: Observer
    environment: Mapping[str, Any]
    measure_bandwidth: Callable[[], Mapping[str, Any] | None] = lambda: None
    stop_asked: Callable[[], bool] = lambda: False
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    outcome: Outcome = field(default_factory=Outcome)
    _open: dict[LevelName, Connection] = field(default_factory=dict)
    _failures: dict[LevelName, int] = field(default_factory=dict)
    _given_up: dict[LevelName, str] = field(default_factory=dict)
    _infeasible: set[Cell] = field(default_factory=set)

    def run(self) -> Outcome:
        """Make every run that is not on file. Raises ResultsError for another sweep's file.

        What one level cannot do is recorded as its failures; the others go on.
        """
        self._check_same_sweep()
        plan = self.plan
        schedule = list(blocks(plan.config, plan.levels, together=plan.together))
        pending = [run for block in schedule for visit in block.visits for run in visit.runs]
        every = len(pending)
        pending = [run for run in pending if not self._is_on_file(run)]
        runs_of_infeasible = len(self._infeasible) * plan.config.design.runs
        self.outcome.infeasible_cells = len(self._infeasible)
        self.outcome.already_there = every - len(pending) - runs_of_infeasible
        self.observer.begin({run: _weight(run) for run in pending}, self.outcome.already_there)
        if not pending:
            return self.outcome
        self._record_session()
        how = "interrupted"
        try:
            for block in schedule:
                for visit in block.visits:
                    self._make_visit(block, visit)
            how = "complete"
        finally:
            self._close_all()
            self.writer.append(
                records.END,
                {
                    "session": self.session,
                    "ended_at": utc_now(),
                    "how": how,
                    **asdict(self.outcome),
                },
            )
        return self.outcome

    # --- what is on file ---

    def _check_same_sweep(self) -> None:
        """A file holds one sweep a machine and model: other prompts or weights are another one."""
        mine = self.plan.identity()
        for session in self.earlier.sessions.values():
            if (session.hardware, session.model) != (self.plan.hardware, self.plan.model):
                continue
            changed = {
                name: (session.identity.get(name), value)
                for name, value in mine.items()
                if session.identity.get(name) != value
            }
            if changed:
                told = "; ".join(f"{name} was {a}, is {b}" for name, (a, b) in changed.items())
                raise ResultsError(
                    f"{self.writer.path} was made by another sweep ({told}): give another --out"
                )

    def _is_on_file(self, run: Run) -> bool:
        key = self.plan.key(run)
        if key in self.earlier.samples:
            return True
        if RunKey(*_cell_fields(key), -1) in self.earlier.infeasible:
            self._infeasible.add(run.cell)
            return True
        return key in self.earlier.failures and not self.plan.retry_failures

    # --- runs ---

    def _make_visit(self, block: Block, visit: Visit) -> None:
        runs = [run for run in visit.runs if not self._is_on_file(run)]
        needed = {run.cell.level for run in runs if run.cell not in self._infeasible}
        for level in [level for level in self._open if level not in visit.levels]:
            self._close(level)
        for level in visit.levels:
            if level in needed and level not in self._open and level not in self._given_up:
                self._bring_up(level)
        for position, run in enumerate(runs):
            self._make_run(block, position, run)

    def _make_run(self, block: Block, position: int, run: Run) -> None:
        if self.stop_asked():
            raise KeyboardInterrupt
        level = run.cell.level
        if level not in self._open and level not in self._given_up:
            self._bring_up(level)  # it fell over in an earlier run
        if run.cell in self._infeasible:
            self.observer.advance(run, None)
            return
        if level in self._given_up:
            self._record_failure(run, f"not run, the level was given up: {self._given_up[level]}")
            return
        connection = self._open[level]
        design = self.plan.config.design
        prompt = prompt_token_ids(
            design.seed,
            run.cell,
            run.index,
            connection.model.vocab_size,
            connection.model.eos_token_id,
        )
        started_at, load = utc_now(), load_average()
        try:
            measured = measure(
                connection.client,
                prompt,
                run.cell.output_tokens,
                timeout_s=design.request_timeout_s,
            )
        except (GptjetError, MeasureError) as error:
            self._run_failed(run, error)
            return
        self._failures[level] = 0
        self.writer.append(
            records.SAMPLE,
            {
                **self._fields(run.cell),
                "run": run.index,
                "block": block.index,
                "position": position,
                "started_at": started_at,
                "load": load,
                "ttft_ms": round(measured.ttft_ms, 4),
                "itl_ms": [round(gap, 4) for gap in measured.itl_ms],
                "e2e_ms": round(measured.e2e_ms, 4),
                "server": {name: round(value, 4) for name, value in measured.server.items()},
            },
        )
        self.outcome.made += 1
        self.observer.advance(run, None)

    def _run_failed(self, run: Run, error: Exception) -> None:
        level = run.cell.level
        self._record_failure(run, str(error))
        self._failures[level] = self._failures.get(level, 0) + 1
        if self._failures[level] >= MAX_FAILURES_IN_A_ROW:
            self._give_up(level, f"{MAX_FAILURES_IN_A_ROW} failures in a row, the last: {error}")
        elif isinstance(error, UnavailableError):
            self._close(level)  # the next run of the level brings it up again

    def _record_failure(self, run: Run, error: str) -> None:
        text = without_paths(" ".join(error.split()))
        self.writer.append(
            records.FAILURE,
            {**self._fields(run.cell), "run": run.index, "failed_at": utc_now(), "error": text},
        )
        self.outcome.failed += 1
        self.observer.advance(run, text)

    # --- servers ---

    def _bring_up(self, level: LevelName) -> None:
        """Connect and warm up; a level that cannot be is given up."""
        self.observer.note(f"{level}: starting")
        try:
            connection = self.connect(level)
        except (ServerError, GptjetError) as error:
            self._give_up(level, str(error))
            return
        self._open[level] = connection
        self._record_server(level, connection)
        self._record_infeasible(level, connection.model.max_context)
        try:
            self._warm_up(level, connection)
        except (GptjetError, MeasureError) as error:
            self._give_up(level, f"warm-up failed: {error}")

    def _warm_up(self, level: LevelName, connection: Connection) -> None:
        """Requests of every input length that fits, so that no cell pays for being the first."""
        design = self.plan.config.design
        tokens = min(_WARMUP_TOKENS, *design.output_tokens)
        for round_index in range(design.warmup_rounds):
            for input_tokens in design.input_tokens:
                cell = Cell(level, input_tokens, tokens)
                if too_long(cell, connection.model.max_context):
                    continue
                # Runs count from 0, so a negative index is a prompt that no run has.
                prompt = prompt_token_ids(
                    design.seed,
                    cell,
                    -1 - round_index,
                    connection.model.vocab_size,
                    connection.model.eos_token_id,
                )
                measure(connection.client, prompt, tokens, timeout_s=design.request_timeout_s)

    def _give_up(self, level: LevelName, reason: str) -> None:
        self._close(level)
        self._given_up[level] = without_paths(" ".join(reason.split()))
        self.observer.note(f"{level}: given up: {self._given_up[level]}")

    def _close(self, level: LevelName) -> None:
        connection = self._open.pop(level, None)
        if connection is not None:
            connection.close()

    def _close_all(self) -> None:
        for level in list(self._open):
            self._close(level)

    # --- other records ---

    def _fields(self, cell: Cell) -> dict[str, Any]:
        return {
            "session": self.session,
            "hardware": self.plan.hardware,
            "model": self.plan.model,
            "backend": cell.level.backend,
            "weight_type": cell.level.weight_type,
            "input_tokens": cell.input_tokens,
            "output_tokens": cell.output_tokens,
        }

    def _record_session(self) -> None:
        plan = self.plan
        config = plan.config.model_dump(mode="json")
        # A folder's path names a machine; the label says which model it was.
        config["model"]["checkpoint"] = without_paths(plan.config.model.checkpoint)
        self.writer.append(
            records.SESSION,
            {
                "session": self.session,
                "started_at": utc_now(),
                "config": config,
                "levels": [str(level) for level in plan.levels],
                "hardware": plan.hardware,
                "hardware_verified": plan.hardware_verified,
                "model": plan.model,
                "model_note": plan.model_note,
                "geometry": plan.geometry,
                "servers": "together" if plan.together else "alternate",
                "quick": plan.quick,
                "identity": plan.identity(),
                "environment": dict(self.environment),
                "bandwidth": self.measure_bandwidth(),
            },
        )

    def _record_server(self, level: LevelName, connection: Connection) -> None:
        model = asdict(connection.model)
        model["name"] = self.plan.model
        model["parity"]["detail"] = without_paths(model["parity"]["detail"])
        self.writer.append(
            records.SERVER,
            {
                "session": self.session,
                "backend": level.backend,
                "weight_type": level.weight_type,
                "start_s": connection.start_s,
                "model_info": model,
            },
        )

    def _record_infeasible(self, level: LevelName, max_context: int) -> None:
        design = self.plan.config.design
        for input_tokens in design.input_tokens:
            for output_tokens in design.output_tokens:
                cell = Cell(level, input_tokens, output_tokens)
                reason = too_long(cell, max_context)
                if reason is None or cell in self._infeasible:
                    continue
                self._infeasible.add(cell)
                self.outcome.infeasible_cells += 1
                self.writer.append(records.INFEASIBLE, {**self._fields(cell), "reason": reason})


def _weight(run: Run) -> float:
    """How much of the sweep's time a run is, roughly: a prompt token costs far less than a step."""
    return run.cell.output_tokens + run.cell.input_tokens / 20


def _cell_fields(key: RunKey) -> tuple[str, str, str, str, int, int]:
    return (
        key.hardware,
        key.model,
        key.backend,
        key.weight_type,
        key.input_tokens,
        key.output_tokens,
    )
