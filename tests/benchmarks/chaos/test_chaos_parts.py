"""What the fault suite decides by: its plans, its readings and its verdicts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks.chaos import __main__ as command
from gptjet.benchmarks.chaos import hostile, soak, streams
from gptjet.benchmarks.chaos.report import make_result, write_result
from gptjet.benchmarks.chaos.scenario import Findings, Outcome, Plan, Scenario, run_scenario
from gptjet.benchmarks.chaos.server import parse_metrics
from gptjet.benchmarks.chaos.wire import stream_request
from gptjet.benchmarks.load.samples import OK, Sample
from gptjet.proto.v1 import text_generation_pb2 as pb


def sample(minute: float, itl_ms: float, status: str = OK) -> Sample:
    start = round(minute * 60e9)
    gap = round(itl_ms * 1e6)
    arrivals = tuple((start + gap * (i + 1), 1) for i in range(5))
    return Sample(
        index=0,
        intended_ns=start,
        sent_ns=start,
        ended_ns=arrivals[-1][0],
        arrivals=arrivals,
        status=status,
        prompt_tokens=1,
        asked_tokens=5,
    )


def test_bytes_of_a_request_are_what_the_contract_reads() -> None:
    message = pb.GenerateStreamRequest()
    message.ParseFromString(stream_request((1, 300, 2**31), max_new_tokens=500, n=4, logprobs=20))
    assert list(message.token_ids.ids) == [1, 300, 2**31]
    params = message.sampling_params
    assert (params.max_new_tokens, params.min_new_tokens, params.n) == (500, 500, 4)
    assert params.logprobs == 20
    assert params.ignore_eos is True


def test_metrics_are_summed_over_their_labels_and_comments_left_out() -> None:
    text = '# HELP a b\n# TYPE a gauge\na{x="1"} 2.0\na{x="2"} 3\nb_total 1e3\nname with spaces 4\n'
    assert parse_metrics(text) == {
        "a": 5.0,
        'a{x="1"}': 2.0,
        'a{x="2"}': 3.0,
        "b_total": 1000.0,
    }


def test_half_of_the_streams_leave_each_at_a_moment_of_its_own() -> None:
    plans = streams.plan_streams(
        random.Random(1), 40, tokens=10, leaving=0.5, within_s=3.0, vocab=99
    )
    leaving = [plan.leaves_after_s for plan in plans if plan.leaves_after_s is not None]
    assert len(plans) == 40
    assert len(leaving) == 20
    assert len(set(leaving)) == 20
    assert all(0 <= moment <= 3 for moment in leaving)
    assert all(5 <= plan.tokens <= 10 and max(plan.prompt) < 99 for plan in plans)


def test_memory_that_climbs_is_told_from_memory_that_settles() -> None:
    settling = [100.0, 150.0, 200.0, *([220.0] * 60)]
    climbing = [200.0 + index for index in range(100)]
    assert abs(soak.memory_growth(settling)) < 0.001
    assert soak.memory_growth(climbing) == pytest.approx(79 / 220, rel=0.01)
    assert soak.memory_growth([]) == 0.0


def test_minutes_hold_the_requests_due_in_them_and_a_rest_is_left_out() -> None:
    samples = [sample(0.1, 5), sample(0.5, 5), sample(1.2, 10, "INTERNAL"), sample(2.1, 7)]
    minutes = soak.minutes_of(samples)
    assert [minute.requests for minute in minutes] == [2, 1]
    assert [minute.failed for minute in minutes] == [0, 1]
    assert minutes[0].itl_p95_ms == pytest.approx(5, rel=0.01)


def test_latency_that_rises_is_a_drift() -> None:
    assert soak.drift_of([10, 10, 11, 12, 20, 20]) == 2.0
    assert soak.drift_of([]) == 1.0


def test_a_scenario_passes_only_where_every_check_holds() -> None:
    def held(_: Plan) -> Findings:
        found = Findings()
        found.at_most("memory", 3, 5, " %")
        found.equal("blocks", 0, 0)
        return found

    def leaked(plan: Plan) -> Findings:
        found = held(plan)
        found.equal("blocks", 2, 0)
        return found

    def empty(_: Plan) -> Findings:
        return Findings()

    def broken(_: Plan) -> Findings:
        raise OSError("no server")

    def outcome(run: Any) -> Outcome:
        return run_scenario(Scenario("x", "", run), Plan())

    assert outcome(held).passed
    assert not outcome(leaked).passed
    assert not outcome(empty).passed
    assert outcome(broken).error == "OSError: no server"
    assert not outcome(broken).passed


def test_every_outcome_is_in_the_file_and_an_old_one_stays_whole_until_then(tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    outcomes = [Outcome("x", "summary", 1.0, error="no /tmp/somebody/here")]
    write_result(file, make_result(outcomes, Plan(), "chaos", {}))
    result = json.loads(file.read_text())
    assert result["passed"] is False
    assert result["scenarios"][0]["name"] == "x"
    assert "somebody" not in result["scenarios"][0]["error"]
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_lists_what_it_can_run_and_refuses_what_it_cannot(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["--list"]) == command.OK
    listed = capsys.readouterr().out
    assert all(scenario.name in listed for scenario in command.SCENARIOS)
    with pytest.raises(SystemExit) as refused:
        command.main(["--only", "nothing"])
    assert refused.value.code == command.USAGE


def test_one_failing_scenario_gives_exit_code_1_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fine(_: Plan) -> Findings:
        found = Findings()
        found.equal("fine", 1, 1)
        return found

    def broken(_: Plan) -> Findings:
        raise RuntimeError("broken")

    monkeypatch.setattr(
        command, "SCENARIOS", (Scenario("bad", "", broken), Scenario("good", "", fine))
    )
    out = tmp_path / "out.json"
    assert command.main(["--out", str(out)]) == command.FAILURE
    assert [s["passed"] for s in json.loads(out.read_text())["scenarios"]] == [False, True]
    assert command.main(["--out", str(out), "--only", "good"]) == command.OK


def test_the_fuzzers_record_is_read_back_as_requests(tmp_path: Path) -> None:
    from gptjet.service.fuzz_target import _write_record

    file = tmp_path / "record"
    with file.open("wb") as record:
        _write_record(record, "/a.B/C", b"\x00\x01")
        _write_record(record, "/a.B/D", b"")
        record.write(b"\x05\x00")  # a process killed while it wrote
    assert list(hostile.read_record(file)) == [("/a.B/C", b"\x00\x01", ()), ("/a.B/D", b"", ())]
