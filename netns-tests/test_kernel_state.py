"""Install twice changes nothing; clean leaves nothing; what others have stays byte for byte.

With the real kernel and both nft tools, around rules, tables and routes of other programs, after
damage, and after SIGKILL between any two writes.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from lib.netns import MARK_SYSCTLS, Namespace
from lib.waits import wait_for

from tproxyd.addr import Endpoint
from tproxyd.config import (
    Config,
    Intercept,
    Listener,
    ReturnPath,
    Rules,
    Scope,
    SourceKind,
    Via,
)
from tproxyd.errors import KernelError
from tproxyd.kernel import routewriter
from tproxyd.kernel import sysctls as kernel_sysctls
from tproxyd.kernel.desired import Facts
from tproxyd.kernel.machine import Machine
from tproxyd.kernel.nft import LIBRARY, Nft
from tproxyd.kernel.reconcile import Report, check, clean, facts, install, rules

HERE = Path(__file__).parent.parent
CONFIGS = {
    path: Config(rules=Rules(return_path=path))
    for path in (ReturnPath.ACCEPT_MARK, ReturnPath.CONNTRACK)
}
BACKEND = Endpoint("10.9.2.2", 80)
OUTBOUND = Intercept(Scope.OUTBOUND, Via.REDIRECT, exclude_ports=(), exclude_uids=(0, 1337, 1338))
OTHERS = {
    "router": Config(
        listeners=(Listener(intercept=Intercept(Scope.FORWARD, interfaces=("eth0", "veth*"))),)
    ),
    "gateway": Config(
        listeners=(Listener(bind="*", upstream=(BACKEND,), source=SourceKind.CLIENT_PORT),)
    ),
    "redirect": Config(
        listeners=(Listener(intercept=Intercept(via=Via.REDIRECT), source=SourceKind.PROXY),)
    ),
    "outbound": Config(listeners=(Listener(intercept=OUTBOUND, source=SourceKind.PROXY),)),
    "everything": Config(
        rules=Rules(return_path=ReturnPath.ACCEPT_MARK),
        listeners=(
            Listener("a", port=1, intercept=Intercept(via=Via.REDIRECT, ports=((1, 9),))),
            Listener("b", port=2),
            Listener("c", port=3, intercept=OUTBOUND),
            Listener("d", port=4, intercept=Intercept(Scope.FORWARD)),
            Listener("e", port=5, intercept=Intercept(via=Via.REDIRECT), source=SourceKind.PROXY),
            Listener("f", "*", 6, upstream=(BACKEND,), source=SourceKind.CLIENT),
        ),
    ),
}
FWMARK_ACCEPT, REFLECT_V4, REFLECT_V6 = MARK_SYSCTLS


@pytest.fixture
def pod() -> Iterator[Namespace]:
    with Namespace("pod") as pod:
        pod.ip(
            "link add eth0 type veth peer name eth1",
            "addr add 10.9.1.1/24 dev eth0",
            "addr add fd00:9:1::1/64 dev eth0 nodad",
            "link set eth1 up",
            "link set eth0 up",
        )
        # Its IPv6 address has a route a moment after the link is up.
        listing = ("ip", "-6", "route", "show", "table", "local")
        wait_for(lambda: "local fd00:9:1::1 " in pod.run(*listing), "the address to be usable")
        yield pod


@pytest.fixture(params=CONFIGS, ids=str)
def config(request: pytest.FixtureRequest) -> Config:
    return CONFIGS[request.param]


@pytest.fixture(params=[LIBRARY, "no-such-library.so"], ids=["libnftables", "nft-command"])
def nft(request: pytest.FixtureRequest) -> Nft:
    return Nft(request.param)


def others_move_in(pod: Namespace) -> None:
    """Things of other programs around ours, some of them as like ours as can be."""
    pod.nft(
        """
        table inet other {
            chain prerouting {
                type filter hook prerouting priority mangle; policy accept;
                tcp dport 80 counter accept comment "not ours"
            }
        }
        table ip tproxyd {
            set s {
                type ipv4_addr
            }
        }
        """
    )
    ip(
        pod,
        "rule add fwmark 0x539/0xfff lookup 133 priority 1337 protocol static",
        "rule add from 10.0.0.0/8 lookup 7 priority 100",
        "-6 rule add fwmark 0x539/0xfff lookup 133 priority 1337 protocol static",
        "route add 192.0.2.0/24 dev eth0 table 133",
        "route add local default dev lo table 134",
        "-6 route add 2001:db8::/32 dev eth0 table 133",
        "route add unreachable 198.51.100.0/24",
        "route add unreachable 198.51.100.0/25 proto 133",  # no route of ours is of that type
    )


def ip(pod: Namespace, *lines: str) -> None:
    """`ip` for each line: its batch mode takes no -6."""
    for line in lines:
        pod.run("ip", *line.split())


def installed(pod: Namespace, config: Config, nft: Nft | None = None) -> Report:
    return pod.inside(install, config, world=Machine(nft))


def test_install_twice_and_clean(pod: Namespace, config: Config, nft: Nft) -> None:
    others_move_in(pod)
    before = pod.dump()
    first = installed(pod, config, nft)
    assert first.changed
    assert first.return_path is config.rules.return_path
    between = pod.dump()
    assert between != before
    assert installed(pod, config, nft).changed == ()
    assert pod.dump() == between
    assert pod.inside(check, config, world=Machine(nft)).differs == ()
    report = pod.inside(clean, world=Machine(nft))
    assert len(report.changed) == len(first.changed)
    assert pod.dump() == before
    assert pod.inside(clean, world=Machine(nft)) == Report()


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_every_kind_of_listener_twice_and_clean(pod: Namespace, config: Config, nft: Nft) -> None:
    """And the drain: it takes something away, is made once, and leaves as little."""
    others_move_in(pod)
    before = pod.dump()
    first = installed(pod, config, nft)
    assert first.changed
    between = pod.dump()
    assert installed(pod, config, nft).changed == ()
    for _ in "twice":
        drained = pod.inside(install, config, intercept=False, world=Machine(nft))
    assert drained.changed == ()
    assert pod.inside(check, config, intercept=False).differs == ()
    drain = pod.dump()
    assert drain != before
    if first.return_path is None and config is not OTHERS["gateway"]:
        assert drain != between
    installed(pod, config, nft)
    assert pod.dump() == between
    pod.inside(clean, world=Machine(nft))
    assert pod.dump() == before


def test_an_ordinary_listener_needs_nothing(pod: Namespace) -> None:
    config = Config(listeners=(Listener(bind="*", upstream=(BACKEND,), source=SourceKind.PROXY),))
    before = pod.dump()
    assert installed(pod, config) == Report()
    assert pod.dump() == before


def test_the_route_of_a_redirect_is_healed_and_given_back(pod: Namespace) -> None:
    """With the memory of sysctls in its number, like any other: it may be the survivor."""
    config = OTHERS["everything"]
    before = pod.dump()
    installed(pod, config)
    whole = pod.dump()
    for damage in (
        "-6 route del local ::6/128 dev lo table local",
        "-6 route replace local ::6/128 dev lo table local proto 133",
        "-6 route add local ::7/128 dev lo table local proto 133",
        "-6 route add local ::7/128 dev lo table 7 proto 140",
        "-6 route add local ::6/128 dev eth0 table 7 proto 140",
        "route add local 127.0.0.6/32 dev lo table 7 proto 140",
    ):
        ip(pod, damage)
        report = pod.inside(check, config)
        assert len(report.differs) == 1, damage
        assert installed(pod, config).changed == report.differs, damage
        assert pod.dump() == whole, damage
    pod.nft("delete table inet tproxyd")
    for family in ("-4", "-6"):
        ip(pod, f"{family} rule del priority 1337", f"{family} route flush table 133")
    pod.inside(clean)
    assert pod.dump() == before


def test_one_tool_cleans_what_the_other_installed(pod: Namespace, config: Config) -> None:
    before = pod.dump()
    library, command = Nft(), Nft("no-such-library.so")
    for one, other in ((library, command), (command, library)):
        installed(pod, config, one)
        assert installed(pod, config, other).changed == ()
        pod.inside(clean, world=Machine(other))
        assert pod.dump() == before


def set_sysctls(pod: Namespace, values: tuple[int, ...]) -> None:
    for name, value in zip(MARK_SYSCTLS, values, strict=True):
        pod.sysctl(name, value)


def sysctls(pod: Namespace) -> tuple[int, ...]:
    return tuple(map(pod.sysctl, MARK_SYSCTLS))


@pytest.mark.parametrize("values", [*itertools.product((0, 1), repeat=3)], ids=str)
def test_the_sysctls_are_as_before(
    pod: Namespace, config: Config, values: tuple[int, int, int]
) -> None:
    """Each on its own: of those that were set already none is taken away, of the others each."""
    set_sysctls(pod, values)
    before = pod.dump()
    installed(pod, config)
    used = config.rules.return_path is ReturnPath.ACCEPT_MARK
    assert sysctls(pod) == (tuple(value or 133 for value in values) if used else values)
    assert installed(pod, config).changed == ()
    pod.inside(clean)
    assert sysctls(pod) == values
    assert pod.dump() == before


@pytest.mark.parametrize("healed", [False, True])
def test_the_sysctls_are_remembered_where_every_rule_and_route_is_lost(
    pod: Namespace, healed: bool
) -> None:
    """systemd-networkd removes at its start what it does not know."""
    config = CONFIGS[ReturnPath.ACCEPT_MARK]
    before = pod.dump()
    installed(pod, config)
    whole = pod.dump()
    for ip in ("-4", "-6"):
        pod.run("ip", ip, "rule", "del", "priority", "1337")
        pod.run("ip", ip, "route", "flush", "table", "133")
    if healed:
        installed(pod, config)
        assert pod.dump() == whole
    pod.inside(clean)
    assert pod.dump() == before


def test_a_kernel_that_takes_the_sysctls_as_truth_values(
    pod: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None does yet (Linux 6.18). There the rules and routes remember."""
    write = kernel_sysctls.write

    def strict(name: str, value: int) -> None:
        if value not in (0, 1):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        write(name, value)

    monkeypatch.setattr(kernel_sysctls, "write", strict)
    before = pod.dump()
    installed(pod, CONFIGS[ReturnPath.ACCEPT_MARK])
    assert sysctls(pod) == (1, 1, 1)
    assert installed(pod, CONFIGS[ReturnPath.ACCEPT_MARK]).changed == ()
    pod.inside(clean)
    assert pod.dump() == before


def test_from_one_configuration_to_the_next(pod: Namespace) -> None:
    others_move_in(pod)
    before = pod.dump()
    other = Config(mark=0x2F, table=70_000, listeners=(Listener(name="output", port=1),))
    walk = [*CONFIGS.values(), other, *reversed(CONFIGS.values()), *OTHERS.values(), other]
    for config in walk:
        installed(pod, config)
        assert pod.inside(check, config).differs == ()
        got = pod.dump()
        pod.inside(clean)
        assert pod.dump() == before
        installed(pod, config)
        assert pod.dump() == got, "the way there shows"


def test_damage_is_healed_with_one_write(pod: Namespace, config: Config) -> None:
    installed(pod, config)
    whole = pod.dump()
    uses_sysctls = config.rules.return_path is ReturnPath.ACCEPT_MARK
    number, wrong = (140, 133) if uses_sysctls else (133, 140)
    rule = "fwmark 0x539/0xfff lookup 133 priority 1337"
    for damage in (
        f"rule del {rule}",
        f"-6 rule del {rule}",
        f"route del local default table 133 proto {number}",
        f"-6 route del local default dev lo table 133 proto {number}",
        f"-6 route replace local default dev lo table 133 proto {wrong}",
        f"rule add iif eth0 {rule} protocol 133",
        "route add local 203.0.113.0/24 dev lo table 9 proto 134",
    ):
        ip(pod, damage)
        report = pod.inside(check, config)
        assert len(report.differs) == 1, damage
        assert installed(pod, config).changed == report.differs, damage
        assert pod.dump() == whole, damage
    for script in (
        "delete table inet tproxyd",
        "flush chain inet tproxyd take_inbound",
        "add chain inet tproxyd extra",
        "insert rule inet tproxyd prerouting counter",
        "add set inet tproxyd s { type ipv4_addr; }",
        "add table inet tproxyd { flags dormant; }",
        "add chain inet tproxyd nat { type nat hook prerouting priority -100; }",
    ):
        pod.nft(script)
        assert len(installed(pod, config).changed) == 1, script
        assert pod.dump() == whole, script
    for name in MARK_SYSCTLS if uses_sysctls else ():
        pod.sysctl(name, 0)
        assert installed(pod, config).changed == (f"set {name.replace('/', '.')}=133",)
        assert pod.dump() == whole, name


def test_lo_down_takes_the_ipv6_route_with_it(pod: Namespace, config: Config) -> None:
    before = pod.dump()
    installed(pod, config)
    whole = pod.dump()
    pod.ip("link set lo down", "link set lo up")
    assert "ip -6 route" in pod.inside(check, config).differs[-1]
    installed(pod, config)
    assert pod.dump() == whole
    pod.ip("link set lo down")
    with pytest.raises(KernelError, match=r"lo is down.*; ip link set lo up"):
        installed(pod, config)
    pod.inside(clean)
    pod.ip("link set lo up")
    assert pod.dump() == before


def test_leftovers_of_another_version_are_cleaned(pod: Namespace) -> None:
    """What they remember is given back; what none of them remembers is somebody else's."""
    others_move_in(pod)
    pod.sysctl(REFLECT_V4, 1)
    before = pod.dump()
    pod.nft("add table inet tproxyd\nadd set inet tproxyd old { type inet_service; }")
    ip(
        pod,
        "route add local 203.0.113.0/24 dev lo metric 7 table 8 proto 133",
        "route add local 203.0.113.0/25 dev eth0 proto 133",
        "route add local default dev lo table 90000 proto 134",
        "-6 route add local 2001:db8:1::/48 dev eth0 metric 7 proto 133",
        "-6 route add local default dev lo table 90000 proto 134",
        "-6 route add local ::6/128 dev lo table 9 proto 134",
        "rule add iif eth0 fwmark 1 lookup 9 priority 9 protocol 133",
        "rule add to 10.0.0.0/8 unreachable priority 9 protocol 134",
        "-6 rule add fwmark 1 lookup 9 priority 9 protocol 137",
    )
    set_sysctls(pod, (1, 1, 1))
    pod.inside(clean)
    assert pod.dump() == before


def test_a_table_that_is_taken(pod: Namespace, config: Config) -> None:
    pod.ip("route add local default dev lo table 133")
    before = pod.dump()
    with pytest.raises(
        KernelError, match=r"can't add ip -4 route .*: File exists; another"
    ) as caught:
        installed(pod, config)
    assert "`table`" in caught.value.hint
    assert "nft" not in pod.run("nft", "list", "tables", "inet")
    pod.inside(clean)
    assert pod.dump() == before


def python(pod: Namespace, code: str, *before: str) -> subprocess.CompletedProcess[str]:
    """`code` in a Python of its own in the namespace."""
    return subprocess.run(
        pod.argv(*before, sys.executable, "-c", textwrap.dedent(code)),
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )


KILLED_BEFORE_WRITE = """
    import os, signal
    from tproxyd.config import Config, ReturnPath, Rules
    from tproxyd.kernel import machine, reconcile

    class Killed(machine.Machine):
        left = {number}

        def apply(self, change):
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            super().apply(change)

    if {installs}:
        config = Config(rules=Rules(return_path=ReturnPath("{path}")))
        reconcile.install(config, world=Killed())
    else:
        reconcile.clean(world=Killed())
"""


@pytest.mark.parametrize("values", [(0, 0, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("installs", [True, False], ids=["install", "clean"])
def test_sigkill_between_any_two_writes(
    pod: Namespace, config: Config, installs: bool, values: tuple[int, int, int]
) -> None:
    others_move_in(pod)
    set_sysctls(pod, values)
    before = pod.dump()
    writes = len(installed(pod, config).changed)
    if installs:
        pod.inside(clean)
    for number in range(writes):
        code = KILLED_BEFORE_WRITE.format(
            number=number, installs=installs, path=config.rules.return_path
        )
        done = python(pod, code)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(pod.inside(clean).changed) == (number if installs else writes - number)
        assert pod.dump() == before
        if not installs:
            installed(pod, config)


def test_who_writes_routes_is_there_for_that_only(pod: Namespace, config: Config) -> None:
    """Nobody is started to look, or for nft alone; no process, file or pyroute2 is left behind."""
    done = python(
        pod,
        f"""
        import os, subprocess, sys
        from tproxyd.config import Config, ReturnPath, Rules
        from tproxyd.kernel import reconcile
        from tproxyd.kernel.machine import Machine
        config = Config(rules=Rules(return_path=ReturnPath("{config.rules.return_path}")))
        world, forks = Machine(), 0

        def forked():
            global forks
            forks += 1

        os.register_at_fork(after_in_parent=forked)  # not that of subprocess
        def install(): return len(reconcile.install(config, world=world).changed)
        def check(): return len(reconcile.check(config, world=world).differs)
        def clashes(): return len(reconcile.clashes(config))
        def clean(): return len(reconcile.clean(world=world).changed)
        damages = ("nft flush ruleset", "ip rule del priority 1337", "ip route flush table 133")
        files = None
        for do in (check, install, check, install, clashes, *damages, clean, clean):
            before = forks
            if isinstance(do, str):
                subprocess.run(do.split(), check=True)
                name, count = do.split()[1], install()
            else:
                name, count = do.__name__, do()
            files = files or os.listdir("/proc/self/fd")
            assert os.listdir("/proc/self/fd") == files, do
            assert open(f"/proc/self/task/{{os.getpid()}}/children").read() == "", do
            assert not any("pyroute2" in name for name in sys.modules), do
            print(name, count and "some", forks - before)
        """,
    )
    assert done.stdout.splitlines() == [
        *("check some 0", "install some 1", "check 0 0", "install 0 0", "clashes 0 0"),
        *("flush some 0", "rule some 1", "route some 1", "clean some 1", "clean 0 0"),
    ], done.stderr


def test_without_pyroute2_nothing_is_changed(pod: Namespace, config: Config) -> None:
    before = pod.dump()
    done = python(
        pod,
        """
        import sys
        from tproxyd.config import Config
        from tproxyd.kernel.reconcile import install
        sys.modules["pyroute2"] = None  # as if there was none
        try:
            install(Config())
        except ModuleNotFoundError as error:
            print(error)
        """,
    )
    assert "pyroute2" in done.stdout, done.stderr
    assert pod.dump() == before


class DiesAt:
    """pyroute2, up to the call with this word, which never comes to its end."""

    def __init__(self, word: str, *, written: bool) -> None:
        self._word, self._written, self._whole = word, written, routewriter._pyroute2()

    def __call__(self) -> routewriter._Pyroute2:
        real = self._whole.IPRoute(strict_check=True)

        class IPRoute:
            def __init__(_, *, strict_check: bool) -> None: ...

            def __getattr__(_, name: str) -> Callable[..., object]:
                def call(*words: str, **fields: object) -> object:
                    dies = name == self._word
                    answer = (
                        () if dies and not self._written else getattr(real, name)(*words, **fields)
                    )
                    if dies:
                        list(answer)
                        os.kill(os.getpid(), signal.SIGKILL)
                    return answer

                return call

        return routewriter._Pyroute2(IPRoute, self._whole.NetlinkError)


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("word", ["route", "rule"])
def test_who_writes_routes_is_killed(
    pod: Namespace, config: Config, monkeypatch: pytest.MonkeyPatch, word: str, *, written: bool
) -> None:
    """The one install fails and says why, the next one is whole, and so is a clean."""
    before = pod.dump()
    for call in (partial(install, config), clean):
        with monkeypatch.context() as patch:
            patch.setattr(routewriter, "_pyroute2", DiesAt(word, written=written))
            with pytest.raises(KernelError) as caught:
                pod.inside(call)
        assert caught.value.why == "the process that writes it was killed by SIGKILL"
        assert caught.value.hint.startswith("try again")
        pod.inside(call)
        if call is not clean:
            assert pod.inside(check, config).differs == ()
    assert pod.dump() == before


def test_a_read_only_proc_sys(pod: Namespace) -> None:
    """As containers have it: auto takes the other return path, accept-mark says what to do."""
    done = python(
        pod,
        """
        from tproxyd.config import Config, ReturnPath, Rules
        from tproxyd.errors import KernelError
        from tproxyd.kernel.reconcile import check, install
        print(check(Config()).notes[0])
        try:
            install(Config(rules=Rules(return_path=ReturnPath.ACCEPT_MARK)))
        except KernelError as error:
            print(error)
        """,
        *("unshare", "--mount", "sh", "-c"),
        "mount -o remount,bind,ro /proc/sys 2>/dev/null || mount --bind -o ro /proc/sys /proc/sys;"
        ' exec "$@"',
        "sh",
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("return path conntrack: "), done.stderr
    assert "tcp_fwmark_accept=133: Read-only file system; set it from outside" in lines[1]
    assert "tproxyd" not in pod.run("nft", "list", "tables", "inet")
    pod.inside(clean)


def test_without_protocol_names(pod: Namespace, config: Config, nft: Nft) -> None:
    """As in an image without netbase: nft lists numbers, and takes our names all the same."""
    with_router = (*config.listeners, replace(OTHERS["router"].listeners[0], name="router", port=1))
    config = replace(config, listeners=with_router)
    installed(pod, config, nft)
    done = python(
        pod,
        f"""
        import pickle, socket
        from tproxyd.kernel.nft import Nft
        from tproxyd.kernel.machine import Machine
        from tproxyd.kernel.reconcile import check, clean, install
        try:
            socket.getprotobyname("tcp")
        except OSError:
            config = pickle.loads({pickle.dumps(config)!r})
            world = Machine(Nft("{nft._name}"))
            print(check(config, world=world).differs)
            clean(world=world)
            install(config, world=world)
        """,
        *("unshare", "--mount", "sh", "-c"),
        'if [ -e /etc/protocols ]; then mount --bind /dev/null /etc/protocols; fi; exec "$@"',
        "sh",
    )
    assert done.stdout == "()\n", done.stderr
    assert pod.inside(check, config).differs == ()


def test_an_ordinary_user_is_told_what_is_missing(pod: Namespace, config: Config) -> None:
    done = python(
        pod,
        """
        import os
        from tproxyd.config import Config
        from tproxyd.errors import KernelError
        from tproxyd.kernel.reconcile import check, clean
        clean()  # all is imported now; another user may not be able to read the checkout
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        for call in (lambda: check(Config()), clean):
            try:
                call()
            except KernelError as error:
                print(error)
        """,
    )
    assert done.stdout.count("CAP_NET_ADMIN is missing; run it as root") == 2, done.stderr


def test_facts(pod: Namespace) -> None:
    found = pod.inside(facts)
    assert found == Facts(
        ipv6=True,
        host_netns=False,
        set_before=frozenset(),
        sysctls_writable=True,
        lo_up=True,
        own=found.own,
    )
    assert found.own > {"127.0.0.1", "::1", "10.9.1.1", "fd00:9:1::1"}
    installed(pod, CONFIGS[ReturnPath.ACCEPT_MARK])
    assert not pod.inside(facts).set_before, "that was us"
    pod.inside(clean)
    pod.sysctl("net/ipv6/conf/lo/disable_ipv6", 1)
    set_sysctls(pod, (1, 0, 1))
    pod.ip("link set lo down")
    found = pod.inside(facts)
    assert (found.ipv6, found.lo_up) == (False, False)
    assert found.set_before == {name.replace("/", ".") for name in (FWMARK_ACCEPT, REFLECT_V6)}


def test_without_ipv6(pod: Namespace, config: Config) -> None:
    pod.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
    before = pod.dump()
    report = installed(pod, config)
    assert any("no IPv6" in note for note in report.notes)
    assert "133" not in pod.run("ip", "-6", "route", "show", "table", "all")
    assert pod.sysctl(REFLECT_V6) == 0, "there is nothing to reflect"
    pod.inside(clean)
    assert pod.dump() == before


def test_rules_is_what_nft_accepts(pod: Namespace, config: Config) -> None:
    """And what install makes, with the commands in its comments: nothing is left to do."""
    text = rules(config, facts=pod.inside(facts))
    pod.nft(text)
    report = pod.inside(check, config)
    assert not any("firewall" in difference for difference in report.differs)
    for line in text.splitlines():
        if line.startswith(("# ip ", "# sysctl ")):
            pod.run(*line.removeprefix("# ").split())
    assert pod.inside(check, config).differs == ()
    assert installed(pod, config).changed == ()
