"""The entry point: what it lists, how fast, and what its commands promise in their help."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from gptjet.service import commands
from gptjet.service.cli import COMMANDS, CommandEntry, app, load_command
from gptjet.service.commands.terminal import EXIT_CODE_MEANINGS, ExitCode

NAMES = [entry.name for entry in COMMANDS]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == ExitCode.OK, result.output
    return result.stdout


def is_command(name: str) -> bool:
    module = importlib.import_module(f"gptjet.service.commands.{name}")
    return hasattr(module, name) or hasattr(module, "app")


def test_help_lists_every_command_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    listed_modules = {name.replace("-", "_") for name in NAMES}
    assert {name for name in modules if is_command(name)} == listed_modules
    listed = run("--help")
    for entry in COMMANDS:
        assert f"{entry.name} " in listed
        assert entry.summary in listed


@pytest.mark.parametrize("entry", COMMANDS, ids=NAMES)
def test_the_summary_in_the_list_is_the_first_line_of_the_commands_own_help(
    entry: CommandEntry,
) -> None:
    assert load_command(entry.name).help.partition("\n")[0] == entry.summary


def with_subcommands(command: Any) -> list[Any]:
    return [command, *getattr(command, "commands", {}).values()]


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_shows_examples_whose_flags_exist(name: str) -> None:
    command = load_command(name)
    flags = {
        flag
        for each in with_subcommands(command)
        for parameter in each.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    shown = run(name, "--help")
    lines = [line for line in command.epilog.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 3
    for line in lines:
        assert line in shown
        own = line.partition(f"gptjet {name}")[2].partition(" | jq")[0]
        for word in own.split():
            if word.startswith("--"):
                assert word.partition("=")[0] in flags, line


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_of_a_command_is_described(name: str) -> None:
    for command in with_subcommands(load_command(name)):
        for parameter in command.params:
            assert parameter.help, f"{command.name} {parameter.name}"


@pytest.mark.parametrize("name", NAMES)
def test_no_help_has_a_stray_backslash(name: str) -> None:
    """One is left where a line is continued in a raw string."""
    subcommands = getattr(load_command(name), "commands", {})
    for path in ([name], *([name, each] for each in subcommands)):
        own, _, _ = run(*path, "--help").partition("$ gptjet")  # a shell continues lines with it
        assert "\\" not in own.replace("$'\\n'", ""), path


def test_root_help_shows_what_each_exit_code_means() -> None:
    shown = run("--help")
    assert set(EXIT_CODE_MEANINGS) == set(ExitCode)
    for code, meaning in EXIT_CODE_MEANINGS.items():
        assert f"{code.value}  {meaning}" in shown


def _modules_after(*arguments: str) -> set[str]:
    program = (
        "import json, sys\n"
        "from gptjet.service.cli import app\n"
        "try:\n"
        f"    app({list(arguments)!r})\n"
        "except SystemExit:\n"
        "    print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return set(json.loads(ran.stderr.decode().splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in NAMES)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not _modules_after(*arguments) & {"torch", "transformers", "grpc", "numpy"}


def test_root_help_imports_no_command() -> None:
    loaded = _modules_after("--help")
    assert not {f"gptjet.service.commands.{name}" for name in NAMES} & loaded
    assert "pydantic" not in loaded


def test_root_help_takes_less_than_half_a_second_of_cpu() -> None:
    # CPU time, which other work on the machine lengthens less than it does wall time.
    program = (
        "import resource, subprocess, sys\n"
        "command = [sys.executable, '-m', 'gptjet.service.cli', '--help']\n"
        "subprocess.run(command, check=True, capture_output=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)\n"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.5, times


def test_version_is_shown() -> None:
    assert run("--version").startswith("gptjet ")


def test_an_unknown_command_is_a_usage_error_that_suggests_the_near_one() -> None:
    result = CliRunner().invoke(app, ["generat"])
    assert result.exit_code == ExitCode.USAGE
    assert "Did you mean 'generate'?" in result.stderr
