"""Structured logs on standard error: one renderer for our lines and for every library's."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Literal

import structlog

from gptjet.service.log_writer import BackgroundHandler

if TYPE_CHECKING:
    from structlog.typing import Processor

LogFormat = Literal["console", "json"]

_STDERR_FD = 2


def configure_logging(
    level: str = "info", log_format: LogFormat = "console", *, background: bool = False
) -> None:
    """Send structlog's and the standard library's records to stderr in `log_format`.

    `background`: from a thread, so that a log that cannot be written holds no request up; it
    writes to standard error's descriptor, whatever `sys.stderr` is. Safe to call again; the last
    call holds.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *_renderers(log_format),
        ],
    )
    handler: logging.Handler
    handler = BackgroundHandler(_STDERR_FD) if background else logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in root.handlers:
        if isinstance(old, BackgroundHandler):
            old.close()
    root.handlers = [handler]
    set_level(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def set_level(level: str) -> None:
    """Log what is at least this severe from now on: debug, info, warning or error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    # Libraries log their chatter at INFO; only their warnings concern an operator.
    logging.getLogger().setLevel(max(number, logging.WARNING))
    logging.getLogger("gptjet").setLevel(number)


def current_level() -> str:
    """The least severe level that is logged."""
    return logging.getLevelName(logging.getLogger("gptjet").getEffectiveLevel()).lower()


def flush_log() -> None:
    """Wait, a second at most, until what has been logged is written: the process may end now."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, BackgroundHandler):
            handler.flush()


def dropped_lines() -> int:
    """Log lines that could not be written since logging was configured."""
    handlers = logging.getLogger().handlers
    return sum(one.dropped for one in handlers if isinstance(one, BackgroundHandler))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module: `get_logger(__name__)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _renderers(log_format: LogFormat) -> list[Processor]:
    if log_format == "json":
        return [
            # Not `dict_tracebacks`: it adds local variables, and so callers' prompts.
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            sort_keys=False,
            # The default shows local variables too where `rich` is installed.
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]
