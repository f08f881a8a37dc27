"""What is wrong with a model, in one line. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

_NAMES_SHOWN = 3


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's message without its line breaks, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe_mismatch(
    where: str,
    class_name: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    misshapen: Iterable[str] = (),
) -> str | None:
    """One line of what differs between a checkpoint and its model, or None where nothing does."""
    parts = [
        f"{kind} {', '.join(names[:_NAMES_SHOWN])}"
        + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
        for kind, found in (
            ("missing", missing),
            ("misshapen", misshapen),
            ("unexpected", unexpected),
        )
        if (names := sorted(found))
    ]
    if not parts:
        return None
    return f"{where}: the weights are not those of {class_name}: {'; '.join(parts)}"
