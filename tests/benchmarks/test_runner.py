"""The runner against a client without a server: what is on file after anything that can happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from gptjet.benchmarks.config import LevelName, SweepConfig, load_config
from gptjet.benchmarks.design import Run
from gptjet.benchmarks.records import Results, Sample
from gptjet.benchmarks.results import ResultsError, ResultsWriter, read_records
from gptjet.benchmarks.runner import Runner
from gptjet.benchmarks.server_process import ServerError
from gptjet.benchmarks.sweep_plan import Connection, Outcome, SweepPlan
from gptjet.service.client_types import InternalError, ModelInfo, UnavailableError

A = LevelName(backend="huggingface", weight_type="fp32")
B = LevelName(backend="huggingface", weight_type="bf16")


class Silent:
    """An observer that counts."""

    def __init__(self) -> None:
        self.left = 0
        self.already = 0
        self.advanced: list[str | None] = []
        self.on_advance: Callable[[], None] = lambda: None

    def begin(self, total: Any, done: int) -> None:
        self.left, self.already = len(total), done

    def note(self, text: str) -> None:
        pass

    def advance(self, run: Run, error: str | None) -> None:
        self.advanced.append(error)
        self.on_advance()


class Sweep:
    """Runs of a small design against fakes; every `run` is one session on the same file."""

    def __init__(self, path: Path, client: Any, model: ModelInfo, environment: Any) -> None:
        self.path, self.client, self.model, self.environment = path, client, model, environment
        self.config: SweepConfig = load_config("cpu").updated(
            input_tokens=[4, 8], output_tokens=[2, 3], runs=3, warmup_rounds=1
        )
        self.levels = (A, B)
        self.together = True
        self.retry_failures = False
        self.observer = Silent()
        self.opened: list[LevelName] = []
        self.closed: list[LevelName] = []
        self.most_alive = 0
        self.refuse: LevelName | None = None

    def connect(self, level: LevelName) -> Connection:
        self.opened.append(level)
        self.most_alive = max(self.most_alive, len(self.opened) - len(self.closed))
        if level == self.refuse:
            raise ServerError("no such backend in /opt/secret/place")
        return Connection(self.client, self.model, 0.1, lambda: self.closed.append(level))

    def run(self) -> Outcome:
        plan = SweepPlan(
            config=self.config,
            levels=self.levels,
            hardware="cpu",
            model="fake",
            together=self.together,
            retry_failures=self.retry_failures,
        )
        self.observer = Silent() if self.observer.advanced else self.observer
        with ResultsWriter(self.path) as writer:
            return Runner(
                plan=plan,
                writer=writer,
                earlier=Results.read([self.path]),
                connect=self.connect,
                observer=self.observer,
                environment=self.environment,
            ).run()

    def kinds(self) -> Counter[str]:
        return Counter(record["kind"] for record in read_records(self.path))

    def samples(self) -> list[Sample]:
        records = [r for r in read_records(self.path) if r["kind"] == "sample"]
        return [Sample.model_validate(record) for record in records]


@pytest.fixture
def sweep(tmp_path: Path, fake_client: Any, fake_model: ModelInfo, environment: Any) -> Sweep:
    return Sweep(tmp_path / "sweep.jsonl", fake_client(), fake_model, environment)


def assert_whole(sweep: Sweep) -> None:
    """24 runs (2 levels x 4 cells x 3), each once."""
    assert Counter(sample.key for sample in sweep.samples()) == Counter(
        {sample.key for sample in sweep.samples()}
    )
    assert len(sweep.samples()) == 24


def test_every_run_of_every_cell_is_on_file_once(sweep: Sweep) -> None:
    outcome = sweep.run()
    assert_whole(sweep)
    assert (outcome.made, outcome.failed) == (24, 0)
    assert sweep.kinds() == {"session": 1, "server": 2, "sample": 24, "end": 1}
    assert sweep.closed == [A, B]
    assert sweep.most_alive == 2


def test_a_sample_holds_every_latency_and_the_servers_timings(sweep: Sweep) -> None:
    sweep.run()
    sample = next(s for s in sweep.samples() if s.output_tokens == 3)
    assert len(sample.itl_ms) == 2
    assert sample.server.prefill_ms == 2
    assert sample.tokens_per_s == pytest.approx(3000 / sample.e2e_ms)


def test_the_session_records_configuration_and_environment(sweep: Sweep) -> None:
    sweep.run()
    session = next(r for r in read_records(sweep.path) if r["kind"] == "session")
    assert session["environment"]["cpu"]["model"] == "Invented CPU"
    assert session["config"]["design"]["runs"] == 3
    assert session["servers"] == "together"


def test_warm_up_comes_before_the_first_run_and_is_not_kept(sweep: Sweep) -> None:
    sweep.run()
    lengths = [len(prompt) for prompt in sweep.client.requests[:4]]
    assert lengths == [4, 8, 4, 8], "each level, each input length"
    assert len(sweep.client.requests) == 24 + 4


def test_an_interrupted_sweep_goes_on_without_doubles(sweep: Sweep) -> None:
    for stop_after in (7, 5):

        def stop(after: int = stop_after) -> None:
            if len(sweep.observer.advanced) == after:
                raise KeyboardInterrupt

        sweep.observer = Silent()
        sweep.observer.on_advance = stop
        with pytest.raises(KeyboardInterrupt):
            sweep.run()
    assert len(sweep.samples()) == 12
    outcome = sweep.run()
    assert (outcome.already_there, outcome.made) == (12, 12)
    assert_whole(sweep)
    ends = [r["how"] for r in read_records(sweep.path) if r["kind"] == "end"]
    assert ends == ["interrupted", "interrupted", "complete"]


def test_a_finished_sweep_starts_no_server_and_writes_nothing(sweep: Sweep) -> None:
    sweep.run()
    before, sweep.opened = sweep.path.read_bytes(), []
    assert sweep.run().made == 0
    assert sweep.opened == []
    assert sweep.path.read_bytes() == before


def test_more_runs_are_added_to_a_finished_sweep(sweep: Sweep) -> None:
    sweep.run()
    sweep.config = sweep.config.updated(runs=5)
    assert sweep.run().made == 16
    assert {s.run for s in sweep.samples()} == set(range(5))


def test_a_file_of_another_sweep_is_refused(sweep: Sweep) -> None:
    sweep.run()
    sweep.config = sweep.config.updated(seed=1)
    with pytest.raises(ResultsError, match="seed was 20220614, is 1"):
        sweep.run()


def test_alternate_keeps_one_server_at_a_time(sweep: Sweep) -> None:
    sweep.together = False
    sweep.run()
    assert_whole(sweep)
    assert sweep.opened == sweep.closed
    assert sweep.most_alive == 1
    blocks = [s.block for s in sweep.samples()]
    assert blocks == sorted(blocks)
    assert {s.backend + s.weight_type for s in sweep.samples() if s.block == 0} == {
        A.backend + A.weight_type,
        B.backend + B.weight_type,
    }


def test_cells_beyond_the_context_are_recorded_not_dropped(sweep: Sweep) -> None:
    sweep.config = sweep.config.updated(input_tokens=[4, 62], output_tokens=[2, 3])
    outcome = sweep.run()
    found = Results.read([sweep.path]).infeasible.values()
    assert {(c.weight_type, c.input_tokens, c.output_tokens) for c in found} == {
        ("fp32", 62, 3),
        ("bf16", 62, 3),
    }
    assert "62 + 3 > 64" in next(iter(found)).reason
    assert outcome.infeasible_cells == 2
    assert len(sweep.samples()) == 2 * 3 * 3
    again = sweep.run()
    assert (again.made, again.infeasible_cells, again.already_there) == (0, 2, 18)
    assert sweep.kinds()["infeasible"] == 2


def test_a_failed_run_is_a_record_and_is_made_again_only_on_request(sweep: Sweep) -> None:
    sweep.config = sweep.config.updated(warmup_rounds=0)
    sweep.client.error = InternalError(grpc.StatusCode.INTERNAL, "broken in /home/anna/x/y.py")
    sweep.observer.on_advance = lambda: setattr(sweep.client, "error", None)
    assert sweep.run().failed == 1
    (failure,) = Results.read([sweep.path]).failures.values()
    assert failure.error == "INTERNAL: broken in y.py"
    assert sweep.run().made == 0
    sweep.retry_failures = True
    assert sweep.run().made == 1
    assert_whole(sweep)
    assert Results.read([sweep.path]).failures == {}


def test_a_level_that_cannot_start_fails_alone(sweep: Sweep) -> None:
    sweep.refuse = B
    outcome = sweep.run()
    assert (outcome.made, outcome.failed) == (12, 12)
    assert sweep.opened == [A, B], "it is not tried again"
    errors = {f.error for f in Results.read([sweep.path]).failures.values()}
    assert errors == {"not run, the level was given up: no such backend in place"}


def test_a_level_whose_runs_keep_failing_is_given_up(sweep: Sweep) -> None:
    sweep.levels = (A,)
    sweep.config = sweep.config.updated(warmup_rounds=0)
    sweep.client.error = InternalError(grpc.StatusCode.INTERNAL, "broken")
    assert sweep.run().failed == 12
    assert len(sweep.client.requests) == 3


def test_a_server_that_went_away_is_brought_up_again(sweep: Sweep) -> None:
    sweep.levels = (A,)
    sweep.config = sweep.config.updated(warmup_rounds=0)
    sweep.client.error = UnavailableError(grpc.StatusCode.UNAVAILABLE, "gone")
    sweep.observer.on_advance = lambda: setattr(sweep.client, "error", None)
    outcome = sweep.run()
    assert (outcome.made, outcome.failed) == (11, 1)
    assert sweep.opened == [A, A]
