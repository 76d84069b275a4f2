"""The picture of a running daemon: what /status says as JSON, and how `tproxyd status` draws it.

Both ends of one format, in one file. Every key is always there, zeros too: what people write
against this must not depend on what has happened so far. Here are also the words for what a
listener does, which the log uses at the start. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypedDict

from tproxyd.addr import Endpoint
from tproxyd.config import Intercept, Listener, Scope, Via
from tproxyd.flow.tally import ACTIVE, CONNECT_SECONDS, CONNECTIONS, HEADERS, METRICS, Kind
from tproxyd.proc import figures
from tproxyd.proc.counters import Histogram, Samples
from tproxyd.proc.figures import columns
from tproxyd.proc.heals import HealPart, Heals
from tproxyd.proc.picture import Entry, Health
from tproxyd.proc.rows import Listing, Row
from tproxyd.reader import EVERY_PORT, PortRanges

if TYPE_CHECKING:
    from tproxyd.proc.reconciler import Verdict


class AddressPart(TypedDict):
    address: str
    health: str  # "up", "down", "unchecked"
    why: str  # it is down


class UpstreamPart(TypedDict):
    upstream: str  # as the configuration has it
    addresses: list[AddressPart]
    error: str  # why its name can't be resolved; the addresses are of the last answer then


class ListenerPart(TypedDict):
    name: str
    bind: str  # of an ordinary listener; "" = it intercepts
    port: int
    families: list[str]
    intercept: str  # what it takes, in words; "" of an ordinary listener
    upstreams: list[UpstreamPart]  # none: where the client meant to go


class ReloadPart(TypedDict):
    done: int
    failed: int
    last: str  # ISO 8601, UTC; "": there was none
    error: str  # of the last one: why the configuration of before goes on


class WorkerPart(TypedDict):
    slot: int
    generation: int  # of the configuration that it serves; a reload begins the next
    pid: int  # 0: there is none right now
    state: str
    active: int
    started: str  # ISO 8601, UTC


class ConnectionsPart(TypedDict):
    active: int
    total: int  # ended
    by_close_reason: dict[str, int]


class RatesPart(TypedDict):
    """Per second, over the last `over_s` seconds."""

    over_s: float  # 0: there are no two samples yet
    connections: float  # begun
    failed: float  # ended without having reached an upstream
    received: float  # bytes
    sent: float
    connect_ms: float | None  # how long an upstream took, on average; None: none was connected


class KernelPart(TypedDict):
    state: str  # "ok", "drift", "not installed", "unknown"
    detail: list[str]
    return_path: str
    checked_s_ago: float | None
    heals: int
    heal_failures: int
    trouble: str  # why healing fails now; "" when it does not
    last_heal: HealPart | None


class Snapshot(TypedDict):
    version: str
    pid: int
    uptime_s: float
    ready: bool
    not_ready_because: list[str]
    reload: ReloadPart
    listeners: list[ListenerPart]
    workers: list[WorkerPart]
    connections: ConnectionsPart
    rates: RatesPart
    counters: dict[str, object]
    kernel: KernelPart


def connections_part(of: dict[str, Samples]) -> ConnectionsPart:
    ended = of[CONNECTIONS.name].by("close_reason")
    return {
        "active": sum(of[ACTIVE.name].by("listener").values()),
        "total": sum(ended.values()),
        "by_close_reason": ended,
    }


def kernel_part(verdict: Verdict, heals: Heals, now: float) -> KernelPart:
    return {
        "state": verdict.state,
        "detail": list(verdict.detail),
        "return_path": verdict.return_path,
        "checked_s_ago": round(now - verdict.read_at, 1) if verdict.read_at > 0 else None,
        "heals": heals.healed,
        "heal_failures": heals.failed,
        "trouble": verdict.trouble,
        "last_heal": heals.last,
    }


def counters_part(of: dict[str, Samples]) -> dict[str, object]:
    """Every other metric under its own name, nested by its labels."""
    part: dict[str, object] = {}
    for metric in METRICS:
        each = of[metric.name]
        if metric.kind is Kind.HISTOGRAM:
            histogram = Histogram.of(each)
            part[metric.name] = {"count": histogram.observed, "seconds": histogram.seconds}
        elif metric is not ACTIVE and metric is not CONNECTIONS:
            part[metric.name] = _nested(each)
    return part


def _nested(of: Samples) -> object:
    if not of.metric.labels:
        return of.only()
    tree: dict[str, object] = {}
    for (*branches, leaf), value in of.values:
        at = tree
        for branch in branches:
            at = at.setdefault(branch, {})  # type: ignore[assignment]
        at[leaf] = value
    return tree


def listener_part(
    listener: Listener, families: list[str], entries: Iterable[Entry]
) -> ListenerPart:
    return {
        "name": listener.name,
        "bind": listener.bind,
        "port": listener.port,
        "families": families,
        "intercept": describe(listener.intercept) if listener.intercepts else "",
        "upstreams": [
            {
                "upstream": str(entry.upstream),
                "addresses": [
                    {"address": str(each.where), "health": each.health, "why": each.why}
                    for each in entry.addresses
                ],
                "error": entry.error,
            }
            for entry in entries
        ],
    }


def introduce(listener: Listener, families: list[str]) -> str:
    """What a listener does, for the log."""
    to = ", ".join(map(str, listener.upstream))
    if listener.bind:
        return f"{listener.name} listens on {Endpoint(listener.bind, listener.port)} for {to}"
    to = f", upstream {to}" if to else ""
    on = f"port {listener.port} ({' and '.join(families)})"
    return f"{listener.name} listens on {on} for {describe(listener.intercept)}{to}"


def describe(intercept: Intercept) -> str:
    """What a listener takes, in words: "every port but 15020-15021, 15090; from 10.0.0.0/8"."""
    text = "every port" if intercept.ports == EVERY_PORT else f"ports {_ports(intercept.ports)}"
    if intercept.exclude_ports:
        text += f" but {_ports(intercept.exclude_ports)}"
    if intercept.scope is Scope.FORWARD:
        text = f"forwarded, {text}"
    elif intercept.scope is Scope.OUTBOUND:
        text = f"outbound, {text}"
    elif intercept.via is Via.REDIRECT:
        text += "; by redirect"
    for word, items in (
        ("from", intercept.sources.networks),
        ("to", intercept.destinations.networks),
        ("not to", intercept.exclude_destinations.networks),
        ("arriving on", intercept.interfaces),
        ("not of uid", intercept.exclude_uids),
        ("not of gid", intercept.exclude_gids),
    ):
        if items:
            text += f"; {word} {', '.join(map(str, items))}"
    return text


def _ports(ranges: PortRanges) -> str:
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)


# Drawing ----------------------------------------------------------------------------------------


def draw(s: Snapshot, listing: Listing | None = None) -> str:
    """The screen of `tproxyd status`; what never happened is left out."""
    lines = [*_lines(s), *(_listed(listing) if listing is not None else ())]
    return "".join(f"{line}\n" for line in lines)


def _listed(listing: Listing) -> Iterator[str]:
    yield ""
    rows = listing["connections"]
    yield f"open connections: {len(rows)} of {listing['open']}, by {listing['sort']}"
    yield from silence(listing)
    if rows:
        head = ["ID", "LISTENER", "CLIENT", "VIA", "UPSTREAM", "AS", "STATE"]
        numbers = ["IN", "OUT", "RATE", "AGE", "IDLE", "RTT"]
        cells = [[*_names(row), *_numbers(row)] for row in rows]
        yield from columns([*head, *numbers], cells, range(len(head), len(head) + len(numbers)))


def silence(listing: Listing) -> list[str]:
    """Which workers did not tell of theirs."""
    return [f"  worker {pid} does not answer: its own are missing" for pid in listing["silent"]]


def _names(row: Row) -> list[str]:
    upstream, source = row["upstream"] or row["destination"] or "-", row["source"] or "-"
    return [
        *(row["id"], row["listener"], row["client"], row["peer"] or "-"),
        *(upstream, source, row["state"]),
    ]


def _numbers(row: Row) -> list[str]:
    return [
        *(figures.size(row["received"]), figures.size(row["sent"]), figures.rate(row["rate"])),
        *(figures.age(row["age_s"]), figures.age(row["idle_s"]), figures.rtt(row["rtt_us"])),
    ]


def _lines(s: Snapshot) -> Iterator[str]:
    state = "ready" if s["ready"] else "not ready"
    yield f"tproxyd {s['version']}, {state}, pid {s['pid']}, up {figures.duration(s['uptime_s'])}"
    yield from (f"  {reason}" for reason in s["not_ready_because"])
    if s["reload"]["error"]:
        yield f"  the reload of {s['reload']['last']} failed; the configuration of before goes on:"
        yield from (f"    {line}" for line in s["reload"]["error"].splitlines())
    yield ""
    kernel = s["kernel"]
    by = f", answers come home by {kernel['return_path']}" if kernel["return_path"] else ""
    ago = kernel["checked_s_ago"]
    yield f"kernel state: {kernel['state']}{by}{'' if ago is None else f' ({ago:.0f} s ago)'}"
    yield from (f"  {sentence}" for sentence in kernel["detail"])
    if kernel["trouble"]:
        yield f"  healing fails: {kernel['trouble']}"
    if (last := kernel["last_heal"]) is not None:
        whose = f", changed by {', '.join(last['by'])}" if last["by"] else ""
        took = f"{last['seconds'] * 1000:.0f} ms"
        yield f"  healed {kernel['heals']} times; last at {last['at']} in {took}{whose}:"
        yield from (f"    {sentence}" for sentence in last["wrong"])
    yield ""
    yield from columns(
        ["LISTENER", "PORT", "FAMILIES", "TAKES"],
        [
            [each["name"], f"{each['port']}", "+".join(each["families"]), takes(each)]
            for each in s["listeners"]
        ],
    )
    yield ""
    if rows := [row for each in s["listeners"] for row in upstreams(each)]:
        yield from columns(["LISTENER", "UPSTREAM", "ADDRESS", "HEALTH"], rows)
        yield ""
    yield from columns(
        ["WORKER", "PID", "STATE", "CONNECTIONS", "STARTED"],
        [
            [f"{w['slot']}", f"{w['pid'] or '-'}", w["state"], f"{w['active']}", w["started"]]
            for w in s["workers"]
        ],
    )
    yield ""
    connections = s["connections"]
    yield f"connections: {connections['active']} open, {connections['total']} ended"
    yield from _counts(connections["by_close_reason"])
    if (rates := s["rates"])["over_s"]:
        yield (
            f"in the last {rates['over_s']:.0f} s: {figures.number(rates['connections'])} new/s,"
            f" {figures.rate(rates['received'])} in, {figures.rate(rates['sent'])} out"
        )
    seconds = s["counters"][CONNECT_SECONDS.name]
    assert isinstance(seconds, dict)
    if seconds["count"]:
        mean = seconds["seconds"] / seconds["count"] * 1000
        yield ""
        yield f"upstream connect: {mean:.2f} ms on average"
    for metric in METRICS:
        value = s["counters"].get(metric.name)
        if metric is CONNECT_SECONDS or value is None:
            continue
        flat = dict(_flat(value, ()))
        if metric is HEADERS:  # a bare 1 beside the counts would read as one of them
            flat = {f"v{name}" if name[0].isdigit() else name: n for name, n in flat.items()}
        if any(flat.values()):
            yield ""
            name = metric.name.removeprefix("tproxyd_").replace("_", " ")
            if isinstance(value, int):
                yield f"{name}: {value}"
            else:
                yield f"{name}:"
                yield from _counts(flat)


def takes(listener: ListenerPart) -> str:
    text = listener["intercept"] or str(Endpoint(listener["bind"], listener["port"]))
    to = ", ".join(each["upstream"] for each in listener["upstreams"])
    return f"{text} → {to}" if to else text


def upstreams(listener: ListenerPart) -> Iterator[list[str]]:
    """A row for each address, and for what is wrong."""
    name, usable = listener["name"], False
    for each in listener["upstreams"]:
        if each["error"]:
            yield [name, each["upstream"], "-", f"can't be resolved: {each['error']}"]
        for address in each["addresses"]:
            down = address["health"] == Health.DOWN
            usable = usable or not down
            health = f"down: {address['why']}" if down else address["health"]
            yield [name, each["upstream"], address["address"], health]
    if listener["upstreams"] and not usable:
        yield [name, "-", "-", "none can be used: connections are refused"]


def _flat(value: object, path: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, (*path, key))
    else:
        assert isinstance(value, int)
        yield " ".join(path), value


def _counts(counts: dict[str, int]) -> Iterator[str]:
    shown = {name: count for name, count in counts.items() if count}
    names = max(map(len, shown), default=0)
    numbers = max((len(str(count)) for count in shown.values()), default=0)
    for name, count in shown.items():
        yield f"  {name:<{names}}  {count:>{numbers}}"
