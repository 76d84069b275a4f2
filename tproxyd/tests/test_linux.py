"""The calls that the standard library lacks, against the kernel itself.

What changes a process for good is done in a forked child, which reports through a pipe.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tproxyd import child, linux
from tproxyd.addr import Endpoint
from tproxyd.linux import (
    CAP_NET_ADMIN,
    CAP_NET_RAW,
    TCP_LISTEN,
    AddressKinds,
    TupleLookup,
    capabilities,
    interface_is_up,
    rtt_and_retransmits,
)

REPOSITORY = Path(__file__).resolve().parents[2]
ESTABLISHED = 1
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have something to lose")


def in_child(body: Callable[[], str]) -> str:
    """What `body` returns in a process of its own."""
    reader, writer = os.pipe()

    def report() -> None:
        os.write(writer, body().encode())

    pid = child.fork(report, [writer])
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return told


def status(*names: str) -> dict[str, str]:
    lines = dict(re.findall(r"^(\w+):\t(.*)$", Path("/proc/self/status").read_text(), re.M))
    return {name: lines[name] for name in names}


# Capabilities -------------------------------------------------------------------------------------


def test_capabilities_are_what_proc_says() -> None:
    assert sum(1 << i for i in capabilities()) == int(status("CapEff")["CapEff"], 16)


@needs_root
def test_keep_only() -> None:
    def body() -> str:
        linux.keep_only(frozenset((CAP_NET_RAW, CAP_NET_ADMIN)))
        assert capabilities() == {CAP_NET_RAW, CAP_NET_ADMIN}
        return repr(status("CapEff", "CapPrm", "CapInh", "CapAmb", "NoNewPrivs"))

    some = f"{1 << CAP_NET_RAW | 1 << CAP_NET_ADMIN:016x}"
    none = f"{0:016x}"
    assert in_child(body) == repr(
        {"CapEff": some, "CapPrm": some, "CapInh": none, "CapAmb": none, "NoNewPrivs": "1"}
    )


@needs_root
def test_what_was_given_up_is_gone() -> None:
    def body() -> str:
        linux.keep_only(frozenset())
        with pytest.raises(PermissionError):
            linux.keep_only(frozenset((CAP_NET_RAW,)))
        with pytest.raises(PermissionError):
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        return "gone"

    assert in_child(body) == "gone"


@needs_root
def test_become_another_user_and_keep_what_is_needed() -> None:
    def body() -> str:
        os.setgroups([0, 4])
        linux.become(65534, 65534)
        linux.keep_only(frozenset((CAP_NET_RAW,)))
        assert os.getresuid() == os.getresgid() == (65534, 65534, 65534)
        with pytest.raises(PermissionError):
            os.setuid(0)
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
        return f"{os.getgroups()} {sorted(capabilities())}"

    assert in_child(body) == f"[] [{CAP_NET_RAW}]"


# Processes ----------------------------------------------------------------------------------------


def test_name_process() -> None:
    def body() -> str:
        linux.name_process("tproxyd/12345678")
        return Path("/proc/self/comm").read_text()

    assert in_child(body) == "tproxyd/1234567\n"


# Addresses and interfaces -------------------------------------------------------------------------


def kind_of(host: str) -> str:
    with closing(AddressKinds()) as kinds:
        assert kinds.kind("127.0.0.1") == "own"  # a question does not disturb the next one
        return kinds.kind(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1"])
def test_own_addresses(host: str) -> None:
    assert kind_of(host) == "own"


# A namespace with all the ways in which an address can be one's own, or look like it.
NAMESPACE = """
ip link set lo up
ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up
ip addr add 10.9.1.1/24 dev v0 && ip addr add 10.9.1.3/24 dev v0 && ip addr add 10.9.2.1/32 dev lo
ip route add local 10.7.0.0/16 dev lo
ip route add prohibit 10.8.0.0/16 && ip route add blackhole 10.6.0.0/16
ip -6 addr add fd00::1/64 dev v0 nodad && ip -6 addr add fe80::7/64 dev v0 nodad
echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind
"$@"
"""
ASK = """
import sys
from tproxyd.linux import AddressKinds
print([*map(AddressKinds().kind, sys.argv[1:])])
"""


@needs_root
@pytest.mark.parametrize(
    ("kind", "hosts"),
    [
        ("own", ["10.9.1.1", "10.9.2.1", "fd00::1", "fe80::7", "127.0.0.1"]),
        ("own", ["10.9.1.3"]),  # a secondary address, whose preferred source is the first one
        ("own", ["10.7.1.1"]),  # a whole prefix that is local (AnyIP)
        ("broadcast", ["10.9.1.255"]),
        ("", ["10.9.1.9", "fd00::9", "203.0.113.7", "10.8.0.1", "10.6.0.1"]),
    ],
)
def test_addresses_of_a_whole_host(kind: str, hosts: list[str]) -> None:
    inside = ["unshare", "-n", "sh", "-ec", NAMESPACE, "sh", sys.executable, "-c", ASK, *hosts]
    told = subprocess.run(inside, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert told.stdout == f"{[kind for _ in hosts]}\n"


@pytest.mark.parametrize("host", ["192.0.2.7", "203.0.113.7", "2001:db8::7", "fe80::77:7"])
def test_other_addresses(host: str) -> None:
    """Routed or not, they are nobody here."""
    assert kind_of(host) == ""


def test_interfaces() -> None:
    flags = int(Path("/sys/class/net/lo/flags").read_text(), 16)
    assert interface_is_up("lo") == bool(flags & 1)
    with pytest.raises(OSError, match="No such device"):
        interface_is_up("no-such-thing")


# TCP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_which_socket_holds_a_tuple(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    nobody = Endpoint(host, 9)
    with closing(TupleLookup()) as lookup:
        with socket.create_server((host, 0), family=family) as server:
            local = Endpoint(*server.getsockname()[:2])
            with socket.create_connection(local) as client, server.accept()[0]:
                remote = Endpoint(*client.getsockname()[:2])
                assert lookup.state(local, remote) == ESTABLISHED
                assert lookup.state(remote, local) == ESTABLISHED  # seen from the other side
                assert lookup.state(local, nobody) == TCP_LISTEN
        assert lookup.state(local, nobody) == 0


def test_round_trips() -> None:
    began = time.monotonic()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as accepted,
    ):
        client.send(b"ping")
        accepted.send(accepted.recv(4))
        assert client.recv(4) == b"ping"
        rtt, retransmits = rtt_and_retransmits(client)
        assert 0 < rtt <= (time.monotonic() - began) * 1_000_000  # the connection is no older
        assert retransmits == 0


def test_reset_on_close() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        with theirs:
            linux.reset_on_close(ours)
            ours.close()
            with pytest.raises(ConnectionResetError):
                theirs.recv(1)
