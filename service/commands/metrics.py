"""`gptjet metrics`: the files that make a server's metrics useful."""

from __future__ import annotations

import enum
from importlib import resources
from typing import Annotated

import typer

HELP = """Print the Grafana dashboard, the Prometheus alert rules or their tests.

The metrics themselves are served by `gptjet serve --metrics-port 9464`, at /metrics.
"""

EXAMPLES = """Examples:

$ gptjet metrics dashboard > gptjet-dashboard.json
$ gptjet metrics alerts > alerts.yaml && promtool check rules alerts.yaml
$ gptjet metrics alert-tests > alerts_test.yaml && promtool test rules alerts_test.yaml
"""


class MetricsFile(enum.StrEnum):
    """What there is to print."""

    DASHBOARD = "dashboard"
    ALERTS = "alerts"
    ALERT_TESTS = "alert-tests"


FILE_NAMES = {
    MetricsFile.DASHBOARD: "dashboard.json",
    MetricsFile.ALERTS: "alerts.yaml",
    MetricsFile.ALERT_TESTS: "alerts_test.yaml",
}


def metrics(
    what: Annotated[MetricsFile, typer.Argument(help="which file", show_default=False)],
) -> None:
    """Print one of the files that ship with the package."""
    file = resources.files("gptjet.service.observability") / FILE_NAMES[what]
    typer.echo(file.read_text(encoding="utf-8"), nl=False)
