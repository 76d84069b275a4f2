"""The upstreams of each listener: what is known about them, and what follows from it.

The facts are found by one process (proc/prober.py) and travel as one JSON line to the supervisor
(proc/upstreams.py), which logs what has changed, shows them, and gives the workers the picture: for
each listener that has a list, by its index in config.listeners, the addresses that may be used now.

An address is left out only where an active check says that it is down. A name that can't be
resolved keeps its last answer, and one that never had any has no addresses: "no answer" is never
read as "no upstreams". Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from tproxyd.addr import Endpoint, is_name
from tproxyd.config import Config, Listener

Picture = dict[int, tuple[Endpoint, ...]]

NOT_YET = "no answer yet"


class Health(StrEnum):
    UP = "up"
    DOWN = "down"
    UNCHECKED = "unchecked"  # there are no checks, or none has ended yet


@dataclass(frozen=True, slots=True)
class Address:
    where: Endpoint
    health: Health = Health.UNCHECKED
    why: str = ""  # it is down


@dataclass(frozen=True, slots=True)
class Entry:
    """One upstream as the configuration has it, and the addresses that it stands for."""

    upstream: Endpoint
    addresses: tuple[Address, ...] = ()
    error: str = ""  # of a name: why it has no answer, or why the addresses are an earlier one


@dataclass(frozen=True, slots=True)
class Facts:
    entries: dict[int, tuple[Entry, ...]] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)  # attempts to resolve a name
    complete: bool = True  # every name was tried, and everything that is checked was checked


def initial(config: Config, before: tuple[Config, Facts] | None = None) -> Facts:
    """What the configuration alone says. Complete where it leaves nothing to find out.

    What was known `before` a reload goes on: a name that can't be resolved just then keeps its
    addresses, what was down is not tried by clients first, and no count goes back.
    """
    lists = {i: each for i, each in enumerate(config.listeners) if each.upstream}
    known = _known(*before) if before is not None else {}
    return Facts(
        entries={
            i: tuple(_entry(each, listener, known) for each in listener.upstream)
            for i, listener in lists.items()
        },
        failures={i: known.get(listener.name, ({}, 0))[1] for i, listener in lists.items()},
        complete=not any(
            listener.health_check.interval_s or any(map(is_name, listener.upstream))
            for listener in lists.values()
        ),
    )


_Known = dict[str, tuple[dict[Endpoint, Entry], int]]  # by the name of the listener; its failures


def _known(config: Config, facts: Facts) -> _Known:
    return {
        config.listeners[i].name: ({each.upstream: each for each in entries}, facts.failures[i])
        for i, entries in facts.entries.items()
    }


def _entry(upstream: Endpoint, listener: Listener, known: _Known) -> Entry:
    entry = known.get(listener.name, ({}, 0))[0].get(upstream)
    if entry is None:
        if is_name(upstream):
            return Entry(upstream, error=NOT_YET)
        return Entry(upstream, (Address(upstream),))
    if listener.health_check.interval_s:
        return entry
    return replace(entry, addresses=tuple(Address(each.where) for each in entry.addresses))


def picture(facts: Facts) -> Picture:
    return {i: usable(entries) for i, entries in facts.entries.items()}


def usable(entries: tuple[Entry, ...]) -> tuple[Endpoint, ...]:
    """In the configured order, each once."""
    return tuple(where for where, each in distinct(entries).items() if each.health != Health.DOWN)


def distinct(entries: tuple[Entry, ...]) -> dict[Endpoint, Address]:
    return {each.where: each for entry in entries for each in entry.addresses}


# Over the socket ----------------------------------------------------------------------------------


def encode(facts: Facts) -> str:
    return json.dumps(asdict(facts))


def decode(line: bytes) -> Facts:
    data = json.loads(line)
    return Facts(
        entries={
            int(i): tuple(
                Entry(
                    Endpoint(*entry["upstream"]),
                    tuple(
                        Address(Endpoint(*each["where"]), Health(each["health"]), each["why"])
                        for each in entry["addresses"]
                    ),
                    entry["error"],
                )
                for entry in entries
            )
            for i, entries in data["entries"].items()
        },
        failures={int(i): count for i, count in data["failures"].items()},
        complete=data["complete"],
    )


def word(picture: Picture) -> str:
    """What a running worker is told: "upstreams " and JSON, {"0": [["10.0.0.5", 80], …], …}."""
    return "upstreams " + json.dumps(picture, separators=(",", ":"))


# For the log --------------------------------------------------------------------------------------


def changes(names: list[str], before: Facts, after: Facts) -> Iterator[tuple[bool, str]]:
    """One sentence per change of state, and whether it is a bad one. `names` are the listeners'."""
    for i, entries in after.entries.items():
        known = before.entries[i]
        said = (*_resolving(known, entries), *_health(known, entries))
        for bad, text in dict.fromkeys(said):  # a name may stand there with two ports
            yield bad, f"{names[i]}: {text}"
        if usable(known) and not usable(entries):
            yield True, f"{names[i]}: no upstream is left; its connections are refused"


def _resolving(before: tuple[Entry, ...], after: tuple[Entry, ...]) -> Iterator[tuple[bool, str]]:
    for old, new in zip(before, after, strict=True):
        name = new.upstream.host
        failed = old.error not in ("", NOT_YET)
        if new.error and not failed and new.error != NOT_YET:
            if new.addresses:
                then = "the last answer stays"
            elif usable(after):
                then = "the other upstreams serve until it can"
            else:
                then = "connections are refused until it can"
            yield True, f"{name} can't be resolved: {new.error}; {then}"
        elif failed and not new.error:
            hosts = ", ".join(each.where.host for each in new.addresses)
            yield False, f"{name} is resolved again: {hosts}"


def _health(before: tuple[Entry, ...], after: tuple[Entry, ...]) -> Iterator[tuple[bool, str]]:
    known = distinct(before)
    for entry in after:
        for new in entry.addresses:
            old = known.get(new.where, Address(new.where))
            if new.health == old.health:
                continue
            of = f" of {entry.upstream}" if is_name(entry.upstream) else ""
            if new.health == Health.DOWN:
                yield True, f"{new.where}{of} is down: {new.why}"
            elif old.health == Health.DOWN:
                yield False, f"{new.where}{of} is up again"
