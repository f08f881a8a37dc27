"""No block is lost, shared or handed out twice."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from gptjet.service.engine.block_manager import BlockManager


def sequence(sequence_id: int) -> Any:
    return SimpleNamespace(sequence_id=sequence_id, block_table=[])


def test_tokens_round_up_to_blocks() -> None:
    manager = BlockManager(num_blocks=8, block_size=16)
    assert [manager.blocks_for(n) for n in (0, 1, 15, 16, 17, 32)] == [0, 1, 1, 1, 2, 2]


def test_allocation_takes_blocks_and_free_gives_them_back() -> None:
    manager = BlockManager(num_blocks=4, block_size=16)
    first, second = sequence(1), sequence(2)
    manager.allocate(first, 33)
    assert len(first.block_table) == 3
    assert not manager.can_allocate(17)
    manager.allocate(second, 16)
    assert set(first.block_table) | set(second.block_table) == {0, 1, 2, 3}
    manager.free(first)
    assert first.block_table == []
    assert manager.num_free_blocks == 3
    manager.free(first)  # a second time changes nothing
    assert manager.num_free_blocks == 3
    manager.check_invariants()


def test_allocating_beyond_the_free_blocks_or_twice_is_refused() -> None:
    manager = BlockManager(num_blocks=2, block_size=16)
    held = sequence(1)
    manager.allocate(held, 16)
    with pytest.raises(ValueError, match="already holds"):
        manager.allocate(held, 16)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 free"):
        manager.allocate(sequence(2), 32)
    manager.check_invariants()


def test_check_invariants_sees_a_leaked_and_a_shared_block() -> None:
    manager = BlockManager(num_blocks=4, block_size=16)
    held = sequence(1)
    manager.allocate(held, 32)
    lost = held.block_table.pop()
    with pytest.raises(RuntimeError, match="leaked or shared"):
        manager.check_invariants()
    held.block_table += [lost, lost]
    with pytest.raises(RuntimeError, match="leaked or shared"):
        manager.check_invariants()


def test_random_traffic_keeps_the_invariants() -> None:
    manager, rng, live = BlockManager(num_blocks=40, block_size=16), random.Random(0), []
    for sequence_id in range(500):
        tokens = rng.randint(1, 200)
        if manager.can_allocate(tokens):
            live.append(sequence(sequence_id))
            manager.allocate(live[-1], tokens)
        elif live:
            manager.free(live.pop(rng.randrange(len(live))))
        manager.check_invariants()
    for held in live:
        manager.free(held)
    assert manager.num_free_blocks == 40


def test_a_cache_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        BlockManager(num_blocks=0, block_size=16)
