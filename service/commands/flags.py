"""Groups of flags, written once as a dataclass and shared by commands.

    @dataclass(frozen=True)
    class ConnectionFlags:
        server: Annotated[str, typer.Option(help="…")] = "127.0.0.1:50051"

    @expand_flags
    def models(connection: ConnectionFlags, *, json: Annotated[bool, typer.Option()] = False): ...

Typer reads a command's flags from its signature, so that is what changes: a parameter annotated
with a dataclass is replaced by the dataclass's fields, and put together again at the call.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any


def expand_flags(function: Callable[..., None]) -> Callable[..., None]:
    """The command with each dataclass parameter replaced by its fields, in their order.

    Raises TypeError where two groups have a field of the same name.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[Any], tuple[str, ...]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        annotation = hints[parameter.name]
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            fields = _parameters_of(annotation)
            groups[parameter.name] = (annotation, tuple(field.name for field in fields))
            parameters += fields
        else:
            parameters.append(
                parameter.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY)
            )

    def call(values: dict[str, Any]) -> None:
        for name, (group, field_names) in groups.items():
            values[name] = group(**{field: values.pop(field) for field in field_names})
        function(**values)

    return with_parameters(function, parameters, call)


def with_parameters(
    function: Callable[..., None],
    parameters: Sequence[inspect.Parameter],
    call: Callable[[dict[str, Any]], None],
) -> Callable[..., None]:
    """`function` as typer shall see it: its name and docstring, these parameters, this call."""

    @functools.wraps(function)
    def command(**values: Any) -> None:
        call(values)

    duplicates = {p.name for p in parameters if sum(p.name == q.name for q in parameters) > 1}
    if duplicates:
        raise TypeError(f"flags given twice: {', '.join(sorted(duplicates))}")
    # Typer evaluates annotations anew where it finds strings; these are objects already.
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    del command.__wrapped__
    return command


def _parameters_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=(
                inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            ),
        )
        for field in dataclasses.fields(group)
    ]
