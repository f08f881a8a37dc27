"""What every request passes: whose name it used, which site it comes from; and what answers carry.

The page has no log-in, so being asked by the right browser is all there is to guard:

- a Host header must be an IP address, localhost, or a name that was allowed. A name that another
  site pointed at this machine (DNS rebinding) is none of these.
- what changes or costs something (POST) must come from the page itself. Browsers say where a
  request comes from (Sec-Fetch-Site, Origin); programs that say neither carry no one's rights and
  are served.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from gptjet.service.apps.sentiment.web.errors import PageError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Nothing on the page turns a string into HTML or code; the browser sees to it.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=()",
}
_SAFE_METHODS = {"GET", "HEAD"}


class SecurityHeaders:
    """Puts the policy headers on every answer, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, send_with_headers)


class KnownHost:
    """Refuses a Host header with a name that this page was not given."""

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._allowed = {host.lower().rstrip(".") for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            name = host_name(Headers(scope=scope).get("host", ""))
            if not self._knows(name):
                problem = PageError(
                    421,
                    "unknown_host",
                    f"this page does not answer to the name {name[:100]!r}; "
                    "start it with --allow-host NAME if it should",
                )
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost") or name in self._allowed:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class SameOrigin:
    """Refuses a request that costs something where a browser says another site made it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            headers = Headers(scope=scope)
            if not _is_same_origin(headers, scope["scheme"]):
                problem = PageError(403, "other_site", "this page is only driven from itself")
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case; "" where unreadable."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_same_origin(headers: Headers, scheme: str) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None and site != "same-origin":
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    # A proxy that ends TLS leaves the scheme http here; the browser's own word, where it gave
    # one, settles that.
    try:
        parts = urlsplit(origin)
    except ValueError:  # "http://[": no browser's
        return False
    same_host = parts.netloc.lower() == headers.get("host", "").lower()
    return same_host and (site == "same-origin" or parts.scheme == scheme)
