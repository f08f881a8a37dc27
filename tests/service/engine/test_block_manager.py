"""No block is lost, given away too early or found by the wrong prompt."""

from __future__ import annotations

import random

import pytest

from gptjet.service.engine.block_manager import BlockManager

SIZE = 4


def make_manager(num_blocks: int = 8) -> BlockManager:
    return BlockManager(num_blocks, SIZE, prefix_cache=True)


def table_of(manager: BlockManager, holder: int, blocks: int, tokens: str = "") -> list[int]:
    allocation = manager.allocate(holder, blocks, [ord(c) for c in tokens])
    assert allocation is not None
    manager.check_invariants()
    return allocation.block_table


def compute(manager: BlockManager, holder: int, tokens: str) -> int:
    """Allocate, commit and free a prompt; how many of its tokens were cached."""
    ids = [ord(c) for c in tokens]
    allocation = manager.allocate(holder, manager.blocks_for(len(ids)), ids)
    assert allocation is not None
    manager.commit(holder, ids)
    manager.free(holder)
    manager.check_invariants()
    return allocation.num_cached_tokens


def test_tokens_round_up_to_blocks() -> None:
    manager = BlockManager(num_blocks=8, block_size=16)
    assert [manager.blocks_for(n) for n in (0, 1, 15, 16, 17, 32)] == [0, 1, 1, 1, 2, 2]


def test_allocation_takes_blocks_and_free_gives_them_back() -> None:
    manager = make_manager(4)
    first, second = table_of(manager, 1, 3), table_of(manager, 2, 1)
    assert set(first) | set(second) == {0, 1, 2, 3}
    assert manager.allocate(3, 1) is None
    manager.free(1)
    assert manager.num_free_blocks == 3
    manager.free(1)  # a second time changes nothing
    assert manager.num_free_blocks == 3
    manager.check_invariants()


def test_headroom_is_left_free() -> None:
    manager = make_manager(4)
    assert manager.allocate(1, 3, headroom=2) is None
    assert manager.allocate(1, 3, headroom=1) is not None


def test_a_holder_allocates_once() -> None:
    manager = make_manager()
    table_of(manager, 1, 1)
    with pytest.raises(ValueError, match="1 already holds"):
        manager.allocate(1, 1)
    with pytest.raises(ValueError, match="1 already holds"):
        manager.fork(1, 1)


def test_a_prompt_finds_the_full_blocks_that_it_begins_with() -> None:
    manager = make_manager()
    assert compute(manager, 1, "aaaabbbbcc") == 0
    assert compute(manager, 2, "aaaabbbbdddd") == 8
    assert compute(manager, 3, "aaaaxxxx") == 4
    assert compute(manager, 4, "xaaabbbb") == 0


def test_the_last_token_of_a_prompt_is_never_cached() -> None:
    manager = make_manager()
    compute(manager, 1, "aaaabbbb")
    assert compute(manager, 2, "aaaabbbb") == 4
    assert compute(manager, 3, "aaaabbbbc") == 8


def test_equal_blocks_after_different_ones_are_not_taken_for_each_other() -> None:
    # "bbbb" has been computed after "aaaa": after "cccc" its keys and values are others.
    manager = make_manager()
    compute(manager, 1, "aaaabbbb")
    compute(manager, 2, "cccc")
    assert compute(manager, 3, "ccccbbbbe") == 4


def test_a_block_is_found_only_once_its_tokens_are_computed() -> None:
    manager = make_manager()
    prompt = [ord(c) for c in "aaaabbbbc"]
    table_of(manager, 1, 3, "aaaabbbbc")
    assert len(set(table_of(manager, 2, 3, "aaaabbbbc")) & {0, 1, 2}) == 0
    manager.commit(1, prompt[:5])
    manager.free(2)
    allocation = manager.allocate(2, 3, prompt)
    assert allocation is not None
    assert allocation.num_cached_tokens == 4


def test_find_more_takes_over_what_another_has_computed_since() -> None:
    manager = make_manager()
    prompt = [ord(c) for c in "aaaabbbbc"]
    first, second = table_of(manager, 1, 3, "aaaabbbbc"), table_of(manager, 2, 3, "aaaabbbbc")
    assert manager.find_more(2) == 0
    manager.commit(1, prompt)
    free = manager.num_free_blocks
    assert manager.find_more(2) == 8
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert manager.num_free_blocks == free + 2
    manager.check_invariants()


def test_a_block_held_by_two_is_free_when_both_have_left() -> None:
    manager = make_manager(4)
    compute(manager, 1, "aaaab")
    table_of(manager, 2, 2, "aaaab")
    table_of(manager, 3, 2, "aaaab")
    assert manager.num_free_blocks == 1
    manager.free(2)
    assert manager.num_free_blocks == 2
    manager.free(3)
    assert manager.num_free_blocks == 4
    assert manager.num_cached_blocks == 1


def test_cached_blocks_count_as_free_but_not_those_the_prompt_itself_takes() -> None:
    manager = make_manager(3)
    compute(manager, 1, "aaaabbbbc")
    assert manager.num_free_blocks == 3
    # Two cached and one free are all there is: four blocks cannot be had, three can.
    ids = [ord(c) for c in "aaaabbbbcdddd"]
    assert manager.allocate(2, 4, ids) is None
    assert manager.allocate(2, 3, ids[:9]) is not None
    assert manager.num_free_blocks == 0
    manager.check_invariants()


def test_the_least_recently_used_block_is_evicted_first_and_a_chain_from_its_end() -> None:
    manager = make_manager(4)
    compute(manager, 1, "aaaabbbb")
    compute(manager, 2, "cccc")
    compute(manager, 3, "aaaabbbbx")  # used again, so "cccc" is the oldest now
    table_of(manager, 4, 2)  # the one free block, and one evicted
    manager.free(4)
    assert compute(manager, 5, "ccccx") == 0
    manager = make_manager(4)
    compute(manager, 1, "aaaabbbb")
    table_of(manager, 2, 3)  # two free ones and the end of the chain
    manager.free(2)
    assert compute(manager, 3, "aaaabbbbx") == 4


def test_without_the_prefix_cache_nothing_is_found() -> None:
    manager = BlockManager(8, SIZE)
    assert compute(manager, 1, "aaaab") == 0
    assert compute(manager, 2, "aaaab") == 0
    assert manager.num_cached_blocks == 0


def test_what_a_failed_step_left_is_found_by_nobody() -> None:
    manager = make_manager()
    table_of(manager, 1, 2, "aaaab")
    manager.commit(1, [ord(c) for c in "aaaab"])
    manager.free(1, forget=True)
    manager.check_invariants()
    assert compute(manager, 2, "aaaab") == 0


def test_a_table_grows_block_by_block_and_not_beyond_what_is_free() -> None:
    manager = make_manager(3)
    table = table_of(manager, 1, 1)
    assert manager.is_writable(table, 3, 4)
    assert not manager.is_writable(table, 4, 5)
    assert manager.make_writable(1, 4, 5) == ()
    assert len(table) == 2
    assert manager.is_writable(table, 4, 8)
    assert manager.make_writable(1, 8, 17) is None
    assert len(table) == 2
    manager.check_invariants()


def test_a_forks_shared_block_is_copied_before_it_is_written() -> None:
    manager = make_manager(4)
    table = table_of(manager, 1, 2)
    fork = manager.fork(1, 2)
    assert fork == table
    assert not manager.is_writable(fork, 6, 7)
    assert manager.num_free_blocks == 2
    ((source, destination),) = manager.make_writable(2, 6, 7) or ()
    assert (source, destination) == (table[1], fork[1])
    assert fork[0] == table[0]
    assert fork[1] != table[1]
    # Nobody shares it any more, so the first holder writes in place.
    assert manager.is_writable(table, 6, 7)
    assert manager.make_writable(1, 6, 7) == ()
    manager.check_invariants()


def test_check_invariants_sees_a_leaked_a_shared_and_a_miscounted_block() -> None:
    for spoil in (
        lambda table, _: table.pop(),
        lambda table, _: table.append(table[0]),
        lambda table, other: table.append(other[0]),
    ):
        manager = make_manager()
        table, other = table_of(manager, 1, 2), table_of(manager, 2, 1)
        spoil(table, other)
        with pytest.raises(RuntimeError, match="leaked or shared"):
            manager.check_invariants()


def test_random_traffic_keeps_the_invariants() -> None:
    manager, rng, live = make_manager(40), random.Random(0), []
    for holder in range(1500):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 30))]
        choice = rng.random()
        if choice < 0.5 and manager.allocate(holder, manager.blocks_for(len(tokens)), tokens):
            live.append((holder, tokens))
            manager.commit(holder, tokens[: rng.randint(0, len(tokens))])
        elif choice < 0.7 and live:
            parent, tokens = rng.choice(live)
            manager.fork(parent, holder)
            manager.make_writable(holder, len(tokens) - 1, len(tokens) + rng.randint(0, 9))
            live.append((holder, tokens))
        elif live:
            manager.free(live.pop(rng.randrange(len(live)))[0], forget=rng.random() < 0.2)
        manager.check_invariants()
    for holder, _ in live:
        manager.free(holder)
    manager.check_invariants()
    assert manager.num_free_blocks == 40


def test_a_cache_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        BlockManager(num_blocks=0, block_size=16)
