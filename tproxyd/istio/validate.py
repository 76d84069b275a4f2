"""A connection through the rules, tried for real, before anybody depends on them.

In full it is the way of every connection of the pod, with this program as the proxy and as the
application: a client that does not exist comes over a wire (wire.py), the rules hand it to our
listener with the destination that it asked for, we connect to the application as that client, and
what the application says arrives at the client. What can be done depends on what we may do:

- wire, with CAP_NET_ADMIN and CAP_NET_RAW: all of it.
- lo, with CAP_NET_RAW, TPROXY: the client is a call of the proxy's own to this host, which the
  rules know by its mark and hand over likewise; then the spoofed connection, and its answer.
- nat, as the user of the proxy, without any capability: what istio-iptables itself does. A
  connection to 127.0.0.6 must arrive at the inbound port. It shows that the nat rules stand, in
  TPROXY mode too, and nothing of what is special there.

The proxy must not run yet: its port is ours for a moment.

One thing is measured that no rule says: in TPROXY mode the proxy may run in the group of -g, but
not as the user of -u. What that user sends to this host is redirected (nat ISTIO_OUTPUT, for calls
of a service to itself), and so is its connection to the application. Istio's own proxy runs as root
in the group 1337 then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from tproxyd.addr import Endpoint
from tproxyd.errors import TproxydError
from tproxyd.flow.origdst import redirected_destination
from tproxyd.istio.options import (
    ALL,
    OUTBOUND_MARK,
    PASSTHROUGH_V4,
    PASSTHROUGH_V6,
    IstioOptions,
    Mode,
)
from tproxyd.istio.wire import HERE, THERE, FarClient, Wire
from tproxyd.linux import (
    CAP_NET_ADMIN,
    CAP_NET_RAW,
    IP_TRANSPARENT,
    IPV6_FREEBIND,
    IPV6_TRANSPARENT,
    SO_MARK,
    capabilities,
)

# All of it stays on this host: a working one takes a few milliseconds.
_ATTEMPT_S = 1.0
_PAUSE_S = 0.1  # a CNI plugin may be about to write the rules
_WORDS = b"tproxyd"


class Invalid(TproxydError):
    """The rules don't do what they are for, or it can't be found out."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(f"can't validate the interception: {why}; {hint}")


class _Failed(Exception):
    """An attempt: what went wrong."""


class _Client(Protocol):
    address: Endpoint

    def connect(self, where: Endpoint, until: float) -> None: ...

    def receive(self, until: float) -> bytes: ...

    def close(self) -> None: ...


class _Way(NamedTuple):
    """One way to come in."""

    name: str
    host: dict[bool, str]  # of the destination, by whether it is IPv6
    client: Callable[[bool], _Client]
    home: bool  # whether the second half follows: the connection to the application


def validate(options: IstioOptions, *, port: int, timeout_s: float) -> Iterator[str]:
    """What was tried and found, a sentence for each family. Raises Invalid."""
    if not options.captures_inbound:
        yield "nothing inbound is intercepted: there is no connection to try"
        return
    port = captured_port(options, port)
    with contextlib.ExitStack() as stack:
        way = _best_way(options, stack)
        if not way.host:
            why = "this host has no address but loopback ones"
            raise Invalid(why, "give it one, or the validation CAP_NET_ADMIN and CAP_NET_RAW")
        for v6 in (False, True) if options.ipv6 else (False,):
            if v6 in way.host:
                until = time.monotonic() + timeout_s
                yield _until(until, options, way, v6, Endpoint(way.host[v6], port))
            else:
                yield f"IPv{6 if v6 else 4}: not tried: this host has no such address"


def _best_way(options: IstioOptions, stack: contextlib.ExitStack) -> _Way:
    able = capabilities()
    if {CAP_NET_ADMIN, CAP_NET_RAW} <= able:
        with contextlib.suppress(OSError):  # a kernel without veth
            stack.enter_context(Wire(options.ipv6))
            return _Way("over a wire", HERE, FarClient, home=True)
    if CAP_NET_RAW in able and options.mode is Mode.TPROXY:
        own = {v6: host for v6 in (False, True) if (host := _own_address(v6))}
        return _Way("over lo, as a call of the proxy's", own, _self_call, home=True)
    # Calls through lo of all others are left alone, before any other user or group is asked for.
    if os.geteuid() == options.proxy_uids[0]:
        hosts = {False: PASSTHROUGH_V4, True: PASSTHROUGH_V6}
        return _Way("over lo, by nat only", hosts, _loopback_call, home=False)
    raise Invalid(
        "it needs CAP_NET_ADMIN and CAP_NET_RAW, or to run as the user of the proxy",
        f"runAsUser: {options.proxy_uids[0]}, or add the two capabilities",
    )


def _until(until: float, options: IstioOptions, way: _Way, v6: bool, destination: Endpoint) -> str:
    """Try until it works; Invalid with the last failure."""
    while True:
        attempt_until = min(until, time.monotonic() + _ATTEMPT_S)
        try:
            found = _attempt(options, way, v6, destination, attempt_until)
        except _Failed as failed:
            if time.monotonic() + _PAUSE_S >= until:
                raise Invalid(
                    f"IPv{6 if v6 else 4}, {way.name}: {failed}", _hint(options)
                ) from None
            time.sleep(_PAUSE_S)
        else:
            return f"IPv{6 if v6 else 4}, {way.name}: {found}"


def _attempt(
    options: IstioOptions, way: _Way, v6: bool, destination: Endpoint, until: float
) -> str:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(options, v6))
        client = stack.enter_context(contextlib.closing(way.client(v6)))
        try:
            client.connect(destination, until)
            accepted = stack.enter_context(_accept(listener, until))
        except OSError as error:
            text = f"a connection to {destination} did not reach port {options.inbound_port}"
            raise _Failed(f"{text}: {_why(error)}") from None
        asked = _asked(accepted, options.inbound_port)
        if asked != destination:
            raise _Failed(f"a connection to {destination} arrived as one to {asked}")
        peer = Endpoint(*accepted.getpeername()[:2])
        if peer != client.address:
            raise _Failed(f"a connection of {client.address} arrived as one of {peer}")
        found = f"{client.address.host} reached port {options.inbound_port}, asking for {asked}"
        if not way.home:
            return found
        spoofed = options.mode is Mode.TPROXY
        source = THERE[v6] if spoofed else PASSTHROUGH_V6 if v6 else PASSTHROUGH_V4
        seen = _through(options, accepted, Endpoint(source, 0), destination.host, until)
        try:
            if client.receive(until) != _WORDS:
                raise _Failed("other bytes than were sent came back to the client")
        except OSError:
            raise _Failed("the proxy's answer did not come back to the client") from None
        return f"{found}; the application saw {seen}, and its answer came back"


def _through(
    options: IstioOptions, accepted: socket.socket, source: Endpoint, host: str, until: float
) -> str:
    """The proxy's second half: connect to the application as `source`, and pass its words on.

    On any port: the rules know these packets by their mark, or their source.
    """
    with contextlib.ExitStack() as stack:
        application = stack.enter_context(socket.create_server((host, 0), family=accepted.family))
        upstream = stack.enter_context(socket.socket(accepted.family, socket.SOCK_STREAM))
        if options.mode is Mode.TPROXY:
            _make_transparent(upstream)
            upstream.setsockopt(socket.SOL_SOCKET, SO_MARK, options.mark)
        elif accepted.family == socket.AF_INET6:
            upstream.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        upstream.bind(source)
        try:
            upstream.settimeout(_left(until))
            upstream.connect(application.getsockname()[:2])
            served = stack.enter_context(_accept(application, until))
            served.send(_WORDS)
            accepted.send(upstream.recv(len(_WORDS)))
        except OSError as error:
            raise _Failed(
                f"the proxy could not connect to the application as {source.host}: {_why(error)}"
            ) from None
        return str(served.getpeername()[0])


def _hint(options: IstioOptions) -> str:
    if options.mode is Mode.TPROXY and os.geteuid() in options.proxy_uids:
        return (
            f"what user {os.geteuid()} sends to this host is redirected in TPROXY mode;"
            f" run as another user of group {options.proxy_gids[0]}"
        )
    return "compare: istio-iptables --dry-run, iptables-save, nft list ruleset, ip rule"


def _listener(options: IstioOptions, v6: bool) -> socket.socket:
    family = socket.AF_INET6 if v6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if options.mode is Mode.TPROXY and CAP_NET_RAW in capabilities():
            _make_transparent(sock)
        sock.bind(("::" if v6 else "0.0.0.0", options.inbound_port))
        sock.listen()
    except OSError as error:
        sock.close()
        hint = (
            f"validate before the proxy runs; who has it: ss -ltnp sport = :{options.inbound_port}"
        )
        raise Invalid(f"port {options.inbound_port}: {error.strerror}", hint) from None
    return sock


def _make_transparent(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)


def _asked(accepted: socket.socket, inbound_port: int) -> Endpoint:
    """The original destination; nat has to be asked for it."""
    local = Endpoint(*accepted.getsockname()[:2])
    return local if local.port != inbound_port else redirected_destination(accepted)


def _accept(listener: socket.socket, until: float) -> socket.socket:
    listener.settimeout(_left(until))
    accepted, _ = listener.accept()
    accepted.settimeout(_left(until))
    return accepted


def _why(error: OSError) -> str:
    return "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)


def _left(until: float) -> float:
    return max(0.001, until - time.monotonic())


def captured_port(options: IstioOptions, port: int) -> int:
    """A port that the rules take: `port` if they do."""
    ranges = options.inbound_list
    if options.inbound_ports is ALL:
        ranges = ((port, 65535), (1, 65535))
    elif any(low <= port <= high for low, high in ranges):
        ranges = ((port, port), *ranges)
    left_alone = (options.tunnel_port, options.inbound_port)
    for low, high in ranges:
        for each in range(low, high + 1):
            excluded = any(a <= each <= b for a, b in options.inbound_exclude_ports)
            if not excluded and each not in left_alone:
                return each
    raise Invalid("every port is excluded", "look at -b and -d")


# Clients with an ordinary socket ----------------------------------------------------------------


class _SocketClient:
    def __init__(self, v6: bool, mark: int, host: str) -> None:
        self._sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
        if mark:
            self._sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        self._sock.bind((host, 0))
        self.address = Endpoint(*self._sock.getsockname()[:2])

    def connect(self, where: Endpoint, until: float) -> None:
        self._sock.settimeout(_left(until))
        self._sock.connect(where)

    def receive(self, until: float) -> bytes:
        self._sock.settimeout(_left(until))
        return self._sock.recv(len(_WORDS))

    def close(self) -> None:
        self._sock.close()


def _self_call(v6: bool) -> _SocketClient:
    return _SocketClient(v6, OUTBOUND_MARK, _own_address(v6) or "")


def _loopback_call(v6: bool) -> _SocketClient:
    return _SocketClient(v6, 0, "::1" if v6 else "127.0.0.1")


def _own_address(v6: bool) -> str | None:
    """The address that this host would have toward others; nothing is sent."""
    with contextlib.suppress(OSError):
        family = socket.AF_INET6 if v6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((THERE[v6], 9))
            return str(probe.getsockname()[0])
    return None
