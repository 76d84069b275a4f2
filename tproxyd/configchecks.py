"""What only makes sense across the values of a configuration, once they stand. Pure.

Only what is wrong for certain: whose address an upstream's is, say, only the host knows.
"""

from __future__ import annotations

from tproxyd.addr import PrefixSet
from tproxyd.config import Config, Intercept, Listener, ProxyProtocol
from tproxyd.errors import Problem
from tproxyd.reader import PortRanges


def across(config: Config) -> list[Problem]:
    """What is wrong with listeners beside each other, or beside the rest."""
    problems: list[Problem] = []
    names: dict[str, int] = {}
    for i, listener in enumerate(config.listeners):
        first = names.setdefault(listener.name, i)
        if first != i:
            text = f'"{listener.name}" is also the name of listener[{first}]'
            problems.append(Problem(f"listener[{i}].name", text))
        for j, other in enumerate(config.listeners[:i]):
            if other.port == listener.port and not _apart(other.bind, listener.bind):
                text = f"{listener.port} is also the port of listener[{j}]"
                problems.append(Problem(f"listener[{i}].port", text))
                break
        if (
            config.admin is not None
            and config.admin.port == listener.port
            and not _apart(config.admin.host, listener.bind)
        ):
            text = f"{listener.port} is the admin port too; change one of them"
            problems.append(Problem(f"listener[{i}].port", text))
        for j, other in enumerate(config.listeners):
            for upstream in listener.upstream:
                if upstream.port == other.port and _comes_to(upstream.host, other.bind):
                    text = (
                        f'"{upstream}" is listener[{j}] itself: it would be called by us, for ever'
                    )
                    problems.append(Problem(f"listener[{i}].upstream", text))
    if config.table in (253, 254, 255):
        text = f"{config.table} is one of the kernel's own tables (default, main, local)"
        problems.append(Problem("table", text))
    return problems


def _comes_to(host: str, bind: str) -> bool:
    """Whether what connects to that address comes, for certain, to a listener that is bound so."""
    if host in ("127.0.0.1", "::1") and bind in ("", "*", "::" if ":" in host else "0.0.0.0"):
        return True
    return host == bind


def _apart(one: str, other: str) -> bool:
    """Whether two can listen on the same port at these addresses."""
    every = ("", "*", "0.0.0.0", "::")
    return one != other and one not in every and other not in every


# What the first match leaves ----------------------------------------------------------------------


def never_reached(config: Config) -> list[Problem]:
    """Listeners and entries of trust lists that no connection comes to."""
    problems: list[Problem] = []
    for i, listener in enumerate(config.listeners):
        for j, other in enumerate(config.listeners[:i]):
            if _leaves_nothing(other, listener):
                text = f"listener[{j}], which comes first, takes all of that"
                problems.append(Problem(f"listener[{i}].intercept", text))
                break
        problems += _judged_before(f"listener[{i}].proxy_protocol", listener.proxy_protocol)
    return problems


def open_ports(take: Intercept) -> PortRanges:
    """Its ports but those that it excludes."""
    left: list[tuple[int, int]] = []
    for low, high in take.ports:
        for first, last in take.exclude_ports:
            if low <= last and first <= high:
                if low < first:
                    left.append((low, first - 1))
                low = last + 1
        if low <= high:
            left.append((low, high))
    return tuple(left)


def _leaves_nothing(first: Listener, then: Listener) -> bool:
    """Whether what `then` would take is all taken by `first`."""
    one, other = first.intercept, then.intercept
    return (
        first.intercepts
        and then.intercepts
        and one.scope is other.scope
        and all(_within(each, open_ports(one)) for each in open_ports(other))
        and _within_limit(other.sources, one.sources)
        and _within_limit(other.destinations, one.destinations)
        and other.exclude_destinations.covers(one.exclude_destinations)
        and (not one.interfaces or set() < {*other.interfaces} <= {*one.interfaces})
        and {*one.exclude_uids} <= {*other.exclude_uids}
        and {*one.exclude_gids} <= {*other.exclude_gids}
    )


def _within(ports: tuple[int, int], ranges: PortRanges) -> bool:
    return any(low <= ports[0] and ports[1] <= high for low, high in ranges)


def _within_limit(some: PrefixSet, limit: PrefixSet) -> bool:
    """Where an empty set is no limit."""
    return not limit or (bool(some) and limit.covers(some))


def _judged_before(path: str, entries: tuple[ProxyProtocol, ...]) -> list[Problem]:
    """Peers of whom an earlier entry says something else."""
    problems: list[Problem] = []
    for j, entry in enumerate(entries):
        for peers in entry.peers.networks:
            for i, other in enumerate(entries[:j]):
                if other.peers.covers(PrefixSet([peers])):
                    if other.policy is not entry.policy:
                        text = f"{path}[{i}], which comes first, has {other.policy} for {peers}"
                        problems.append(Problem(f"{path}[{j}].from", text))
                    break
    return problems
