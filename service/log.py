"""Structured logs on standard error: one renderer for our lines and for every library's."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Literal

import structlog

if TYPE_CHECKING:
    from structlog.typing import Processor

LogFormat = Literal["console", "json"]


def configure_logging(level: str = "info", log_format: LogFormat = "console") -> None:
    """Send structlog's and the standard library's records to stderr in `log_format`.

    Safe to call again; the last call holds.
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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
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
