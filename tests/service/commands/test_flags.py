from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from gptjet.service.commands.flags import expand_flags


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(help="w")] = 1
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def test_a_group_of_flags_arrives_as_its_dataclass() -> None:
    received = []

    @expand_flags
    def command(text: Annotated[str, typer.Argument()], *, loud: bool = False, size: Size) -> None:
        received.append((text, loud, size))

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["hi", "--width", "3", "--name", "a", "--name", "b"])
    assert result.exit_code == 0, result.output
    assert received == [("hi", False, Size(3, ["a", "b"]))]
    assert CliRunner().invoke(app, ["hi"]).exit_code == 0
    assert received[1] == ("hi", False, Size())


def test_two_flags_of_one_name_are_refused_when_the_command_is_made() -> None:
    def command(*, width: int = 2, size: Size) -> None: ...

    with pytest.raises(TypeError, match="given twice: width"):
        expand_flags(command)
