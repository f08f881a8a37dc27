"""Bearer tokens: what is made, what is kept of one, and whether a caller shows a good one.

A token is `gptjet_<id>_<secret>`: the id is public, the secret is 256 random bits. Kept is the
SHA-256 of the whole. A slow hash (scrypt, Argon2) makes guessing dear where people choose
passwords; nobody guesses 256 random bits, and a slow hash on every RPC would be a way to stall the
server. So tokens are made here and never chosen.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Literal, Self, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from gptjet.service.rpc.access.errors import PermissionDeniedError, UnauthenticatedError

Scope = Literal["generate", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

AUTHORIZATION = "authorization"
MAX_LIMIT = 10**9

_ID_BYTES, _SECRET_BYTES = 6, 32
_TOKEN = re.compile(r"gptjet_([0-9a-f]{12})_[0-9a-f]{64}", re.ASCII)
# "Bearer " and a token are 92 characters; what is longer is not looked at.
_MAX_HEADER_CHARACTERS = 128
# Compared with where there is no such id, so that an unknown id takes as long as a wrong secret.
_NO_DIGEST = "0" * 64

_Limit = Field(default=None, ge=1, le=MAX_LIMIT)


class Token(BaseModel):
    """What the tokens file keeps of one token.

    An absent limit is the server's own (`token_requests_per_minute` and so on).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, strict=True)

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    scopes: list[Scope] = Field(min_length=1)
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    requests_per_minute: int | None = _Limit
    tokens_per_minute: int | None = _Limit
    concurrent_streams: int | None = _Limit

    def objection(self, now: datetime) -> str | None:
        """Why the token opens nothing at `now`; None: it does."""
        if self.revoked is not None:
            return "the token has been revoked"
        if self.expires is not None and now >= self.expires:
            return f"the token expired at {self.expires.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        return None

    def require(self, scope: Scope) -> None:
        """Raise PermissionDeniedError where the token lacks `scope`."""
        if scope not in self.scopes:
            raise PermissionDeniedError(
                f"token {self.name} lacks the scope {scope!r} (it has {', '.join(self.scopes)})"
            )


class TokenSet(BaseModel):
    """Every token of a file, ids and names each used once."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    token: tuple[Token, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for field in ("id", "name"):
            seen: set[str] = set()
            for token in self.token:
                value = getattr(token, field)
                # A name may be taken again once its token is revoked: that is how one is replaced.
                if value in seen and not (field == "name" and token.revoked):
                    raise ValueError(f"two tokens have the {field} {value!r}")
                if field == "id" or not token.revoked:
                    seen.add(value)
        return self


def new_token(
    name: str,
    *,
    scopes: Sequence[Scope] = ("generate",),
    expires: datetime | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    concurrent_streams: int | None = None,
    now: datetime | None = None,
) -> tuple[str, Token]:
    """Draw a token: the text to give to its user, and what to keep.

    Raises pydantic.ValidationError for a field out of its limits.
    """
    token_id = secrets.token_hex(_ID_BYTES)
    text = f"gptjet_{token_id}_{secrets.token_hex(_SECRET_BYTES)}"
    kept = Token(
        id=token_id,
        name=name,
        sha256=_digest(text),
        scopes=list(scopes),
        created=(now or datetime.now(UTC)).replace(microsecond=0),
        expires=None if expires is None else expires.replace(microsecond=0),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_streams=concurrent_streams,
    )
    return text, kept


class Authenticator:
    """Finds the token that a caller shows among those of a TokenSet."""

    def __init__(self, tokens: TokenSet) -> None:
        self._by_id = {token.id: token for token in tokens.token}

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]], now: datetime) -> Token:
        """The caller's token; raises UnauthenticatedError, never with the token in the message.

        Only a caller that shows the right secret is told that the token is revoked or expired: to
        anybody else it is not valid, whatever is wrong with it.
        """
        text = _shown(metadata)
        match = _TOKEN.fullmatch(text)
        if match is None:
            raise UnauthenticatedError("the token is not valid")
        token = self._by_id.get(match[1])
        kept = _NO_DIGEST if token is None else token.sha256
        if not hmac.compare_digest(_digest(text), kept) or token is None:
            raise UnauthenticatedError("the token is not valid")
        objection = token.objection(now)
        if objection is not None:
            raise UnauthenticatedError(objection)
        return token


def _shown(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The text after `Bearer `; the scheme's name has no case (RFC 9110, 11.1)."""
    values = [value for key, value in metadata if key.lower() == AUTHORIZATION]
    if not values:
        raise UnauthenticatedError(
            "a bearer token is needed (metadata 'authorization: Bearer <token>')"
        )
    if len(values) > 1:
        # Which one counts is what a proxy and a server may disagree on.
        raise UnauthenticatedError(f"one authorization is needed, got {len(values)}")
    value = values[0]
    if isinstance(value, bytes) or len(value) > _MAX_HEADER_CHARACTERS:
        raise UnauthenticatedError("the token is not valid")
    scheme, _, text = value.partition(" ")
    if scheme.lower() != "bearer":
        raise UnauthenticatedError("the authorization must be 'Bearer <token>'")
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()
