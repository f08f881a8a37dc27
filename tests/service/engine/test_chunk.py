"""How prompts share a chunk: nobody is starved, nothing wasted while anybody has tokens left."""

from __future__ import annotations

import pytest

from gptjet.service.engine.chunk import share_chunk


@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [
        pytest.param([100], [64], id="one long prompt has all of it"),
        pytest.param([10], [10], id="one short prompt has what it needs"),
        pytest.param([100, 100], [32, 32], id="half is the oldest's"),
        pytest.param([100, 10], [54, 10], id="what the others leave is the oldest's"),
        pytest.param([10, 100], [10, 54], id="what the oldest leaves is the others'"),
        pytest.param([100, 5, 20, 40], [32, 5, 20, 7], id="the shortest of the others are first"),
        pytest.param([100, 32, 40], [32, 32], id="those for whom nothing is left are left out"),
    ],
)
def test_a_chunk_of_64_tokens_is_shared(lengths: list[int], chunks: list[int]) -> None:
    assert share_chunk(64, lengths) == chunks
