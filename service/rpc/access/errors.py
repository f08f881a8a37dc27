"""Why a caller is not let in, or not now; `gptjet.service.rpc.status` maps each to a status."""

from __future__ import annotations

from gptjet.service.engine.errors import EngineError


class AccessError(Exception):
    """A file that decides who may call cannot be used; the message is one line for a person."""


class UnauthenticatedError(EngineError):
    """The caller shows no token, or one that opens nothing."""


class PermissionDeniedError(EngineError):
    """The caller's token is good, but not for this."""


class QuotaExceededError(EngineError):
    """The caller's token has used up what it may.

    quota          "requests_per_minute", "tokens_per_minute" or "concurrent_streams"
    limit          of that quota
    subject        whose it is: the token's name
    retry_after_s  when it would be let in; None: never, as it asks for more than the limit
    """

    def __init__(
        self, quota: str, limit: int, subject: str, detail: str, retry_after_s: float | None
    ) -> None:
        when = "" if retry_after_s is None else f"; try again in {retry_after_s:.1f} s"
        super().__init__(f"token {subject}: {detail} ({quota} = {limit}){when}")
        self.quota = quota
        self.limit = limit
        self.subject = subject
        self.retry_after_s = retry_after_s
