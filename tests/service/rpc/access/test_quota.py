"""Quotas: what is taken, what comes back, and that nothing leaks however an RPC ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gptjet.service.rpc.access.errors import QuotaExceededError
from gptjet.service.rpc.access.quota import (
    Bucket,
    Grant,
    Limits,
    Quota,
    QuotaBook,
    reserve_tokens,
    use_tokens,
)
from gptjet.service.rpc.access.tokens import new_token

SECOND_NS = 1_000_000_000


class Clock:
    """Monotonic time that the test moves."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(0, 10 * SECOND_NS), st.integers(0, 50)), max_size=60),
)
def test_over_any_time_no_more_is_taken_than_a_minutes_worth_and_the_refill(
    limit: int, attempts: list[tuple[int, int]]
) -> None:
    """The bound of a token bucket, exactly, in whole units: limit * (1 + t / 60)."""
    bucket, now_ns, taken = Bucket(limit, 0), 0, 0
    for pause_ns, count in attempts:
        now_ns += pause_ns
        if bucket.wait_s(count, now_ns) == 0:
            bucket.take(count, now_ns)
            taken += count
        assert taken <= limit * (1 + Fraction(now_ns, 60 * SECOND_NS))
        assert 0 <= bucket.left(now_ns) <= limit


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_wait_that_is_named_is_long_enough_and_not_a_moment_longer(
    limit: int, used: int, count: int
) -> None:
    bucket = Bucket(limit, 0)
    bucket.take(used, 0)
    wait_s = bucket.wait_s(count, 0)
    if wait_s is None:
        assert count > limit
        return
    exact_ns = max(Fraction((count - (limit - used)) * 60 * SECOND_NS, limit), Fraction(0))
    assert wait_s == pytest.approx(float(exact_ns) / 1e9)
    later_ns = -(-exact_ns.numerator // exact_ns.denominator)
    assert bucket.wait_s(count, later_ns) == 0
    if later_ns > 0:
        early = Bucket(limit, 0)
        early.take(used, 0)
        assert early.wait_s(count, later_ns - 1) != 0


def test_a_clock_that_steps_back_gives_nothing_away() -> None:
    bucket = Bucket(60, 100 * SECOND_NS)
    bucket.take(60, 100 * SECOND_NS)
    assert bucket.left(50 * SECOND_NS) == 0
    assert bucket.left(100 * SECOND_NS) == 0
    assert bucket.left(101 * SECOND_NS) == 1


def test_each_refusal_names_the_quota_the_limit_and_the_token() -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=2, tokens_per_minute=100, concurrent_streams=1)
    quota = Quota("web", limits, clock)
    with quota.admitted() as grant:
        grant.reserve(60)
        with pytest.raises(QuotaExceededError) as caught, quota.admitted():
            pass
        assert (caught.value.quota, caught.value.limit) == ("concurrent_streams", 1)
        assert caught.value.retry_after_s == 1.0
        grant.use(60)
    with quota.admitted() as grant:
        with pytest.raises(QuotaExceededError) as caught:
            grant.reserve(100)
        assert (caught.value.quota, caught.value.limit) == ("tokens_per_minute", 100)
        assert caught.value.retry_after_s == pytest.approx(36.0)
        assert str(caught.value) == (
            "token web: the request may come to 100 tokens, 40 are left "
            "(tokens_per_minute = 100); try again in 36.0 s"
        )
        with pytest.raises(QuotaExceededError) as caught:
            grant.reserve(101)
        assert caught.value.retry_after_s is None
        assert "more than a minute allows" in str(caught.value)
    with pytest.raises(QuotaExceededError) as caught, quota.admitted():
        pass
    assert (caught.value.quota, caught.value.retry_after_s) == ("requests_per_minute", 30.0)
    clock.now_ns += 30 * SECOND_NS
    with quota.admitted():
        pass


def test_a_refused_rpc_is_charged_nothing() -> None:
    quota = Quota("web", Limits(requests_per_minute=5, concurrent_streams=1), Clock())
    with quota.admitted():
        for _ in range(10):
            with pytest.raises(QuotaExceededError), quota.admitted():
                pass
    assert quota.requests_left == 4
    assert quota.in_flight == 0


def test_what_is_used_beyond_the_reservation_becomes_a_debt() -> None:
    clock = Clock()
    quota = Quota("web", Limits(tokens_per_minute=60), clock)
    with quota.admitted() as grant:
        grant.reserve(50)
        grant.use(80)
    assert quota.tokens_left == 0
    clock.now_ns += 21 * SECOND_NS
    assert quota.tokens_left == 1


def test_a_reservation_from_before_a_reload_goes_back_to_where_it_came_from() -> None:
    quota = Quota("web", Limits(), Clock())
    with quota.admitted() as unlimited:
        unlimited.reserve(50)
        quota.change(Limits(tokens_per_minute=100))
        with quota.admitted() as limited:
            limited.reserve(70)
            limited.use(70)
    assert quota.tokens_left == 30, "the first took nothing of the hundred"
    with quota.admitted() as limited:
        limited.reserve(20)
        quota.change(Limits())
        quota.change(Limits(tokens_per_minute=100))
    assert quota.tokens_left == 100


def test_another_limit_keeps_what_has_been_used() -> None:
    quota = Quota("web", Limits(requests_per_minute=10), Clock())
    for _ in range(4):
        with quota.admitted():
            pass
    quota.change(Limits(requests_per_minute=5))
    assert quota.requests_left == 1
    quota.change(Limits(requests_per_minute=2))
    assert quota.requests_left == 0
    quota.change(Limits(requests_per_minute=20))
    assert quota.requests_left == 16


def test_the_book_follows_the_file() -> None:
    _, web = new_token("web", requests_per_minute=5)
    _, other = new_token("other")
    book = QuotaBook(Limits(requests_per_minute=9, tokens_per_minute=7), Clock())
    assert book.quota_of(web).limits == Limits(requests_per_minute=5, tokens_per_minute=7)
    assert book.quota_of(other).limits == Limits(requests_per_minute=9, tokens_per_minute=7)
    kept = book.quota_of(web)
    with kept.admitted():
        book.follow([web.model_copy(update={"requests_per_minute": 2})])
        assert book.quota_of(web) is kept
        assert kept.requests_left == 1
        book.follow([])
        assert book.quota_of(web) is kept, "an RPC is in flight"
    book.follow([])
    assert book.quota_of(web) is not kept


def test_without_a_quota_nothing_is_counted() -> None:
    reserve_tokens(10**12)
    use_tokens(10**12)


class OwnContext:
    """An RPC's context, which no other shares: its grant is not to be another's, nor a later
    test's."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._stack = contextlib.ExitStack()

    def enter(self, quota: Quota) -> Grant:
        return self._context.run(self._stack.enter_context, quota.admitted())

    def end(self, error: type[BaseException] | None) -> None:
        self._context.run(self._end, error)

    def _end(self, error: type[BaseException] | None) -> None:
        if error is None:
            self._stack.close()
            return
        with pytest.raises(error), self._stack:
            raise error


class RandomRpcs(RuleBasedStateMachine):
    """RPCs that begin, reserve, use and end in any order, against plain arithmetic."""

    @initialize(streams=st.integers(1, 4), requests=st.integers(1, 40), tokens=st.integers(1, 500))
    def begin(self, streams: int, requests: int, tokens: int) -> None:
        self.clock = Clock()
        self.limits = Limits(requests, tokens, streams)
        self.quota = Quota("web", self.limits, self.clock)
        self.open: list[tuple[OwnContext, Grant, list[int]]] = []
        self.requests_left, self.tokens_left = Fraction(requests), Fraction(tokens)

    @rule(reserved=st.integers(0, 200))
    def start(self, reserved: int) -> None:
        stack = OwnContext()
        full = len(self.open) >= (self.limits.concurrent_streams or 0)
        try:
            grant = stack.enter(self.quota)
        except QuotaExceededError as error:
            refused_by = error.quota
        else:
            refused_by = ""
        if refused_by:
            assert refused_by == ("concurrent_streams" if full else "requests_per_minute")
            assert full or self.requests_left < 1
            return
        assert not full
        self.requests_left -= 1
        assert self.requests_left >= 0
        try:
            grant.reserve(reserved)
        except QuotaExceededError:
            assert reserved > self.tokens_left
            stack.end(None)
            return
        assert reserved <= self.tokens_left
        self.tokens_left -= reserved
        self.open.append((stack, grant, [reserved, 0]))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 3), share=st.integers(0, 100))
    def use(self, which: int, share: int) -> None:
        _, grant, state = self.open[which % len(self.open)]
        count = (state[0] - state[1]) * share // 100
        grant.use(count)
        state[1] += count

    @precondition(lambda self: self.open)
    @rule(
        which=st.integers(0, 3),
        error=st.sampled_from([None, ValueError, asyncio.CancelledError, GeneratorExit]),
    )
    def end(self, which: int, error: type[BaseException] | None) -> None:
        stack, _, (reserved, used) = self.open.pop(which % len(self.open))
        stack.end(error)
        assert self.limits.tokens_per_minute is not None
        self.tokens_left = min(
            self.tokens_left + reserved - used, Fraction(self.limits.tokens_per_minute)
        )

    @rule(pause_ns=st.integers(0, 20 * SECOND_NS))
    def wait(self, pause_ns: int) -> None:
        self.clock.now_ns += pause_ns
        minutes = Fraction(pause_ns, 60 * SECOND_NS)
        requests, tokens = self.limits.requests_per_minute, self.limits.tokens_per_minute
        assert requests is not None
        assert tokens is not None
        self.requests_left = min(self.requests_left + requests * minutes, Fraction(requests))
        self.tokens_left = min(self.tokens_left + tokens * minutes, Fraction(tokens))

    def teardown(self) -> None:
        for stack, _, _ in getattr(self, "open", []):
            stack.end(None)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "quota"):
            return
        assert self.quota.in_flight == len(self.open)
        assert self.quota.requests_left == int(self.requests_left)
        assert self.quota.tokens_left == int(self.tokens_left)


RandomRpcs.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_order_of_rpcs_is_counted_exactly = RandomRpcs.TestCase


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_task_cancelled_at_any_moment_gives_its_place_back(
    plan: list[tuple[int, bool]],
) -> None:
    """Each task is cancelled after so many turns of the loop, before its first one too."""

    async def rpc(quota: Quota, fails: bool) -> None:
        with quota.admitted() as grant:
            await asyncio.sleep(0)
            grant.reserve(10)
            await asyncio.sleep(0)
            grant.use(3)
            await asyncio.sleep(0)
            if fails:
                raise ValueError
            grant.use(7)

    async def main() -> None:
        quota = Quota("web", Limits(tokens_per_minute=10_000, concurrent_streams=100), Clock())
        for turns, fails in plan:
            task = asyncio.create_task(rpc(quota, fails))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ValueError):
                await task
            assert quota.in_flight == 0
        used = sum(0 if turns < 3 else 3 if fails or turns < 4 else 10 for turns, fails in plan)
        assert quota.tokens_left == 10_000 - used

    asyncio.run(main())


def test_nothing_here_has_left_its_grant_to_other_tests() -> None:
    """It would be charged with theirs."""
    reserve_tokens(10**12)
    reserve_tokens(10**12)
