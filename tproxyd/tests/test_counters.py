"""The page that workers and supervisor share, and what Prometheus is told."""

from __future__ import annotations

import os

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tproxyd import __version__
from tproxyd.config import Config, Listener
from tproxyd.flow.tally import (
    ACCEPT_PAUSES,
    ACTIVE,
    BYTES,
    CONNECT_SECONDS,
    CONNECTIONS,
    HEADERS,
    Layout,
    bucket,
)
from tproxyd.proc.counters import Own, Page, UpstreamCounts, exposition
from tproxyd.proc.heals import BOUNDS

CONFIG = Config(listeners=(Listener(), Listener(name="second", port=15007)))
NOTHING = Own(workers=0, worker_restarts=0, kernel_drift=0)


@pytest.fixture
def page() -> Page:
    return Page(Layout(CONFIG), 2)


def scrape(page: Page, own: Own = NOTHING) -> dict[str, list[Sample]]:
    body, _ = exposition(page, own)
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def value(page: Page, name: str, own: Own = NOTHING, **labels: str) -> float:
    (found,) = (s for s in scrape(page, own)[name] if s.labels == labels)
    return found.value


def test_what_a_child_counts_is_seen_by_the_parent(page: Page) -> None:
    cell = page.layout.index(BYTES, "sent")
    page.rows[0][cell] = 1
    pid = os.fork()
    if pid == 0:
        page.rows[1][cell] += 2**40
        os._exit(0)
    os.waitpid(pid, 0)
    assert page.sums()[cell] == 2**40 + 1


def test_rows_do_not_overlap(page: Page) -> None:
    page.rows[0][len(page.layout) - 1] = 7
    page.rows[1][0] = 5
    assert (page.rows[0][len(page.layout) - 1], page.rows[1][0]) == (7, 5)
    assert page.rows[0][0] == page.rows[1][len(page.layout) - 1] == 0


def test_a_dead_worker_takes_its_gauges_along_and_nothing_else(page: Page) -> None:
    active, ended = page.layout.index(ACTIVE, "inbound"), CONNECTIONS
    counted = page.layout.index(ended, "inbound", "upstream_fin")
    for row in page.rows:
        row[active], row[counted] = 3, 10
    page.reset_gauges(0)
    assert (page.sums()[active], page.sums()[counted]) == (3, 20)
    assert (page.get(0, ACTIVE), page.get(1, ACTIVE)) == (0, 3)


def test_counters_and_gauges_are_sums_over_the_slots_by_label(page: Page) -> None:
    cell = page.layout.index(CONNECTIONS, "second", "downstream_fin")
    page.rows[0][cell], page.rows[1][cell] = 4, 5
    name = "tproxyd_connections_total"
    assert value(page, name, listener="second", close_reason="downstream_fin") == 9
    page.rows[1][page.layout.index(ACTIVE, "second")] = 2
    assert value(page, "tproxyd_connections_active", listener="second") == 2
    assert value(page, "tproxyd_connections_active", listener="inbound") == 0
    page.rows[0][page.layout.index(HEADERS, "2", "accepted")] = 6
    assert value(page, "tproxyd_proxy_headers_total", version="2", result="accepted") == 6
    page.rows[0][page.layout.index(ACCEPT_PAUSES)] = 1
    assert value(page, "tproxyd_accept_pauses_total") == 1


def test_histogram_buckets_are_cumulative_and_the_sum_is_in_seconds(page: Page) -> None:
    cells = [cell.labels[0] for cell in page.layout.cells if cell.metric is CONNECT_SECONDS]
    for row, seconds in ((0, 0.00005), (1, 0.0003), (1, 0.0003), (0, 9.0)):
        page.rows[row][page.layout.index(CONNECT_SECONDS, cells[bucket(seconds)])] += 1
        page.rows[row][page.layout.index(CONNECT_SECONDS, "sum")] += round(seconds * 1e6)
    name = "tproxyd_upstream_connect_seconds"
    buckets = [sample.value for sample in scrape(page)[f"{name}_bucket"]]
    assert buckets == [1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4]
    assert value(page, f"{name}_bucket", le="+Inf") == value(page, f"{name}_count") == 4
    assert value(page, f"{name}_sum") == pytest.approx(9.00065)


def test_the_supervisors_own_metrics(page: Page) -> None:
    own = Own(workers=2, worker_restarts=3, kernel_drift=4)
    assert value(page, "tproxyd_workers", own) == 2
    assert value(page, "tproxyd_worker_restarts_total", own) == 3
    assert value(page, "tproxyd_kernel_drift_total", own) == 4
    assert value(page, "tproxyd_build_info", own, version=__version__) == 1


def test_upstreams_by_listener_and_state(page: Page) -> None:
    own = NOTHING._replace(
        upstreams=(UpstreamCounts("a", 2, 1, 7), UpstreamCounts("b", 0, 4, 0)),
    )
    assert value(page, "tproxyd_upstreams", own, listener="a", state="up") == 2
    assert value(page, "tproxyd_upstreams", own, listener="a", state="down") == 1
    assert value(page, "tproxyd_upstreams", own, listener="b", state="up") == 0
    assert value(page, "tproxyd_resolve_failures_total", own, listener="a") == 7
    assert value(page, "tproxyd_resolve_failures_total", own, listener="b") == 0


def test_nothing_but_our_own_is_exported_and_every_cell_is(page: Page) -> None:
    for row in page.rows:
        for i in range(len(row)):
            row[i] = 1
    samples = [s for each in scrape(page).values() for s in each]
    assert all(sample.name.startswith("tproxyd_") for sample in samples)
    # The histogram has a count that no cell holds. Of the supervisor are seven samples, and of what
    # was healed two results, the buckets, a count and a sum.
    assert len(samples) == len(page.layout) + 1 + 7 + 2 + len(BOUNDS) + 1 + 2
