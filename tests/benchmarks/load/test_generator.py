"""The generator's arithmetic, on a virtual clock: no test here can be late, so all are exact."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gptjet.benchmarks.load.generator import Answered
from gptjet.benchmarks.load.samples import Sample

MS = 1_000_000


def by_index(generator: Any) -> list[Sample]:
    return sorted(generator.samples, key=lambda sample: sample.index)


def close_to(ms: float) -> Any:
    """Exact, up to the rounding of asyncio's times, which are floats of seconds."""
    return pytest.approx(ms * MS, abs=100)


def test_ttft_itl_tpot_and_e2e_are_those_of_the_server(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    """Prefill 100 ms, decode 20 ms, 3 tokens: TTFT 100, ITL 20 and 20, TPOT 20, E2E 140."""

    async def script(loop: Any) -> Any:
        generator = make_generator(loop, simulated_server(100, 20))
        await generator.run_open(plan_at(0, 50))
        return generator

    for sample in by_index(virtually(script)):
        assert (sample.status, sample.output_tokens, sample.prompt_tokens) == ("OK", 3, 2)
        assert sample.ttft_ns == close_to(100)
        assert sample.itl_ns == (close_to(20), close_to(20))
        assert sample.tpot_ns == close_to(20)
        assert sample.e2e_ns == close_to(140)
        assert sample.late_ns == close_to(0)
        assert sample.server == {"queue_ms": 1.0}


def test_an_open_loop_sends_on_time_however_slow_the_server_is(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    async def script(loop: Any) -> Any:
        server = simulated_server(10_000, 1)
        await make_generator(loop, server).run_open(plan_at(0, 10, 20, 30))
        return server

    server = virtually(script)
    assert [when for when, _ in server.sent] == [close_to(ms) for ms in (0, 10, 20, 30)]
    assert server.most_running == 4


def test_a_wait_behind_other_requests_counts_from_the_intended_time(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    """One slot, 100 ms a request, one request each 60 ms: request i waits 40 ms * i, so its TTFT is
    100 + 40 i. A closed loop of one would see 100 each time: coordinated omission."""

    async def script(loop: Any) -> Any:
        generator = make_generator(loop, simulated_server(100, 20, one_at_a_time=True))
        await generator.run_open(plan_at(*range(0, 300, 60), output_tokens=1))
        return generator

    ttft = [sample.ttft_ns for sample in by_index(virtually(script))]
    assert ttft == [close_to(100 + 40 * i) for i in range(5)]


def test_a_late_client_cannot_hide_its_delay(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    """The client hangs from 10 to 310 ms. The request of 50 ms goes out 260 ms late, and its TTFT
    is 360 ms from when it should have been sent, not 100."""

    async def script(loop: Any) -> Any:
        generator = make_generator(loop, simulated_server(100, 20))
        loop.call_at(0.010, loop.block, 300 * MS)
        await generator.run_open(plan_at(50, 400))
        return generator

    late, on_time = by_index(virtually(script))
    assert (late.late_ns, late.ttft_ns) == (close_to(260), close_to(360))
    assert (on_time.late_ns, on_time.ttft_ns) == (close_to(0), close_to(100))


def test_tokens_of_one_message_are_no_time_apart(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    """5 tokens in messages of 2, 2 and 1: gaps 0, 20, 0, 20, and TPOT 40 / 4."""

    async def script(loop: Any) -> Any:
        generator = make_generator(loop, simulated_server(100, 20, tokens_a_message=2))
        await generator.run_open(plan_at(0, output_tokens=5))
        return generator

    (sample,) = by_index(virtually(script))
    assert sample.itl_ns == (0, close_to(20), 0, close_to(20))
    assert sample.tpot_ns == close_to(10)


def test_a_closed_loop_keeps_exactly_its_concurrency_running(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    """Two slots, 140 ms a request: the third and fourth go out at 140 ms, on the sending time."""

    async def script(loop: Any) -> Any:
        server = simulated_server(100, 20)
        generator = make_generator(loop, server)
        await generator.run_closed(plan_at(*[None] * 5), 2, None)
        return server, generator

    server, generator = virtually(script)
    assert [when for when, _ in server.sent] == [close_to(ms) for ms in (0, 0, 140, 140, 280)]
    assert server.most_running == 2
    assert [s.ttft_ns for s in by_index(generator)] == [close_to(100)] * 5


def test_a_closed_loop_sends_nothing_after_its_time_and_lets_the_last_ones_end(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    async def script(loop: Any) -> Any:
        generator = make_generator(loop, simulated_server(100, 20))
        await generator.run_closed(plan_at(*[None] * 50), 1, 0.2)
        return generator

    samples = by_index(virtually(script))
    assert [sample.sent_ns for sample in samples] == [close_to(0), close_to(140)]
    assert [sample.status for sample in samples] == ["OK", "OK"]


def test_what_still_runs_after_the_drain_is_unfinished(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    async def script(loop: Any) -> Any:
        server = simulated_server(100, 1000)
        generator = make_generator(loop, server, drain_s=0.5)
        await generator.run_open(plan_at(0))
        return server, generator, loop.time_ns()

    server, generator, ended_ns = virtually(script)
    (sample,) = generator.samples
    assert (sample.status, sample.output_tokens) == ("UNFINISHED", 1)
    assert (sample.ended_ns, ended_ns) == (close_to(500), close_to(500))
    assert server.running == 0


def test_a_stopped_run_ends_at_once_and_keeps_what_it_has(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any
) -> None:
    """Stopped at 200 ms: the first request (140 ms) is done, the second interrupted, no third."""

    async def script(loop: Any) -> Any:
        generator = make_generator(loop, simulated_server(100, 20))
        loop.call_at(0.2, generator.stop)
        await generator.run_open(plan_at(0, 150, 5000))
        return generator, loop.time_ns()

    generator, ended_ns = virtually(script)
    assert [sample.status for sample in by_index(generator)] == ["OK", "INTERRUPTED"]
    assert ended_ns == close_to(200)


@pytest.mark.parametrize("loop_kind", ["open", "closed"])
def test_a_refused_request_is_recorded_with_its_status(
    virtually: Any, simulated_server: Any, make_generator: Any, plan_at: Any, loop_kind: str
) -> None:
    async def script(loop: Any) -> Any:
        generator = make_generator(loop, simulated_server(fails={0: "RESOURCE_EXHAUSTED"}))
        if loop_kind == "open":
            await generator.run_open(plan_at(0, 10))
        else:
            await generator.run_closed(plan_at(None, None), 1, None)
        return generator

    generator = virtually(script)
    first, second = by_index(generator)
    assert (first.status, first.ttft_ns, second.status) == ("RESOURCE_EXHAUSTED", None, "OK")
    assert (generator.counters.sent, generator.counters.failed) == (2, 1)
    if loop_kind == "closed":
        assert second.sent_ns == close_to(100)  # a server that refuses at once is not hammered


def test_an_answer_of_another_length_is_not_a_success(
    virtually: Any, make_generator: Any, plan_at: Any
) -> None:
    class Short:
        async def send(self, request: Any, on_tokens: Any) -> Answered:
            on_tokens(1)
            return Answered()

    async def script(loop: Any) -> Any:
        generator = make_generator(loop, Short())
        await generator.run_open(plan_at(0))
        return generator

    (sample,) = virtually(script).samples
    assert sample.status == "WRONG_LENGTH"


@pytest.mark.parametrize("loop_kind", ["open", "closed"])
def test_a_bug_in_the_transport_is_not_swallowed(
    virtually: Any, make_generator: Any, plan_at: Any, loop_kind: str
) -> None:
    class Broken:
        async def send(self, request: Any, on_tokens: Any) -> Answered:
            await asyncio.sleep(0.01)
            raise KeyError("bug")

    async def script(loop: Any) -> None:
        generator = make_generator(loop, Broken())
        if loop_kind == "open":
            await generator.run_open(plan_at(0, 1000))
        else:
            await generator.run_closed(plan_at(None, None), 1, None)

    with pytest.raises(KeyError, match="bug"):
        virtually(script)


def test_a_sample_survives_the_way_through_a_file() -> None:
    sample = Sample(
        index=3,
        intended_ns=1,
        sent_ns=2,
        ended_ns=90,
        arrivals=((10, 1), (20, 2)),
        status="OK",
        prompt_tokens=5,
        asked_tokens=3,
        was_cut=True,
        server={"queue_ms": 0.5},
    )
    assert Sample.from_json(sample.to_json()) == sample
