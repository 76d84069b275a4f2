"""Drift is not missed in a storm of changes that do not concern us, and the storm costs little."""

from __future__ import annotations

import textwrap
import threading
import time
from pathlib import Path

import pytest
from lib.daemon import Daemon
from lib.heals import figure, healed_after, kernel
from lib.netns import Namespace
from lib.processes import cpu_s
from lib.streams import assert_talks
from lib.topology import Topology
from lib.waits import wait_for

from tproxyd.kernel.watch import Watch

ROUTES = 10_000  # each is added and deleted: 20,000 changes


def batch(table: str) -> str:
    lines = [f"route {{}} blackhole 198.18.{i >> 8}.{i & 255}/32 {table}" for i in range(ROUTES)]
    return "\n".join(line.format(verb) for verb in ("add", "del") for line in lines) + "\n"


class Storm(threading.Thread):
    def __init__(self, pod: Namespace, script: str) -> None:
        super().__init__(daemon=True)
        self.pod, self.script, self.seconds = pod, script, 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        self.pod.run("ip", "-batch", "-", stdin=self.script)
        self.seconds = time.monotonic() - began


@pytest.mark.parametrize("table", ["table 200", "table main", "table 133 proto 7"])
def test_twenty_thousand_routes(
    net: Topology, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in our own table, where each one does concern us."""
    with Daemon(net.pod) as daemon:
        keeper = daemon.keeper()
        before = cpu_s(keeper)
        storm = Storm(net.pod, batch(table))
        told = ""
        while storm.is_alive():
            now, seconds = healed_after(daemon, lambda: net.pod.run("nft", "flush", "ruleset"))
            told = told or figure(f"nft flush ruleset, in a storm in {table}", now, seconds)
            assert_talks(net.pair())
        used = cpu_s(keeper) - before
        with capsys.disabled():
            print(told, end="")
            print(f"\n  the storm: {2 * ROUTES} changes in {storm.seconds:.2f} s,", end=" ")
            print(
                f"{used:.2f} s of CPU time in the keeper, {kernel(daemon)['heals']} heals", end=""
            )
        net.pod.run("ip", "rule", "del", "priority", "1337")
        wait_for(lambda: "1337:" in net.pod.run("ip", "rule"), "a heal after the storm")
        assert daemon.get("/readyz")[0] == 200


def test_events_that_are_lost_are_made_up_for(
    net: Topology, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With room for two messages or so: what does not fit is ENOBUFS, and a look at everything."""
    script = tmp_path / "keeper.py"
    script.write_text(
        textwrap.dedent(
            """
            import functools, sys
            from tproxyd import cli
            from tproxyd.kernel import guard, watch
            from tproxyd.proc import keeper, reconciler, supervisor

            heard = watch.Watch.read
            def read(self):
                news = heard(self)
                if news.lost:
                    print("lost some", file=sys.stderr, flush=True)
                return news
            watch.Watch.read = read
            keeper.LOOK_S = 3600.0  # nothing but the events
            guard.Guard = functools.partial(guard.Guard, buffer=1)
            supervisor.CHECK_EVERY_S = 3600.0
            sys.exit(cli.main(sys.argv[1:]))
            """
        )
    )
    with Daemon(net.pod, script=str(script)) as daemon:
        net.pod.run("ip", "-batch", "-", stdin=batch("table 133 proto 7").replace("\n", "\n", 1))
        wait_for(lambda: "lost some" in daemon.stderr, "ENOBUFS")
        storm = Storm(net.pod, batch("table 133 proto 7"))
        net.pod.run("nft", "flush", "ruleset")
        wait_for(lambda: "tproxyd" in net.pod.run("nft", "list", "tables"), "the heal")
        storm.join()
        with capsys.disabled():
            print(
                f"\n  ENOBUFS {daemon.stderr.count('lost some')} times, healed all the same", end=""
            )
        net.pod.run("nft", "flush", "ruleset")
        wait_for(lambda: "tproxyd" in net.pod.run("nft", "list", "tables"), "another heal")


def test_the_kernel_filters_what_does_not_concern_us(net: Topology) -> None:
    watch = net.pod.inside(Watch, 133)
    try:
        net.pod.ip(
            "route add blackhole 198.18.0.1/32 table 200",
            "route add blackhole 198.18.0.2/32",
            "link add d0 type veth peer name d1",
        )
        net.pod.nft("table ip others {\n chain c {\n }\n}\n")
        assert not watch.read().concerns_us
        for change in (
            "route add blackhole 198.18.0.1/32 table 133",
            "route add blackhole 198.18.0.1/32 table 201 proto 140",
            "route add blackhole 198.18.0.1/32 table 70000 proto 133",
            "-6 rule add priority 9 fwmark 7 lookup 9",
            "link set lo down",
            "addr add 10.99.0.1/32 dev d0",
        ):
            net.pod.ip(change.removeprefix("-6 ")) if change[0] != "-" else net.pod.run(
                "ip", *change.split()
            )
            assert watch.read().routing, change
        net.pod.nft("table inet tproxyd {\n chain c {\n }\n}\n")
        news = watch.read()
        assert news.concerns_us
        assert not news.routing
        assert news.authors[0].startswith("nft (process ")
    finally:
        watch.close()
