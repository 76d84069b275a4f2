"""Interception is the same whoever holds the packet rules, and by the rules of istio-iptables.

But for what those rules cannot do, and for what iptables cannot: a client is not refused while
nobody listens, it waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from lib.backends import BACKENDS, dump, rules
from lib.daemon import Daemon, tproxyd
from lib.headers import v1
from lib.netns import Namespace
from lib.processes import is_gone
from lib.streams import assert_talks
from lib.topology import PORT, V4, V6, Family, Pair, Topology, seen_port
from lib.waits import wait_for

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
schemes = pytest.mark.parametrize("scheme", ["lean", "istio"])
SHORT_S = 0.5  # for what is expected not to come


def outcome(net: Topology, family: Family = V4) -> str:
    """What becomes of a client: "refused", "silence", or "an answer"."""
    with contextlib.closing(net.client.open_socket(10 if family is V6 else 2)) as sock:
        sock.settimeout(SHORT_S)
        try:
            sock.connect((family.pod, PORT))
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"
        return "an answer"


@schemes
def test_application_sees_the_client(
    net: Topology, family: Family, backend: str, scheme: str
) -> None:
    with Daemon(net.pod, rules(backend, scheme)):
        for _ in range(3):
            pair = net.pair(family)
            assert_talks(pair)
            port = pair.client.getsockname()[1]
            assert pair.app.getpeername()[:2] == (family.client, seen_port(port))


@schemes
def test_application_sees_who_a_header_names(
    net: Topology, family: Family, backend: str, scheme: str
) -> None:
    trust = "[[listener]]\n[[listener.proxy_protocol]]\n"
    trust += 'from = ["10.9.1.0/24", "fd00:9:1::/64"]\npolicy = "require"\n'
    # An answer is routed before it gets the mark of its connection: some route there must be.
    net.pod.ip(f"route add default via {family.client}")
    with Daemon(net.pod, rules(backend, scheme) + trust):
        net.app(family)
        client = net.connect(family)
        client.sendall(v1(family.stranger, family.pod))
        app = net.accept(family)
        assert app.getpeername()[0] == family.stranger
        assert_talks(Pair(client, app))


@schemes
def test_a_connection_that_is_older(
    net: Topology, family: Family, backend: str, scheme: str
) -> None:
    """Those of istio-iptables hand it to xt_TPROXY, which drops it; nft's tproxy lets it pass."""
    lives = scheme == "lean" or backend == "nft"
    old = net.pair(family)
    with Daemon(net.pod, "drain_timeout_s = 0.1\n" + rules(backend, scheme)) as daemon:
        old.client.settimeout(SHORT_S)
        old.app.settimeout(SHORT_S)
        if lives:
            assert_talks(old)
            assert_talks(net.pair(family))
            assert daemon.stop(timeout=20) == 0
            assert_talks(old)
        else:
            with pytest.raises((TimeoutError, ConnectionError)):
                assert_talks(old)


@pytest.mark.parametrize(("scheme", "works"), [("lean", True), ("istio", False)])
def test_syn_cookies(net: Topology, family: Family, backend: str, scheme: str, works: bool) -> None:
    net.pod.sysctl("net/ipv4/tcp_syncookies", 2)
    net.app(family)
    with Daemon(net.pod, rules(backend, scheme)):
        if works:
            pair = net.pair(family)
            assert_talks(pair)
            assert pair.app.getpeername()[0] == family.client
        else:
            assert not _gets_through(net, family)


@pytest.mark.parametrize(("scheme", "works"), [("lean", True), ("istio", False)])
def test_src_valid_mark(net: Topology, backend: str, scheme: str, works: bool) -> None:
    for where in ("all", "default", "p0", "lo"):
        net.pod.sysctl(f"net/ipv4/conf/{where}/src_valid_mark", 1)
        net.pod.sysctl(f"net/ipv4/conf/{where}/rp_filter", 1)
    net.app()
    with Daemon(net.pod, rules(backend, scheme)):
        if works:
            assert_talks(net.pair())
        else:
            assert not _gets_through(net, V4)


def _gets_through(net: Topology, family: Family) -> bool:
    """Whether the application ever hears of a client."""
    with contextlib.closing(net.client.open_socket(10 if family is V6 else 2)) as sock:
        sock.settimeout(SHORT_S)
        with contextlib.suppress(TimeoutError, ConnectionError):
            sock.connect((family.pod, PORT))
            sock.sendall(b"x")
        app = net.app(family)
        app.settimeout(SHORT_S)
        try:
            app.accept()[0].close()
        except TimeoutError:
            return False
        return True


@schemes
def test_excluded_ports_are_not_taken(net: Topology, backend: str, scheme: str) -> None:
    with Daemon(net.pod, rules(backend, scheme)) as daemon:
        for port in (15020, 15021, 15090):
            app = net.keep(net.pod.listen("0.0.0.0", port))
            client = net.connect(port=port)
            assert net.keep(app.accept()[0]).getpeername() == client.getsockname()
        assert daemon.log() == []


@schemes
def test_a_list_of_ports(net: Topology, backend: str, scheme: str) -> None:
    config = rules(backend, scheme) + '[[listener]]\nintercept = { ports = [80, "8000-8010"] }\n'
    with Daemon(net.pod, config):
        assert {port: _is_taken(net, port) for port in (80, 81, 8000, 8010, 8011)} == {
            **{80: True, 8000: True, 8010: True},
            **{81: False, 8011: False},
        }


def _is_taken(net: Topology, port: int, source: Namespace | None = None, host: str = "") -> bool:
    app = net.app() if port == PORT else net.keep(net.pod.listen("0.0.0.0", port))
    client = (source or net.client).connect(host or V4.pod, port)
    with client, app.accept()[0] as accepted:
        return bool(accepted.getpeername() != client.getsockname())


def test_selectors(net: Topology, backend: str) -> None:
    net.beyond  # noqa: B018  p1 exists from now on
    config = rules(backend) + (
        '[[listener]]\nintercept = { sources = ["10.9.1.0/24", "10.9.2.0/24"],'
        ' destinations = ["10.9.2.1"], exclude_destinations = ["192.0.2.1", "192.0.2.7"],'
        ' interfaces = ["p0", "x*"] }\n'
    )
    with Daemon(net.pod, config):
        assert _is_taken(net, PORT, host=V4.pod_beyond)
        assert not _is_taken(net, PORT, host=V4.pod)
        assert not _is_taken(net, PORT, net.beyond, V4.pod_beyond)


def test_two_listeners(net: Topology, backend: str) -> None:
    config = rules(backend) + (
        '[[listener]]\nname = "web"\nport = 15006\nintercept = { ports = [80] }\n'
        '[[listener]]\nname = "rest"\nport = 15007\n'
    )
    net.pod.sysctl("net/ipv4/tcp_syncookies", 2)
    with Daemon(net.pod, config) as daemon:
        assert _is_taken(net, 80)
        assert _is_taken(net, 81)
        assert {record["listener"] for record in daemon.wait_log(2)} == {"web", "rest"}


def test_forwarded_connections_go_their_way(net: Topology, family: Family, backend: str) -> None:
    net.pod.sysctl("net/ipv4/ip_forward", 1)
    net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
    server = net.keep(net.beyond.listen(family.beyond, PORT))
    old = Pair(net.keep(net.client.connect(family.beyond, PORT)), net.keep(server.accept()[0]))
    with Daemon(net.pod, rules(backend)) as daemon:
        client = net.keep(net.client.connect(family.beyond, PORT))
        far = net.keep(server.accept()[0])
        assert far.getpeername() == client.getsockname()
        assert_talks(Pair(client, far))
        assert_talks(old)
        assert daemon.metric("tproxyd_connections_active") == 0


def test_a_router(net: Topology, family: Family, backend: str) -> None:
    """And under iptables, unlike nft, with SYN cookies too."""
    net.pod.sysctl("net/ipv4/ip_forward", 1)
    net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
    server = net.keep(net.beyond.listen(family.beyond, PORT))
    old = Pair(net.keep(net.client.connect(family.beyond, PORT)), net.keep(server.accept()[0]))
    config = rules(backend) + '[[listener]]\nintercept = { scope = "forward" }\n'
    with Daemon(net.pod, config) as daemon:
        if backend != "nft":
            net.pod.sysctl("net/ipv4/tcp_syncookies", 2)
        client = net.keep(net.client.connect(family.beyond, PORT))
        far = net.keep(server.accept()[0])
        assert_talks(Pair(client, far))
        assert far.getpeername()[0] == family.client
        assert daemon.metric("tproxyd_connections_active") == 1
        assert_talks(old)


def test_redirect(net: Topology, family: Family, backend: str) -> None:
    config = rules(backend) + (
        '[[listener]]\nsource = "proxy"\nintercept = { via = "redirect", ports = [80] }\n'
    )
    with Daemon(net.pod, config) as daemon:
        assert_talks(net.pair(family))
        assert daemon.metric("tproxyd_connections_active") == 1


def test_outbound(net: Topology, family: Family, backend: str) -> None:
    server = net.keep(net.beyond.listen(family.beyond, PORT))
    config = rules(backend) + (
        '[[listener]]\nport = 15001\nsource = "proxy"\n'
        'intercept = { scope = "outbound", exclude_uids = [4711, 4713] }\n'
    )
    with Daemon(net.pod, config) as daemon:
        client = net.keep(net.pod.connect(family.beyond, PORT))
        assert_talks(Pair(client, net.keep(server.accept()[0])))
        assert daemon.metric("tproxyd_connections_active") == 1


@schemes
def test_nobody_listens(net: Topology, family: Family, backend: str, scheme: str) -> None:
    net.app(family)
    config = rules(backend, scheme)
    assert tproxyd(net.pod, "install", config=config).returncode == 0
    assert outcome(net, family) == ("refused" if backend == "nft" else "silence")
    assert net.app_saw_nothing(family)
    assert tproxyd(net.pod, "clean").returncode == 0
    assert outcome(net, family) == "an answer"


@schemes
def test_stop_gives_everything_back(net: Topology, backend: str, scheme: str) -> None:
    before = dump(net.pod)
    with Daemon(net.pod, "drain_timeout_s = 0.1\n" + rules(backend, scheme)) as daemon:
        assert_talks(net.pair())
        assert dump(net.pod) != before
        assert daemon.stop(timeout=20) == 0
    assert dump(net.pod) == before


@schemes
def test_kill9_then_clean(net: Topology, backend: str, scheme: str) -> None:
    net.app()
    before = dump(net.pod)
    with Daemon(net.pod, rules(backend, scheme)) as daemon:
        workers = daemon.workers()
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
        wait_for(lambda: all(map(is_gone, workers)), "the workers to follow their supervisor")
    assert dump(net.pod) != before
    assert net.app_saw_nothing()
    assert tproxyd(net.pod, "clean").returncode == 0  # without the configuration that installed
    assert dump(net.pod) == before
    assert outcome(net) == "an answer"


@schemes
def test_drift_is_healed(net: Topology, backend: str, scheme: str) -> None:
    with Daemon(net.pod, rules(backend, scheme), install=False):  # which would heal it
        assert tproxyd(net.pod, "install", config=rules(backend, scheme)).returncode == 0
        installed = dump(net.pod)
        _damage(net.pod, backend, scheme)
        assert dump(net.pod) != installed
        done = tproxyd(net.pod, "install", config=rules(backend, scheme))
        assert "replace the firewall rules" in done.stdout, done.stderr
        assert dump(net.pod) == installed
        assert_talks(net.pair())


def _damage(pod: Namespace, backend: str, scheme: str) -> None:
    if backend == "nft":
        chain = "prerouting" if scheme == "lean" else "mangle_PREROUTING"
        pod.nft(f"flush chain inet tproxyd {chain}\n")
    else:
        chain = "TPROXYD_PREROUTING" if scheme == "lean" else "ISTIO_INBOUND"
        pod.run(f"{backend}", "-w", "-t", "mangle", "-D", chain, "1")


def test_no_moment_without_rules(net: Topology, backend: str) -> None:
    """Rules are replaced again and again, while a client connects: every connection is taken."""
    one, other = (
        rules(backend) + f"[[listener]]\nintercept = {{ ports = [{ports}] }}\n"
        for ports in ("80", "80, 8000")
    )
    stop = threading.Event()

    def install() -> None:
        for config in (other, one) * 2:
            assert tproxyd(net.pod, "install", config=config).returncode == 0
        stop.set()

    assert tproxyd(net.pod, "install", config=one).returncode == 0
    with Daemon(net.pod, one, install=False), ThreadPoolExecutor(1) as pool:
        installing = pool.submit(install)
        count = 0
        while not stop.is_set() and not installing.done():
            assert _is_taken(net, PORT)
            count += 1
        installing.result()
    assert count > 5
