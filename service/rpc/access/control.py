"""Everything of a server that decides who may call, and the task that keeps it current."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from gptjet.service.config import ServerConfig
from gptjet.service.log import get_logger
from gptjet.service.rpc.access import tokens_file
from gptjet.service.rpc.access.certificates import CertificateFiles, Certificates
from gptjet.service.rpc.access.errors import AccessError
from gptjet.service.rpc.access.interceptor import AccessInterceptor, RefusalLog
from gptjet.service.rpc.access.quota import Limits, QuotaBook
from gptjet.service.rpc.access.tokens import Authenticator, Scope, Token, TokenSet
from gptjet.service.rpc.interceptors import RequestRecord

if TYPE_CHECKING:
    import grpc

logger = get_logger(__name__)

_HEALTH_SERVICE = "grpc.health.v1.Health"
_EXPIRY_WARNING = timedelta(days=14)


class Outcome(enum.Enum):
    """What reading a file again came to."""

    UNCHANGED = "unchanged"
    RELOADED = "reloaded"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Of one kind of file; `reason` says why it was refused, and is empty otherwise."""

    kind: str
    outcome: Outcome
    reason: str = ""


class _Reloadable(Protocol):
    @property
    def kind(self) -> str: ...

    def reload(self) -> bool: ...


class Tokens:
    """What the tokens file held when it was last usable."""

    kind = "tokens"

    def __init__(self, config: ServerConfig) -> None:
        """Read it. Raises AccessError with one line."""
        assert config.tokens_file is not None
        self._path = config.tokens_file
        self.quotas = QuotaBook(
            Limits(
                requests_per_minute=config.token_requests_per_minute,
                tokens_per_minute=config.token_tokens_per_minute,
                concurrent_streams=config.token_concurrent_streams,
            )
        )
        self._contents = tokens_file.read_bytes(self._path)
        self.tokens: TokenSet = tokens_file.parse(self._contents, self._path)
        self._authenticator = Authenticator(self.tokens)

    def authenticate(self, metadata: tuple[tuple[str, str | bytes], ...], now: datetime) -> Token:
        """See Authenticator."""
        return self._authenticator.authenticate(metadata, now)

    def reload(self) -> bool:
        """Take what the file holds now, unless it is in use already; blocks. True: it is new.

        Raises AccessError where it cannot be used; the old tokens stay. Have the quotas `follow`
        on the event loop afterwards.
        """
        contents = tokens_file.read_bytes(self._path)
        if contents == self._contents:
            return False
        tokens = tokens_file.parse(contents, self._path)
        authenticator = Authenticator(tokens)
        self._contents, self.tokens, self._authenticator = contents, tokens, authenticator
        return True


class AccessControl:
    """The certificates and tokens of one server. Belongs to its event loop.

    Raises AccessError, one line, where a file cannot be used at the start.
    """

    def __init__(
        self, config: ServerConfig, on_refused: Callable[[RequestRecord], None] | None = None
    ) -> None:
        self._config = config
        self._on_refused = RefusalLog() if on_refused is None else on_refused
        self.certificates: Certificates | None = None
        self.tokens: Tokens | None = None
        if config.tls_cert is not None and config.tls_key is not None:
            files = CertificateFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
            self.certificates = Certificates(files)
        if config.tokens_file is not None:
            self.tokens = Tokens(config)
        # Why the files on disk are not those in use, by kind.
        self.refused: dict[str, str] = {}
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[list[Reloaded]]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._warned_of: datetime | None = None
        self._guards: list[AccessInterceptor] = []

    def for_callers(self, service: str) -> list[grpc.aio.ServerInterceptor]:
        """In front of the port where callers connect; `service` is ours there."""
        open_services = frozenset({_HEALTH_SERVICE} if self._config.open_health else ())
        return self._interceptors({service: "generate"}, open_services, with_quotas=True)

    def for_administration(self, service: str) -> list[grpc.aio.ServerInterceptor]:
        """In front of the administration port; `service` is ours there.

        Without quotas: whoever looks into a token that has used up its own must get in.
        """
        return self._interceptors({service: "admin"}, frozenset(), with_quotas=False)

    def credentials(self) -> grpc.ServerCredentials | None:
        """For one listening port; None: plain text."""
        return None if self.certificates is None else self.certificates.credentials()

    def _interceptors(
        self, scopes: Mapping[str, Scope], open_services: frozenset[str], *, with_quotas: bool
    ) -> list[grpc.aio.ServerInterceptor]:
        """What stands in front of services that ask for these scopes: nothing without tokens."""
        if self.tokens is None:
            return []
        guard = AccessInterceptor(
            self.tokens.authenticate,
            scopes,
            open_services=open_services,
            quotas=self.tokens.quotas if with_quotas else None,
            on_refused=self._on_refused,
        )
        self._guards.append(guard)
        return [guard]

    def start(self) -> None:
        """Look at the files every `access_reload_s` from now on, and warn of what is unsafe."""
        config = self._config
        if self.tokens is not None and not any(
            token.objection(datetime.now(UTC)) is None for token in self.tokens.tokens.token
        ):
            logger.warning(
                "no token is usable: nobody can call", tokens_file=str(config.tokens_file)
            )
        if self.tokens is not None and self.certificates is None and not _is_loopback(config.host):
            logger.warning(
                "tokens are sent in the clear: set tls_cert and tls_key", host=config.host
            )
        self._warn_of_expiry()
        if self.tokens is not None or self.certificates is not None:
            self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        reloads = list(self._reloads)
        for task in reloads:
            task.cancel()
        await asyncio.gather(*reloads, return_exceptions=True)

    async def reload(self) -> list[Reloaded]:
        """Look at every file now. Never raises: what cannot be used is told, logged and left.

        Goes on where the caller is cancelled: the thread would put the new tokens in use all the
        same, and nobody would have the quotas follow them.
        """
        task = asyncio.create_task(self._reload_all())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        return await asyncio.shield(task)

    async def _reload_all(self) -> list[Reloaded]:
        async with self._reloading:
            results = []
            for reloadable in (self.certificates, self.tokens):
                if reloadable is not None:
                    results.append(await self._reload_one(reloadable))
            self._end_refused()
            return results

    def _end_refused(self) -> None:
        """End the running calls of tokens that are revoked, removed or over by the clock."""
        ended = sum(guard.end_refused() for guard in self._guards)
        if ended:
            logger.warning("running calls ended: their tokens let nobody in any more", calls=ended)

    async def _reload_one(self, reloadable: _Reloadable) -> Reloaded:
        kind = reloadable.kind
        before = self.refused.pop(kind, "")
        try:
            changed = await asyncio.to_thread(reloadable.reload)
        except AccessError as error:
            reason = self.refused[kind] = str(error)
            if reason != before:  # else it would be logged at each look
                logger.error(f"{kind} not reloaded, the old ones stay in use", reason=reason)
            return Reloaded(kind, Outcome.REFUSED, reason)
        if not changed:
            return Reloaded(kind, Outcome.UNCHANGED)
        if reloadable is self.tokens:
            self.tokens.quotas.follow(self.tokens.tokens.token)
        logger.info(f"{kind} reloaded")
        self._warn_of_expiry()
        return Reloaded(kind, Outcome.RELOADED)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.access_reload_s)
            try:
                await self.reload()
                self._warn_of_expiry()
            except Exception as error:
                logger.error("looking at the files failed", exc_info=error)

    def _warn_of_expiry(self) -> None:
        """Once for each certificate when its end is near, and once when it is there."""
        if self.certificates is None:
            return
        end, now = self.certificates.not_after, datetime.now(UTC)
        due = end if now >= end else end - _EXPIRY_WARNING
        if now >= due != self._warned_of:
            self._warned_of = due
            event = "the certificate has expired" if now >= end else "the certificate expires soon"
            logger.warning(event, not_after=end.isoformat())


def _is_loopback(host: str) -> bool:
    return host in ("127.0.0.1", "::1", "localhost")
