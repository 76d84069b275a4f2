"""What is tried for real: connections, some of them as a client that does not exist."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
from collections.abc import Iterator
from pathlib import Path

from tproxyd.addr import Client, Endpoint, Upstream, is_name, is_unix
from tproxyd.config import Config, Listener, ReturnPath
from tproxyd.doctor.check import Check, Patient, Verdict
from tproxyd.flow.connect import Sockets
from tproxyd.flow.listen import endpoint, has_ipv6
from tproxyd.flow.policy import Plan
from tproxyd.kernel import others
from tproxyd.kernel.firewall import Family
from tproxyd.linux import CAP_NET_RAW, AddressKinds, capabilities

_HERE_S = 1.0  # all of it stays on this host: tens of microseconds when it works
# To another host: two SYNs and a half, were the first one lost.
_THERE_S = 2.0
_CLIENTS = {False: "192.0.2.1", True: "2001:db8::1"}  # RFC 5737, RFC 3849: nobody has them


def way_home(patient: Patient) -> Iterator[Check]:
    """As a client to a socket of our own: the second half of an intercepted connection's way.

    Nothing of it can leave this host, unless the way back is broken, which is what it then says.
    It goes over lo, which the rules that intercept pass over: it does not show that they do.
    """
    if not _can_try(patient) or not patient.dials_here:
        return
    for v6, client in _CLIENTS.items():
        if v6 and not has_ipv6():
            continue
        name = f"way home IPv{6 if v6 else 4}"
        own = _own_address(v6)
        if own is None:
            detail = "not tried: this host has no address but loopback ones"
            yield Check(name, Verdict.WARN, detail, "give an interface an address, then try again")
            continue
        try:
            seen = _to_ourselves(Endpoint(client, 0), own, patient.config)
        except OSError as error:
            why, remedy = _broken(patient, client, own)
            detail = f"as {client} to {own}: {error.strerror or error}; {why}"
            yield Check(name, Verdict.FAIL, detail, remedy)
        else:
            yield Check(name, Verdict.OK, f"connected as {client}; the far end saw {seen}")


def _broken(patient: Patient, client: str, own: str) -> tuple[str, str]:
    """Why the way home is broken, and what to do: first what is ours, then what is others'."""
    config = patient.config
    version: Family = 6 if ":" in client else 4
    look = f"look at: ip route get {client} from {own} mark {config.mark:#x}; nft list ruleset"
    if patient.unreadable:
        return "the kernel state is unknown", "see rules, above"
    if patient.differs:
        return "the kernel state is not as configured", f"see rules, above: {patient.put_right}"
    with contextlib.suppress(OSError):
        if patient.return_path is ReturnPath.CONNTRACK and not others.has_route(client, own):
            return (
                "by conntrack there must be some route toward clients, and there is none",
                f"a default route is enough; look at: ip route get {client}",
            )
        if astray := others.astray(client, own, config.mark, config.table):
            why = f"answers are routed {astray}, not by table {config.table}"
            return why, f"see clashes, above; {look}" if patient.clashes else look
        if droppers := others.droppers(version):
            can = ", ".join(each.what for each in droppers)
            why = f"rules and routes are right, so a firewall drops it; these can: {can}"
            remedies = "; ".join(each.remedy for each in droppers)
            return why, f"let pass what goes over lo: {remedies}"
    return "rules and routes are right, and nothing was found that drops it", look


def names(patient: Patient) -> Iterator[Check]:
    """What the upstreams that are names stand for, as this process sees it."""
    for listener in patient.config.listeners:
        for upstream in filter(is_name, listener.upstream):
            about = f"name {upstream.host}"
            try:
                found = sorted(resolve(upstream.host, upstream.port))
            except OSError as error:
                remedy = "look at: getent ahosts " + upstream.host + ", /etc/resolv.conf"
                yield Check(about, Verdict.FAIL, f"{error.strerror or error}", remedy)
            else:
                yield Check(about, Verdict.OK, ", ".join(each.host for each in found))


def backends(patient: Patient) -> Iterator[Check]:
    """Whether upstreams answer; those that are to see the client, whether through this host."""
    with contextlib.closing(AddressKinds()) as kinds:
        for listener in patient.config.listeners:
            for upstream in map(Upstream, _addresses(listener)):
                name = f"{listener.name} {upstream}"
                if not listener.spoofs or kinds.kind(upstream.host) == "own":
                    yield _answering(upstream, name, patient.config)
                elif _can_try(patient):
                    yield _answering_clients(upstream, name, patient.config)


def _addresses(listener: Listener) -> Iterator[Endpoint]:
    for upstream in listener.upstream:
        if is_name(upstream):
            with contextlib.suppress(OSError):  # `names` says so
                yield from sorted(resolve(upstream.host, upstream.port))
        else:
            yield upstream


def _answering(upstream: Upstream, name: str, config: Config) -> Check:
    answer, _ = _connect(upstream, "", config)
    if answer == 0:
        return Check(name, Verdict.OK, "answers")
    return Check(name, Verdict.WARN, f"does not answer: {os.strerror(answer)}", "start the backend")


def _answering_clients(upstream: Upstream, name: str, config: Config) -> Check:
    client = _CLIENTS[upstream.is_v6]
    answer, _ = _connect(upstream, client, config)
    if answer == 0:
        return Check(name, Verdict.OK, f"answered {client}, and its answer came home")
    if answer == errno.ECONNREFUSED:
        return Check(
            name,
            Verdict.WARN,
            f"refused {client}; but its answer came home",
            "start the backend, or look at its firewall",
        )
    own_answer, own = _connect(upstream, "", config)
    if own_answer:
        return Check(
            name,
            Verdict.FAIL,
            f"does not answer this host either: {os.strerror(own_answer)}",
            f"start the backend; look at: ip route get {upstream.host}, ping {upstream.host}",
        )
    return Check(
        name,
        Verdict.FAIL,
        f"answers {own}, but as {client}: {os.strerror(answer)}; answers to clients take another"
        " way, or are dropped",
        f"route clients through this host on the backend: ip route add CLIENTS via {own}; in a"
        ' cloud also switch off the source check of this host; or source = "proxy" with send_proxy',
    )


def resolve(host: str, port: int) -> set[Endpoint]:
    """Every address of a name. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {endpoint(address) for *_, address in found}


def _can_try(patient: Patient) -> bool:
    return (patient.installed or patient.unreadable is not None) and CAP_NET_RAW in capabilities()


# Trying -------------------------------------------------------------------------------------------


def _connect(upstream: Upstream, client: str, config: Config) -> tuple[int, str]:
    """Connect there, as a client or ("") as ourselves: errno, and the address that we had."""
    plan = Plan(Client(Endpoint(client, 0)), upstream, spoof=bool(client), here=False)
    own_mark = config.listener_mark if config.outbound else 0
    with contextlib.ExitStack() as stack:
        sockets = Sockets(config.mark, own_mark)
        stack.callback(sockets.finish)
        try:
            sock = sockets.upstream_socket(plan)
            stack.callback(sock.close)
            if client:
                sock.bind((client, 0))
            code = sock.connect_ex(upstream.host if is_unix(upstream) else upstream)
            if code == errno.EINPROGRESS:
                waiting = select.poll()
                waiting.register(sock, select.POLLOUT)
                ready = waiting.poll(_THERE_S * 1000)
                code = errno.ETIMEDOUT
                if ready:
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return code, "" if is_unix(upstream) else str(sock.getsockname()[0])
        except OSError as error:
            return error.errno or errno.EIO, ""


def _to_ourselves(client: Endpoint, own: str, config: Config) -> Endpoint:
    """Who a listener on `own` sees when we connect to it as `client`. Raises OSError."""
    family = socket.AF_INET6 if client.is_v6 else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.bind((own, 0))
        listener.listen(1)
        listener.settimeout(_HERE_S)
        there = Upstream(Endpoint(*listener.getsockname()[:2]))
        sockets = Sockets(config.mark)
        stack.callback(sockets.finish)
        spoofed = sockets.upstream_socket(Plan(Client(client), there, spoof=True))
        stack.callback(spoofed.close)
        spoofed.bind(client)
        code = spoofed.connect_ex(there)
        if code != errno.EINPROGRESS:
            raise OSError(code, os.strerror(code))
        try:
            accepted, address = listener.accept()
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "no answer came back") from None
        accepted.close()
        return Endpoint(address[0], address[1])


def _own_address(v6: bool) -> str | None:
    """An address of this host that is not loopback or link-local."""
    path = "/proc/net/if_inet6" if v6 else "/proc/net/fib_trie"
    with contextlib.suppress(OSError):
        text = Path(path).read_text()
        if v6:  # 32 digits, index, length, scope (00: global), flags, name
            for line in text.splitlines():
                digits, _, _, scope, *_ = line.split()
                if scope == "00":
                    return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
        else:  # "|-- 10.9.1.1" and in the next line "/32 host LOCAL"
            for found in re.findall(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL", text):
                if not found.startswith("127."):
                    return str(found)
    return None
