"""Quotas of a token: requests and tokens a minute, and RPCs in flight.

A quota a minute is a token bucket (Turner 1986): it holds a minute's worth, is full at first and
refills evenly. So over any t seconds a token gets at most limit * (1 + t / 60), and a pause is
worth one minute at most.

A request reserves the most tokens it can come to (prompt + n * max_new_tokens) before it is queued,
and what it did not use goes back when it ends, however it ends. So a limit is never overrun, and
never charged for what a cancelled or failed request did not get. All of it is counted in whole
nanoseconds times tokens: nothing is lost to rounding.

Everything here belongs to the event loop's thread. Nothing awaits between taking a place and the
`try` that gives it back, so no cancellation can come in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from gptjet.service.rpc.access.errors import QuotaExceededError
from gptjet.service.rpc.access.tokens import Token

_MINUTE_NS = 60_000_000_000
# A place in flight comes free when some RPC ends, and nobody knows when that is.
_STREAM_RETRY_S = 1.0
_LEAST_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one token; None: unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_streams: int | None = None

    def of(self, token: Token) -> Limits:
        """The token's own limits, with these where it has none."""
        return Limits(
            *(
                getattr(self, name) if getattr(token, name) is None else getattr(token, name)
                for name in ("requests_per_minute", "tokens_per_minute", "concurrent_streams")
            )
        )


class Bucket:
    """A quota a minute: `limit` units at most at once, refilled by `limit` a minute."""

    def __init__(self, limit: int, now_ns: int) -> None:
        self.limit = limit
        self._level = limit * _MINUTE_NS  # in units of 1 / _MINUTE_NS
        self._seen_ns = now_ns

    def left(self, now_ns: int) -> int:
        """Whole units that can be taken now."""
        self._refill(now_ns)
        return max(self._level // _MINUTE_NS, 0)

    def wait_s(self, count: int, now_ns: int) -> float | None:
        """Seconds until `count` can be taken: 0 is now, None is never."""
        self._refill(now_ns)
        if count > self.limit:
            return None
        missing = count * _MINUTE_NS - self._level
        return max(missing, 0) / (self.limit * 1e9)

    def take(self, count: int, now_ns: int) -> None:
        """Take without asking; what is not there becomes a debt."""
        self._refill(now_ns)
        self._level -= count * _MINUTE_NS

    def give(self, count: int, now_ns: int) -> None:
        """Give back; a full bucket stays full."""
        self._refill(now_ns)
        self._level = min(self._level + count * _MINUTE_NS, self.limit * _MINUTE_NS)

    def change(self, limit: int, now_ns: int) -> None:
        """Another limit; what has been used stays used."""
        self._refill(now_ns)
        self._level += (limit - self.limit) * _MINUTE_NS
        self.limit = limit

    def _refill(self, now_ns: int) -> None:
        elapsed_ns = max(now_ns - self._seen_ns, 0)
        self._seen_ns = max(now_ns, self._seen_ns)
        self._level = min(self._level + elapsed_ns * self.limit, self.limit * _MINUTE_NS)


class Quota:
    """What one token has used. It outlives a reload of the tokens file; its limits need not."""

    def __init__(
        self, name: str, limits: Limits, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.name = name
        self.limits = Limits()
        self.in_flight = 0
        self._clock = clock
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.change(limits)

    def change(self, limits: Limits) -> None:
        """Other limits from now on."""
        self._requests = self._changed(self._requests, limits.requests_per_minute)
        self._tokens = self._changed(self._tokens, limits.tokens_per_minute)
        self.limits = limits

    def _changed(self, bucket: Bucket | None, limit: int | None) -> Bucket | None:
        if limit is None:
            return None
        if bucket is None:
            return Bucket(limit, self._clock())
        bucket.change(limit, self._clock())
        return bucket

    @property
    def requests_left(self) -> int | None:
        """Requests that may start now; None: any number."""
        return None if self._requests is None else self._requests.left(self._clock())

    @property
    def tokens_left(self) -> int | None:
        """Tokens that may be reserved now; None: any number."""
        return None if self._tokens is None else self._tokens.left(self._clock())

    @contextmanager
    def admitted(self) -> Iterator[Grant]:
        """One RPC: counted as a request, and in flight until the block ends, however it does.

        Raises QuotaExceededError, having counted nothing.
        """
        now_ns = self._clock()
        most = self.limits.concurrent_streams
        if most is not None and self.in_flight >= most:
            raise QuotaExceededError(
                *("concurrent_streams", most, self.name),
                f"{self.in_flight} RPCs are in flight",
                _STREAM_RETRY_S,
            )
        if self._requests is not None:
            wait_s = self._requests.wait_s(1, now_ns)
            if wait_s != 0:
                raise QuotaExceededError(
                    *("requests_per_minute", self._requests.limit, self.name),
                    "too many requests",
                    wait_s and max(wait_s, _LEAST_RETRY_S),
                )
            self._requests.take(1, now_ns)
        self.in_flight += 1
        grant = Grant(self, self._clock)
        marker = _current.set(grant)
        try:
            yield grant
        finally:
            _current.reset(marker)
            self.in_flight -= 1
            grant.settle()

    def grant_tokens(self, count: int) -> Bucket | None:
        """Take `count` tokens and return what they came from; None: they are unlimited.

        Raises QuotaExceededError, having taken none.
        """
        bucket = self._tokens
        if bucket is None:
            return None
        now_ns = self._clock()
        wait_s = bucket.wait_s(count, now_ns)
        if wait_s == 0:
            bucket.take(count, now_ns)
            return bucket
        detail = f"the request may come to {count} tokens, {bucket.left(now_ns)} are left"
        if wait_s is None:
            detail = f"the request may come to {count} tokens, more than a minute allows"
        raise QuotaExceededError(
            *("tokens_per_minute", bucket.limit, self.name),
            detail,
            wait_s and max(wait_s, _LEAST_RETRY_S),
        )


class Grant:
    """What one RPC has reserved and used of its token's tokens a minute."""

    def __init__(self, quota: Quota, clock: Callable[[], int]) -> None:
        self._quota = quota
        self._clock = clock
        # A reload may give the token another limit, or none, before this RPC ends: what was taken
        # from a bucket goes back to that one.
        self._bucket: Bucket | None = None
        self._reserved = 0
        self._used = 0

    def reserve(self, count: int) -> None:
        """Reserve once, before the request is queued. Raises QuotaExceededError."""
        if self._reserved:
            raise RuntimeError("an RPC reserves its tokens once")
        self._bucket = self._quota.grant_tokens(count)
        self._reserved = count

    def use(self, count: int) -> None:
        """Note that tokens have been used."""
        self._used += count

    def settle(self) -> None:
        """Give back what was reserved and not used; charge what was used beyond it."""
        bucket, self._bucket = self._bucket, None
        if bucket is None:
            return
        if self._used <= self._reserved:
            bucket.give(self._reserved - self._used, self._clock())
        else:
            bucket.take(self._used - self._reserved, self._clock())


_current: ContextVar[Grant] = ContextVar("gptjet_quota_grant")


def reserve_tokens(count: int) -> None:
    """Reserve the most tokens that the RPC of the calling task can come to, before it is queued.

    Raises QuotaExceededError. Nothing happens where the RPC has no quota.
    """
    grant = _current.get(None)
    if grant is not None:
        grant.reserve(count)


def use_tokens(count: int) -> None:
    """Note tokens that the RPC of the calling task has used, of those it reserved."""
    grant = _current.get(None)
    if grant is not None:
        grant.use(count)


class QuotaBook:
    """The quota of each token, by its id."""

    def __init__(self, default: Limits, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._default = default
        self._clock = clock
        self._quotas: dict[str, Quota] = {}

    def quota_of(self, token: Token) -> Quota:
        """The token's quota, full at first."""
        quota = self._quotas.get(token.id)
        if quota is None:
            quota = Quota(token.name, self._default.of(token), self._clock)
            self._quotas[token.id] = quota
        return quota

    def follow(self, tokens: Iterable[Token]) -> None:
        """Other limits, and fewer tokens, after the file has changed; what was used stays used."""
        known = {token.id: token for token in tokens}
        for token_id, quota in list(self._quotas.items()):
            token = known.get(token_id)
            if token is not None:
                quota.name = token.name
                quota.change(self._default.of(token))
            elif not quota.in_flight:
                del self._quotas[token_id]
