"""A Config as istio-iptables could be told it: `scheme = "istio"` in a file.

That tool knows one way in and one way out. What a Config says beyond that is refused, by its path,
and never left out. Pure.
"""

from __future__ import annotations

from dataclasses import replace

from tproxyd.addr import IPNetwork
from tproxyd.config import Config, Intercept, Listener, ReturnPath, Scope, Via
from tproxyd.errors import KernelError
from tproxyd.istio.options import ALL, All, IstioOptions, Mode, Ports
from tproxyd.reader import EVERY_PORT, PortRanges

_HINT = 'use scheme = "lean", which can'


def istio_options(config: Config, *, ipv6: bool) -> IstioOptions:
    """KernelError for what cannot be said so."""
    inbound = _one(config, Scope.LOCAL)
    outbound = _one(config, Scope.OUTBOUND)
    if any(each.intercepts and each.intercept.scope is Scope.FORWARD for each in config.listeners):
        raise _refused("connections that only pass through this host")
    if config.rules.return_path is ReturnPath.ACCEPT_MARK:
        raise _refused('return_path = "accept-mark"')
    options = IstioOptions(mark=config.mark, table=config.table, ipv6=ipv6)
    return _with_outbound(_with_inbound(options, config, inbound), outbound)


def _one(config: Config, scope: Scope) -> Listener | None:
    found = [each for each in config.listeners if each.intercepts and each.intercept.scope is scope]
    if len(found) > 1:
        names = " and ".join(each.name for each in found)
        raise _refused(f'two listeners with scope = "{scope}": {names}')
    return found[0] if found else None


def _refused(what: str) -> KernelError:
    return KernelError("say it as istio-iptables does", f"it has no {what}", _HINT)


def _with_inbound(options: IstioOptions, config: Config, listener: Listener | None) -> IstioOptions:
    if listener is None:
        return options
    take = listener.intercept
    _without(take, "sources", "destinations", "exclude_destinations", "interfaces")
    ordinary = [(each.port, each.port) for each in config.listeners if not each.intercepts]
    excluded = (*_ports(take.exclude_ports), *ordinary)
    return replace(
        options,
        mode=Mode.TPROXY if take.via is Via.TPROXY else Mode.REDIRECT,
        inbound_port=listener.port,
        inbound_ports=_all_or(take.ports),
        inbound_exclude_ports=excluded,
    )


def _with_outbound(options: IstioOptions, listener: Listener | None) -> IstioOptions:
    if listener is None:
        return options
    take = listener.intercept
    _without(take, "sources", "interfaces")
    if not take.exclude_uids and not take.exclude_gids:
        why = f"listener {listener.name} does not say as whom this proxy runs"
        hint = (
            "intercept.exclude_uids = [1337], and run as that user: istio's rules know it by that"
        )
        raise KernelError("say it as istio-iptables does", why, hint)
    ranges = take.destinations.networks
    if take.ports != EVERY_PORT:
        if ranges:
            raise _refused("outbound ports within destinations")
        return _out(options, listener, (), take.ports)
    return _out(options, listener, ranges or ALL, ())


def _out(
    options: IstioOptions,
    listener: Listener,
    ranges: tuple[IPNetwork, ...] | All,
    ports: PortRanges,
) -> IstioOptions:
    take = listener.intercept
    return replace(
        options,
        proxy_port=listener.port,
        outbound_ranges=ranges,
        outbound_ports=_ports(ports),
        outbound_exclude_ranges=take.exclude_destinations.networks,
        outbound_exclude_ports=_ports(take.exclude_ports),
        proxy_uids=take.exclude_uids,
        proxy_gids=take.exclude_gids,
    )


def _without(take: Intercept, *keys: str) -> None:
    for key in keys:
        if getattr(take, key):
            raise _refused(f'intercept.{key} for scope = "{take.scope}"')


def _all_or(ports: PortRanges) -> Ports | All:
    return ALL if ports == EVERY_PORT else _ports(ports)


def _ports(ports: PortRanges) -> Ports:
    return tuple(ports)
