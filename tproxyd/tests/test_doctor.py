"""What doctor concludes and proposes, from what it was told; and whom it finds listening."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import pytest

from tproxyd.config import (
    Backend,
    Config,
    Intercept,
    Listener,
    ReturnPath,
    Scope,
    SourceKind,
    Via,
)
from tproxyd.configsource import command_line
from tproxyd.doctor import Check, Verdict, state
from tproxyd.doctor.check import Patient
from tproxyd.kernel import others
from tproxyd.kernel.listening import listening
from tproxyd.linux import IP_TRANSPARENT


def patient(
    *listeners: Listener, installed: bool = True, who: dict[int, tuple[bool, ...]] | None = None
) -> Patient:
    return Patient(
        config=Config(listeners=listeners or (Listener(),)),
        command=lambda verb: f"tproxyd {verb} -c F",
        installed=installed,
        differs=(),
        listening=who,
        clashes=(),
        nat=(),
        keeper="",
        unreadable=None,
        backend=Backend.NFT,
        return_path=ReturnPath.ACCEPT_MARK,
        host_netns=False,
        wants_state=True,
        dials_here=True,
        holds_elsewhere=False,
    )


# Nat ----------------------------------------------------------------------------------------------

FORWARD = Intercept(Scope.FORWARD)
KEEPS_PORT = Listener(intercept=FORWARD, source=SourceKind.CLIENT_PORT)
BY_NAT = Listener("by-nat", port=1, intercept=Intercept(via=Via.REDIRECT))


@pytest.mark.parametrize(
    ("backend", "listeners", "told"),
    [
        (Backend.NFT, (Listener(),), ""),
        (Backend.NFT, (Listener(intercept=FORWARD),), ""),
        (Backend.NFT, (KEEPS_PORT,), "are not masqueraded"),
        (Backend.NFT, (Listener(bind="*", source=SourceKind.CLIENT_PORT),), ""),
        (Backend.IPTABLES_NFT, (Listener(),), "behind interception"),
        (Backend.IPTABLES_LEGACY, (KEEPS_PORT,), "behind interception"),
        (Backend.IPTABLES_NFT, (Listener(bind="*"),), ""),
        (Backend.IPTABLES_NFT, (Listener(), BY_NAT), "behind interception"),
        (Backend.IPTABLES_NFT, (BY_NAT,), ""),
    ],
)
def test_nat_of_others(backend: Backend, listeners: tuple[Listener, ...], told: str) -> None:
    sick = replace(patient(*listeners), backend=backend)
    assert not list(state.nat(sick))
    found = list(state.nat(replace(sick, nat=(others.Nat("ip nat", False),))))
    assert [told in each.detail and "(ip nat)" in each.detail for each in found] == [True] * bool(
        told
    )


@pytest.mark.parametrize(
    ("path", "here", "on_lo", "told"),
    [
        (ReturnPath.ACCEPT_MARK, True, True, True),
        (ReturnPath.CONNTRACK, True, True, False),
        (ReturnPath.ACCEPT_MARK, False, True, False),
        (ReturnPath.ACCEPT_MARK, True, False, False),
    ],
)
def test_others_that_masquerade_our_connections(
    path: ReturnPath, here: bool, on_lo: bool, told: bool
) -> None:
    nat = (others.Nat("ip docker", on_lo), others.Nat("ip nat", False))
    sick = replace(patient(), return_path=path, dials_here=here, nat=nat)
    found = list(state.nat(sick))
    assert ["(ip docker)" in each.detail for each in found] == [True] * told


# Commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "variables", "line"),
    [
        (None, {}, "tproxyd install"),
        ("my.toml", {}, "tproxyd install -c my.toml"),
        ("a b.toml", {}, "tproxyd install -c 'a b.toml'"),
        (None, {"TPROXYD_CONFIG": "/c"}, "tproxyd install -c /c"),
        ("mine", {"TPROXYD_CONFIG": "/c"}, "tproxyd install -c mine"),
        (
            "f",
            {"TPROXYD_PORTS": "80, 81", "TPROXYD_PORT": "15050"},
            "TPROXYD_PORT=15050 TPROXYD_PORTS='80, 81' tproxyd install -c f",
        ),
        (None, {"TPROXYD_ADMIN": ""}, "TPROXYD_ADMIN='' tproxyd install"),
    ],
)
def test_a_command_for_the_same_configuration(
    path: str | None, variables: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        if name.startswith("TPROXYD_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command_line("install", path) == line


# Who listens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_who_listens(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        port = sock.getsockname()[1]
        assert port not in listening()
        sock.listen()
        assert listening()[port] == (False,)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a transparent socket")
def test_a_transparent_socket_listens() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        assert listening()[sock.getsockname()[1]] == (True,)


def checked(**facts: object) -> Check:
    (check,) = state.listeners(patient(**facts))  # type: ignore[arg-type]
    return check


def test_a_listener() -> None:
    assert checked(who={15006: (True, True)}).verdict is Verdict.OK
    stranger = checked(who={15006: (False,)})
    assert (stranger.verdict, stranger.remedy[:6]) == (Verdict.FAIL, "end it")
    nobody = checked(who={})
    assert nobody.verdict is Verdict.FAIL
    assert nobody.remedy.startswith("start the daemon: tproxyd run --install -c F; or ")
    early = checked(who={}, installed=False)
    assert (early.verdict, early.detail) == (Verdict.WARN, "nobody listens on 15006")
    assert checked(who=None).verdict is Verdict.WARN


def test_what_need_not_be_transparent() -> None:
    by_nat = Listener(port=15001, intercept=Intercept(via=Via.REDIRECT))
    gateway = Listener(port=8000, bind="*")
    checks = state.listeners(patient(by_nat, gateway, who={15001: (False,), 8000: (False,)}))
    assert [check.verdict for check in checks] == [Verdict.OK, Verdict.OK]
