"""The page's routes: the page itself, the server's state, one text, and CSV files.

    GET  /                    the page; /static/... its parts
    GET  /api/state           loading, ready, busy or gone; the model, the templates, the limits
    POST /api/tokens          JSON {text}: how many tokens that is
    POST /api/classify        JSON {text, template, seed}: an answer as server-sent events
    POST /api/table           text/csv: what is in it; ?header=
    POST /api/table/classify  text/csv: answers row by row as server-sent events;
                              ?header= &column= &template= &seed= &first= &explain=

An answer that is refused before it begins has a status of its own and {"error": {code, message,
retry_after_s}}; what goes wrong later comes as an `error` event with the same fields.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from gptjet.service.apps.sentiment.template import PromptTemplate
from gptjet.service.apps.sentiment.web import bodies, tables
from gptjet.service.apps.sentiment.web.batches import classify_rows
from gptjet.service.apps.sentiment.web.errors import PageError
from gptjet.service.apps.sentiment.web.events import KNOWN_ERRORS, answer_events, problem_of, sse
from gptjet.service.apps.sentiment.web.guards import KnownHost, SameOrigin, SecurityHeaders
from gptjet.service.apps.sentiment.web.limits import RateLimit, StreamLimit
from gptjet.service.apps.sentiment.web.settings import WebSettings
from gptjet.service.apps.sentiment.web.source import Source
from gptjet.service.client import UnavailableError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

_CSV_COST = 5
_CSV_KINDS = ("text/csv",)
_PREVIEW_ROWS = 3
_PING_S = 10
# A visitor who takes nothing for this long has gone without a word.
_SEND_TIMEOUT_S = 30

_log = structlog.get_logger(__name__)

Events: TypeAlias = AsyncGenerator[ServerSentEvent]


def static_folder() -> Path:
    """The page's files, as installed."""
    return Path(str(resources.files(__package__))) / "static"


def create_app(
    source: Callable[[], AbstractAsyncContextManager[Source]], settings: WebSettings
) -> Starlette:
    """The page. `source` is entered when the app starts and left when it stops."""
    page = _Page(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with source() as page.source:
            yield

    return Starlette(
        routes=[
            Route("/", page.index),
            Route("/api/state", page.state),
            Route("/api/tokens", page.tokens, methods=["POST"]),
            Route("/api/classify", page.classify, methods=["POST"]),
            Route("/api/table", page.table, methods=["POST"]),
            Route("/api/table/classify", page.classify_table, methods=["POST"]),
            # An editable install is a farm of links, which lead out of the folder.
            Mount("/static", _Static(directory=static_folder(), follow_symlink=True)),
        ],
        middleware=[
            Middleware(SecurityHeaders),
            Middleware(KnownHost, allowed_hosts=settings.allowed_hosts),
            Middleware(SameOrigin),
        ],
        exception_handlers={PageError: _refuse, HTTPException: _refuse_http},
        lifespan=lifespan,
    )


class _Static(StaticFiles):
    """Files that a browser asks for again each time; unchanged ones cost a 304."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response


class _Page:
    """The handlers, and what they share: the limits and the source of answers."""

    source: Source

    def __init__(self, settings: WebSettings) -> None:
        self._settings = settings
        self._rate = RateLimit(settings.requests_per_minute, settings.burst)
        # Counting tokens while someone types is cheap, and must not use up the budget of answers.
        self._token_rate = RateLimit(4 * settings.requests_per_minute, 4 * settings.burst)
        self._streams = StreamLimit(settings.streams_per_client, settings.max_streams)

    async def index(self, _request: Request) -> Response:
        return FileResponse(
            static_folder() / "index.html",
            media_type="text/html; charset=utf-8",
            headers={"cache-control": "no-cache"},
        )

    async def state(self, _request: Request) -> Response:
        known = await self.source.state()
        is_busy = known.state == "ready" and self._streams.is_full
        model = known.model
        fields = {
            "state": "busy" if is_busy else known.state,
            "model": None
            if model is None
            else {
                "name": model.name,
                "backend": model.backend,
                "device": model.device,
                "dtype": model.dtype,
                "num_parameters": model.num_parameters,
                "max_context": model.max_context,
            },
            "templates": [_template_fields(template) for template in self.source.templates],
            "limits": {
                "max_chars": self._settings.max_chars,
                "max_csv_bytes": self._settings.max_csv_bytes,
                "max_csv_rows": self._settings.max_csv_rows,
                "requests_per_minute": self._settings.requests_per_minute,
                "max_seed": bodies.MAX_SEED,
            },
        }
        return JSONResponse(fields, headers={"cache-control": "no-store"})

    async def tokens(self, request: Request) -> Response:
        self._token_rate.take(_client(request))
        fields = await self._json(request)
        text = bodies.text_field(fields, self._settings.max_chars)
        template = self._template(fields.get("template"))
        try:
            count = await self.source.count_tokens(template.one_line(text))
        except KNOWN_ERRORS as error:
            raise self._problem(error) from None
        return JSONResponse({"tokens": count}, headers={"cache-control": "no-store"})

    async def classify(self, request: Request) -> Response:
        client = _client(request)
        self._rate.take(client)
        fields = await self._json(request)
        text = bodies.text_field(fields, self._settings.max_chars)
        seed = bodies.seed_field(fields.get("seed"))
        classifier = self.source.classifier(self._template(fields.get("template")), explain=True)
        return self._stream(client, lambda: answer_events(classifier, text, seed))

    async def table(self, request: Request) -> Response:
        self._rate.take(_client(request))
        table = await self._read_table(request)
        return JSONResponse(
            {
                "columns": table.columns,
                "column": table.column,
                "has_header": table.has_header,
                "rows": len(table.rows),
                "encoding": table.encoding,
                "delimiter": table.delimiter,
                "preview": [row.cells for row in table.rows[:_PREVIEW_ROWS]],
            },
            headers={"cache-control": "no-store"},
        )

    async def classify_table(self, request: Request) -> Response:
        client = _client(request)
        self._rate.take(client, _CSV_COST)
        query = request.query_params
        template = self._template(query.get("template"))
        seed = bodies.seed_field(query.get("seed"))
        table = await self._read_table(request)
        column = _index(query.get("column"), "column", table.column, len(table.columns))
        first = _index(query.get("first"), "first", 0, len(table.rows))
        classifier = self.source.classifier(
            template, explain=_switch(query.get("explain"), "explain", default=True)
        )

        async def events() -> Events:
            yield sse("start", {"columns": table.columns, "rows": len(table.rows), "first": first})
            answers = classify_rows(
                classifier,
                table.rows,
                column,
                first=first,
                seed=seed,
                max_chars=self._settings.max_chars,
                in_flight=self._settings.rows_in_flight,
            )
            async with aclosing(answers):
                async for answer in answers:
                    yield sse("row", answer.fields())
            yield sse("end", {"rows": len(table.rows)})

        return self._stream(client, events)

    async def _json(self, request: Request) -> dict[str, Any]:
        body = await bodies.read_body(
            request,
            kinds=("application/json",),
            limit=self._settings.max_json_bytes,
            timeout_s=self._settings.body_timeout_s,
        )
        return bodies.read_json(body)

    async def _read_table(self, request: Request) -> tables.Table:
        value = request.query_params.get("header")
        header = None if value is None else _switch(value, "header", default=True)
        content = await bodies.read_body(
            request,
            kinds=_CSV_KINDS,
            limit=self._settings.max_csv_bytes,
            timeout_s=self._settings.body_timeout_s,
        )
        # In a thread: a large file takes long enough for others to notice.
        return await asyncio.to_thread(
            tables.read_table, content, has_header=header, max_rows=self._settings.max_csv_rows
        )

    def _template(self, name: object) -> PromptTemplate:
        """By name, of those that are offered: a visitor names no files."""
        templates = self.source.templates
        if name is None:
            return templates[0]
        for template in templates:
            if template.name == name:
                return template
        known = ", ".join(template.name for template in templates)
        raise PageError(400, "template", f"template: must be one of {known}")

    def _stream(self, client: str, events: Callable[[], Events]) -> Response:
        """Answer with these events while there is room for another stream.

        The place is taken at once, so that a refusal is an answer of its own, and given back when
        the response has ended, however it ended.
        """
        place = contextlib.ExitStack()
        place.enter_context(self._streams.hold(client))
        return _HeldEvents(self._guarded(events), place)

    async def _guarded(self, events: Callable[[], Events]) -> Events:
        try:
            async with aclosing(events()) as running:
                async for event in running:
                    yield event
        except KNOWN_ERRORS as error:
            yield sse("error", self._problem(error).fields())
        except Exception:  # noqa: BLE001 - logged; the visitor is told, not left waiting
            _log.exception("answer_failed")
            yield sse("error", PageError(500, "failed", "the page's server failed").fields())

    def _problem(self, error: Exception) -> PageError:
        if isinstance(error, UnavailableError):
            self.source.lost()
        return problem_of(error)


class _HeldEvents(EventSourceResponse):
    """A stream of events that gives its place back when it has ended or was left."""

    def __init__(self, events: Events, place: contextlib.ExitStack) -> None:
        super().__init__(events, ping=_PING_S, send_timeout=_SEND_TIMEOUT_S, sep="\n")
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, PageError)
    return error.response()


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing here", 405: f"{request.method} is not possible here"}
    problem = PageError(error.status_code, "http", words.get(error.status_code, error.detail))
    response = problem.response()
    response.headers.update(error.headers or {})
    return response


def _template_fields(template: PromptTemplate) -> dict[str, Any]:
    return {
        "name": template.name,
        "version": template.version,
        "description": template.description,
        "language": template.language,
        "labels": [label.name for label in template.labels],
        "max_text_tokens": template.max_text_tokens,
    }


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


def _switch(value: str | None, name: str, *, default: bool) -> bool:
    if value is None:
        return default
    if value not in ("0", "1"):
        raise PageError(400, "invalid", f"{name}: must be 0 or 1")
    return value == "1"


def _index(value: str | None, name: str, default: int, length: int) -> int:
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) < 9 and int(value) < length):
        raise PageError(400, "invalid", f"{name}: must be a whole number from 0 to {length - 1}")
    return int(value)
