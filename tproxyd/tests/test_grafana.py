"""The dashboard and the alert rules name what /metrics has: metrics, labels, the labels' values.

Read is what is needed of PromQL: names, matchers, `by`, `on`, `ignoring`. What a rule does with
series that are made up is promtool's to say (scripts/grafana/alerts-test.yaml).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tproxyd.config import Config, Listener
from tproxyd.flow.tally import Layout
from tproxyd.proc.counters import Own, Page, UpstreamCounts, exposition

HERE = Path(__file__).resolve().parents[2] / "scripts" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((HERE / "dashboard.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((HERE / "alerts.yaml").read_text())
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
TESTS: dict[str, Any] = yaml.safe_load((HERE / "alerts-test.yaml").read_text())

OF_TARGETS = {"job", "instance"}  # what Prometheus adds to every series
OPEN = {"listener", "version", "le", *OF_TARGETS}  # labels whose values are not a closed set


Metrics = dict[str, list[dict[str, str]]]  # the name of a series -> the labels of each


def exported() -> Metrics:
    own = Own(1, 0, 0, upstreams=(UpstreamCounts("inbound", 1, 0, 0),))
    body, _ = exposition(Page(Layout(Config(listeners=(Listener(),))), 1), own)
    found: Metrics = {"up": [{}]}  # Prometheus' own
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


KNOWN = exported()


# PromQL -------------------------------------------------------------------------------------------

_SELECTOR = re.compile(r"\b(tproxyd_\w+|up)\b(?!\s*\()(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(by|without|on|ignoring)\s*\(([^)]*)\)")
# Functions, operators, and what label_values is asked for.
_WORDS = {
    *("sum", "rate", "increase", "histogram_quantile", "and"),
    *("label_values", "job", "instance"),
}


class Selector(NamedTuple):
    name: str
    matchers: list[tuple[str, str, str]]  # label, operator, value


def selectors(expr: str) -> Iterator[Selector]:
    for name, matchers in _SELECTOR.findall(expr):
        yield Selector(name, _MATCHER.findall(matchers))


def problems(expr: str) -> list[str]:
    """What an expression names that is not there."""
    found = []
    here = list(selectors(expr))
    if not here:
        found.append("selects nothing")
    common = set[str].intersection(*({*labels(each.name)} for each in here)) if here else set()
    for each in here:
        if each.name not in KNOWN:
            found.append(f"no metric {each.name}")
            continue
        for label, operator, value in each.matchers:
            if label not in labels(each.name):
                found.append(f"{each.name} has no label {label}")
            elif label not in OPEN:
                known = {series[label] for series in KNOWN[each.name]}
                alternatives = value.split("|") if "~" in operator else [value]
                found += [
                    f"{each.name} has no {label} {one}" for one in alternatives if one not in known
                ]
    for _, names in _GROUPING.findall(expr):
        for label in re.findall(r"\w+", names):
            if label not in common:
                found.append(f"not every metric has a label {label}")
    rest = _GROUPING.sub(" ", _SELECTOR.sub(" ", re.sub(r'"[^"]*"|\[[^]]*\]', " ", expr)))
    found += [
        f"{word}: what is that?" for word in re.findall(r"[a-z_]+", rest) if word not in _WORDS
    ]
    return found


def labels(name: str) -> set[str]:
    return OF_TARGETS.union(*KNOWN.get(name, []))


def result_labels(expr: str) -> set[str]:
    """Those that the series of the result have."""
    by = [set(re.findall(r"\w+", names)) for word, names in _GROUPING.findall(expr) if word == "by"]
    if by:
        return set.intersection(*by)
    return set.intersection(*(labels(each.name) for each in selectors(expr)))


@pytest.mark.parametrize(
    ("expr", "why"),
    [
        ("rate(tproxyd_connections[5m])", "no metric tproxyd_connections"),
        ("rate(tproxyd_conections_total[5m])", "no metric tproxyd_conections_total"),
        ("tproxyd_upstream_connect_seconds", "no metric tproxyd_upstream_connect_seconds"),
        ('tproxyd_workers{listener="x"}', "tproxyd_workers has no label listener"),
        (
            'tproxyd_connections_total{close_reason="upstream_fine"}',
            "tproxyd_connections_total has no close_reason upstream_fine",
        ),
        (
            'tproxyd_proxy_headers_total{result=~"invalid|forged"}',
            "tproxyd_proxy_headers_total has no result forged",
        ),
        ("sum by (listner) (tproxyd_connections_total)", "not every metric has a label listner"),
        ("sum by (listener) (tproxyd_bytes_total)", "not every metric has a label listener"),
        ("rat(tproxyd_bytes_total[5m])", "rat: what is that?"),
        ("sum(1)", "selects nothing"),
    ],
)
def test_the_checker_finds(expr: str, why: str) -> None:
    assert why in problems(expr)


# The dashboard ------------------------------------------------------------------------------------


def panels() -> list[dict[str, Any]]:
    return [each for each in DASHBOARD["panels"] if each["type"] != "row"]


def expressions() -> Iterator[tuple[str, str, str]]:
    """Where, the expression, and the text that shows its labels."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]
    for each in DASHBOARD["annotations"]["list"]:
        yield f"annotation {each['name']}", each["expr"], each["titleFormat"]


@pytest.mark.parametrize(("where", "expr", "legend"), list(expressions()))
def test_what_a_panel_asks_for_is_there(where: str, expr: str, legend: str) -> None:
    plain = expr.replace("$__rate_interval", "5m")
    assert problems(plain) == []
    shown = set(re.findall(r"{{\s*(\w+)\s*}}", legend))
    assert shown <= result_labels(plain), f"{where}: {legend}"
    assert 'job=~"$job", instance=~"$instance"' in expr, f"{where} is not of the chosen daemons"


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_can_be_read(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["type"] in {"stat", "timeseries", "table"}
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [each["refId"] for each in panel["targets"]] == [*"ABCDEFGH"[: len(panel["targets"])]]


# Those of Grafana's that it uses: short numbers, counts a second, bytes a second, shares, seconds.
UNITS = {"short", "cps", "ops", "Bps", "percentunit", "s"}


def test_the_dashboard_is_one() -> None:
    """What Grafana 10 and later migrate from; ids are apart, and no panel lies on another."""
    assert DASHBOARD["schemaVersion"] == 38
    assert DASHBOARD["id"] is None
    assert DASHBOARD["uid"] == DASHBOARD["title"] == "tproxyd"
    ids = [each["id"] for each in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & mine, panel["title"]
        cells |= mine


def test_its_variables() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == variables.keys()
    for name in ("job", "instance"):
        query = variables[name]["query"]["query"]
        assert query.endswith(f", {name})")
        assert problems(query) == []


def test_every_metric_is_shown() -> None:
    asked = {each.name for _, expr, _ in expressions() for each in selectors(expr)}
    parts = ("_bucket", "_count", "_sum", "_created")
    sooner = {"tproxyd_bytes_total"}  # tproxyd_bytes_moved_total says it before a connection ends
    assert {name for name in KNOWN if not name.endswith(parts)} - asked == sooner


# The alerts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_what_a_rule_asks_for_is_there(rule: dict[str, Any]) -> None:
    assert problems(rule["expr"]) == []
    text = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= result_labels(rule["expr"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_says_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"Tproxyd[A-Z]\w+", rule["alert"])
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule.get("for") or rule["labels"]["severity"] == "info", "a moment is no alert"
    assert rule["annotations"].keys() == {"summary", "description"}
    assert "$labels.instance" in rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 60


def test_each_rule_is_tested() -> None:
    """Once where it fires, and all of them where none does."""
    healthy, *others = TESTS["tests"]
    assert [each["exp_samples"] for each in healthy["promql_expr_test"]] == [[], [], []]
    assert [each["name"] for each in others] == [rule["alert"] for rule in RULES]
    for each in others:
        (test,) = each["promql_expr_test"]
        (sample,) = test["exp_samples"]
        assert f'alertname="{each["name"]}"' in sample["labels"]
    series = {one["series"].partition("{")[0] for one in healthy["input_series"]}
    asked = {each.name for rule in RULES for each in selectors(rule["expr"])}
    assert asked == series, "on the healthy ones, too"


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: Debian's prometheus")
@pytest.mark.parametrize("what", ["check rules alerts.yaml", "test rules alerts-test.yaml"])
def test_promtool(what: str) -> None:
    done = subprocess.run(
        ["promtool", *what.split()], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
