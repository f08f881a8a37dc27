"""The dashboard and the alert rules: what they name exists, and the rules do what they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from gptjet.service.cli import app
from gptjet.service.commands.metrics import FILE_NAMES
from gptjet.service.observability.metrics import CALLERS_FAULTS, Metrics

FOLDER = resources.files("gptjet.service.observability")
_NAME = re.compile(r"\b(?:gptjet|process|python)_[a-z0-9_]+")
# What Grafana puts in before it asks Prometheus.
_GRAFANA = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*"}


def dashboard() -> Any:
    return json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))


def alerts() -> list[Any]:
    document = yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[Any]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def alert_queries() -> list[str]:
    return [rule["expr"] for rule in alerts()]


@pytest.fixture
async def samples(
    start_server: Callable[..., Awaitable[Any]], tmp_path: Path
) -> dict[str, set[str]]:
    """Every sample that a server gives, with the labels that it can have."""
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'version = 1\n[[rules]]\nname = "no"\naction = "block"\nphrases = ["zzz"]\n',
        encoding="utf-8",
    )
    running = await start_server(
        metrics_port=0, governance_policy=policy, governance_dir=tmp_path / "governance"
    )
    await running.client.generate("abc", max_new_tokens=2)
    from prometheus_client import generate_latest

    found: dict[str, set[str]] = {}
    text = generate_latest(running.server.observability.metrics.registry).decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # What a scrape adds.
            labels = {*sample.labels, "job", "instance"}
            found.setdefault(sample.name, set()).update(labels)
    return found


async def test_every_metric_of_the_dashboard_and_the_alerts_exists(
    samples: dict[str, set[str]],
) -> None:
    for query in [*dashboard_queries(), *alert_queries()]:
        names = _NAME.findall(query)
        assert names or "up{" in query, query
        missing = set(names) - samples.keys()
        assert not missing, f"{missing} in {query}"


async def test_every_label_of_the_dashboard_and_the_alerts_exists(
    samples: dict[str, set[str]],
) -> None:
    selector = re.compile(r"\b((?:gptjet|process)_[a-z0-9_]+)\{([^}]*)\}")
    grouping = re.compile(r"by \(([^)]*)\)")
    for query in [*dashboard_queries(), *alert_queries()]:
        for name, matchers in selector.findall(query):
            for label in re.findall(r"([a-z_]+)\s*(?:=|!=|=~|!~)\s*\"", matchers):
                assert label in samples[name], f"{label} of {name} in {query}"
        known = set().union(*(samples[name] for name in _NAME.findall(query)), {"job"})
        for labels in grouping.findall(query):
            assert {label.strip() for label in labels.split(",")} <= known, query
    for panel in panels():
        for target in panel["targets"]:
            known = set().union(*(samples[name] for name in _NAME.findall(target["expr"])))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known, target


async def test_every_metric_of_ours_is_on_the_dashboard(samples: dict[str, set[str]]) -> None:
    shown = {name for query in dashboard_queries() for name in _NAME.findall(query)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in samples if name.startswith("gptjet_")
    }
    assert ours - shown == set()


def test_the_dashboard_is_laid_out_without_gaps_in_ids_and_without_overlaps() -> None:
    document = dashboard()
    assert [panel["id"] for panel in document["panels"]] == list(
        range(1, len(document["panels"]) + 1)
    )
    cells: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells, panel["title"]
        cells |= mine
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    titles = [panel["title"] for panel in panels()]
    assert len(titles) == len(set(titles))


def test_alerts_say_how_urgent_they_are_and_what_is_wrong() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert set(rule["annotations"]) == {"summary", "description"}
        # Whoever is woken must know by what.
        assert "$labels." in rule["annotations"]["summary"]


def test_every_alert_is_tested_both_ways() -> None:
    document = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text(encoding="utf-8"))
    fires, silent = set(), set()
    for case in document["tests"]:
        for test in case["alert_rule_test"]:
            (fires if test["exp_alerts"] else silent).add(test["alertname"])
        # In each case a neighbour is well, so an alert that fires for both is seen.
        assert any('instance="ok"' in series["series"] for series in case["input_series"])
    assert fires == {rule["alert"] for rule in alerts()}
    assert silent >= {rule["alert"] for rule in alerts() if "for" in rule} - {
        "GPTJetTimeToFirstTokenHigh",
        "GPTJetInterTokenLatencyHigh",
    }


def test_what_callers_do_wrong_pages_nobody() -> None:
    """An alert on refusals leaves the callers' own out by name; one on codes names a server's."""
    num_refusals = 0
    for rule in alerts():
        for left_out in re.findall(r'rpcs_refused_total\{refused_by!~"([^"]*)"', rule["expr"]):
            assert sorted(left_out.split("|")) == sorted(CALLERS_FAULTS)
            num_refusals += 1
        assert rule["expr"].count("rpcs_refused_total") == rule["expr"].count("refused_by!~")
    assert num_refusals
    (internal,) = (rule for rule in alerts() if rule["alert"] == "GPTJetInternalErrors")
    assert re.findall(r'code="(\w+)"', internal["expr"]) == ["INTERNAL"]


def test_metrics_are_counters_gauges_and_histograms_only() -> None:
    kinds = {family.type for family in Metrics(("Generate",)).registry.collect()}
    assert kinds == {"counter", "gauge", "histogram"}


@pytest.mark.parametrize("what", FILE_NAMES)
def test_the_command_prints_the_file_as_it_is(what: str) -> None:
    result = CliRunner().invoke(app, ["metrics", what])
    assert result.exit_code == 0
    assert result.stdout == (FOLDER / FILE_NAMES[what]).read_text(encoding="utf-8")  # type: ignore[index]


def test_an_unknown_file_is_an_error_that_names_the_known_ones() -> None:
    result = CliRunner().invoke(app, ["metrics", "dashboards"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    for name in FILE_NAMES:
        assert name in result.output


# --- promtool ---


@pytest.fixture
def promtool() -> Callable[..., str]:
    command = shutil.which("promtool")
    if command is None:
        pytest.skip("no promtool: apt-get install prometheus")

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [command, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


def test_promtool_accepts_the_rules_and_their_tests_pass(promtool: Callable[..., str]) -> None:
    assert f"SUCCESS: {len(alerts())} rules found" in promtool(
        "check", "rules", str(FOLDER / "alerts.yaml")
    )
    assert "SUCCESS" in promtool("test", "rules", str(FOLDER / "alerts_test.yaml"))


def test_a_rule_that_is_changed_fails_its_test(
    promtool: Callable[..., str], tmp_path: Path
) -> None:
    """Each rule in turn."""
    text = (FOLDER / "alerts.yaml").read_text(encoding="utf-8")
    tests = (FOLDER / "alerts_test.yaml").read_text(encoding="utf-8")
    for number, rule in enumerate(alerts()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "alerts_test.yaml").write_text(tests, encoding="utf-8")
        document = yaml.safe_load(text)
        document["groups"][0]["rules"][number]["expr"] = f"({rule['expr']}) and vector(0) > 1"
        (folder / "alerts.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        with pytest.raises(AssertionError, match=rule["alert"]):
            promtool("test", "rules", str(folder / "alerts_test.yaml"))


def test_promtool_can_parse_every_query_of_the_dashboard(
    promtool: Callable[..., str], tmp_path: Path
) -> None:
    rules = []
    for number, query in enumerate(dashboard_queries()):
        if query.startswith("label_values("):
            continue
        for variable, value in _GRAFANA.items():
            query = query.replace(variable, value)
        assert "$" not in query
        rules.append({"record": f"dashboard:query{number}", "expr": query})
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(rules)} rules found" in promtool("check", "rules", str(file))


def test_promtool_finds_nothing_wrong_with_the_metrics(
    promtool: Callable[..., str], tmp_path: Path
) -> None:
    command = shutil.which("promtool")
    assert command is not None
    from prometheus_client import generate_latest

    from gptjet.service.backends.mock import MockBackend
    from gptjet.service.engine.async_engine import AsyncEngine
    from gptjet.service.engine.tokenizer import ByteTokenizer

    metrics = Metrics(("Generate",))
    metrics.attach(AsyncEngine(MockBackend(), ByteTokenizer()), "toy")
    text = generate_latest(metrics.registry)
    result = subprocess.run(
        [command, "check", "metrics"], input=text, capture_output=True, timeout=120, check=False
    )
    found = [line for line in result.stderr.decode().splitlines() if line.startswith("gptjet_")]
    assert found == []
