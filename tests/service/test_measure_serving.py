"""What gRPC adds, by hand; the command itself runs in the evidence's own test."""

from __future__ import annotations

from gptjet.service.measure_serving import grpc_cost, prompts_of


def test_cost_is_the_median_of_runs_that_took_turns() -> None:
    """3 tokens: (4 + 6) / 2 - (4 + 4) / 2 = 1 ms a token; the slow pair in the middle is no more
    than one of three."""
    engine = [[10.0, 4.0, 4.0], [50.0, 9.0, 9.0], [10.0, 4.0, 4.0]]
    grpc = [[12.0, 4.0, 6.0], [53.0, 9.0, 10.0], [11.0, 6.0, 6.0]]
    assert grpc_cost(engine, grpc) == {
        "kind": "grpc_cost",
        "runs": 3,
        "added_ms_per_token": 1.0,
        "added_ttft_ms": 2.0,
    }


def test_prompts_begin_differently_and_stay_in_the_vocabulary() -> None:
    prompts = prompts_of(50400, 32, 512)
    assert len({ids[0] for ids in prompts}) == 32
    assert {len(ids) for ids in prompts} == {512}
    assert all(0 <= token < 50400 for ids in prompts for token in ids)
