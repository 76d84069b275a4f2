"""The tests: each takes a candidate into a fresh world and returns numbers by name.

wrk has one thread and nginx one worker, beside a proxy with two: client, proxy and application
share the machine's CPUs, for every candidate alike, so a ratio says what a whole node can do, and
the CPU time of the proxy's own processes says what the proxy itself costs.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.candidates import Candidate
from bench.world import BULK_PORT, CROWD, POD, POD_V6, Cpu, Failed, Running, World

Numbers = dict[str, float]

WORKERS = 2
CONCURRENCY = 64
LIVE_CAP = 9000
HANGS_AFTER_S = 5.0
IDLE = 3000
AT_REST_S = 6.0  # tproxyd looks at the kernel state every five seconds, in a process of its own
CURVE_WORKERS = (1, 2, 4)
CURVE_OPEN = (100, 1000, 9000)

_LUA = str(Path(__file__).parent / "wrk.lua")


class Settings(NamedTuple):
    seconds: int  # of each run of wrk and iperf3
    streams: tuple[int, ...]  # of bulk
    traced: int  # connections under strace
    curve_workers: tuple[int, ...]
    curve_open: tuple[int, ...]
    whole: bool  # all candidates in all tests


FULL = Settings(3, (1, 8), 2000, CURVE_WORKERS, CURVE_OPEN, whole=True)
# For a look while working: a figure of one second on a shared machine moves by a fifth.
QUICK = Settings(1, (1,), 500, (WORKERS,), (CURVE_OPEN[0], CURVE_OPEN[-1]), whole=False)
QUICK_OMITS = ("beside",)
QUICK_CANDIDATES = ("direct", "envoy", "haproxy", "tproxyd")


@contextmanager
def serving(
    candidate: Candidate, workers: int = WORKERS, header: bool = False
) -> Iterator[tuple[World, Running | None, float]]:
    """A world in which the candidate serves; the seconds that its start took.

    A start ends with the first answer, through it, that names the right client.
    """
    with World() as world:
        flags = ["--header"] if header else []
        if not candidate.proxies:
            yield world, None, 0.0
            return
        candidate.prepare(world, workers, header)
        asking = world.helper("first", *flags)
        asking.answer(10)
        started = time.monotonic()
        proxy = candidate.start(world)
        took = asking.answer(30, proxy)["at"] - started
        asking.running.end()
        if not header:
            world.serves("--to", POD_V6, give_up=proxy)
        yield world, proxy, took
        proxy.check()


def wrk(
    world: World,
    proxy: Running | None,
    seconds: int,
    *script: str,
    connections: int = CONCURRENCY,
    port: int = 80,
) -> Numbers:
    """One run of wrk; `script` is for wrk.lua."""
    before, again = proxy.cpu() if proxy else Cpu(0, 0), world.syn_retransmits()
    output = world.from_client(
        *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "-s", _LUA),
        *(f"http://{POD}:{port}/", "--", *script),
        timeout=seconds + 30,
    )
    spent = proxy.cpu() - before if proxy else Cpu(0, 0)
    result = json.loads(output.splitlines()[-1])
    requests = result["requests"]
    if not requests:
        raise Failed(f"wrk got no answer: {output}")
    numbers = {
        "rps": requests / result["seconds"],
        "worst_ms": result["worst_us"] / 1e3,
        "p50_us": result["p50_us"],
        "p99_us": result["p99_us"],
        "p99_ms": result["p99_us"] / 1e3,
        "failed": result["failed"] + result["timeouts"],
        "syn_again": world.syn_retransmits() - again,
    }
    if proxy:
        numbers["user_us"] = spent.user / requests * 1e6
        numbers["system_us"] = spent.system / requests * 1e6
        numbers["cpu_us"] = (spent.user + spent.system) / requests * 1e6
    return numbers


def named(prefix: str, numbers: Numbers) -> Numbers:
    return {f"{prefix}_{name}": value for name, value in numbers.items()}


# The tests ----------------------------------------------------------------------------------------


def startup(candidate: Candidate, settings: Settings) -> Numbers:
    if not candidate.proxies:
        return {}
    with serving(candidate) as (_, _, took):
        return {"startup_ms": took * 1000}


def memory(candidate: Candidate, settings: Settings) -> Numbers:
    """Each of the idle connections was served once; the kernel's own memory is not in it."""
    if not candidate.proxies:
        return {}
    with serving(candidate) as (world, proxy, _):
        assert proxy is not None
        time.sleep(AT_REST_S)
        rest = _settled(proxy)
        with crowd(world) as reach:
            reach(IDLE)
            full = _settled(proxy)
    return {"rest_mib": rest / 1024, "idle_kib": (full - rest) / IDLE}


def _settled(proxy: Running) -> int:
    """Pss once it hardly changes any more, or after three seconds."""
    last, deadline = proxy.pss_kib(), time.monotonic() + 3
    while time.monotonic() < deadline:
        time.sleep(0.4)
        now = proxy.pss_kib()
        if abs(now - last) < 64:
            break
        last = now
    return last


@contextmanager
def crowd(world: World) -> Iterator[Callable[[int], None]]:
    """A function that opens connections until there are so many; they stay, idle."""
    helper = world.helper("crowd", *CROWD)
    helper.answer(10)

    def reach(count: int) -> None:
        helper.tell(f"open {count}")
        answer = helper.answer(60)
        if answer["open"] != count:
            raise Failed(f"of {count} connections {answer['hung']} hung, {answer['failed']} failed")

    try:
        yield reach
    finally:
        helper.running.end()


def churn(candidate: Candidate, settings: Settings) -> Numbers:
    with serving(candidate) as (world, proxy, _):
        return named("churn", wrk(world, proxy, settings.seconds, "close", "none"))


def keepalive(candidate: Candidate, settings: Settings) -> Numbers:
    with serving(candidate) as (world, proxy, _):
        return named("keep", wrk(world, proxy, settings.seconds, "keep", "none"))


def single(candidate: Candidate, settings: Settings) -> Numbers:
    with serving(candidate) as (world, proxy, _):
        numbers = wrk(world, proxy, settings.seconds, "keep", "none", connections=1)
        return named("single", numbers)


def header(candidate: Candidate, settings: Settings) -> Numbers:
    """A PROXY v1 header in front. `direct` is nginx reading the header itself."""
    port = candidate.request_port(header=True)
    with serving(candidate, header=True) as (world, proxy, _):
        numbers = wrk(world, proxy, settings.seconds, "close", "each", port=port)
    if not settings.whole:
        return named("header_churn", numbers)
    with serving(candidate, header=True) as (world, proxy, _):
        once = ("keep", "once", str(CONCURRENCY))
        keep = wrk(world, proxy, settings.seconds, *once, port=port)
    return named("header_churn", numbers) | named("header_keep", keep)


def bulk(candidate: Candidate, settings: Settings) -> Numbers:
    numbers = {}
    with serving(candidate) as (world, _, _):
        bulk_server(world)
        for streams in settings.streams:
            for name, flags in (("up", ()), ("down", ("-R",))):
                numbers[f"bulk_{name}{streams}_gbit"] = _iperf(world, settings, streams, *flags)
    return numbers


def bulk_server(world: World) -> None:
    server = world.start("iperf3", "iperf3", "-s", "-p", str(BULK_PORT), "--forceflush")
    deadline = time.monotonic() + 10
    while "listening" not in server.say():
        server.check()
        if time.monotonic() > deadline:
            raise Failed("iperf3 does not listen")
        time.sleep(0.01)


def bulk_client(streams: int, *flags: str) -> tuple[str, ...]:
    return ("iperf3", "-c", POD, "-p", str(BULK_PORT), "-P", str(streams), "-J", *flags)


def _iperf(world: World, settings: Settings, streams: int, *flags: str) -> float:
    """Gbit/s as the receiving end counted them."""
    argv = bulk_client(streams, "-t", str(settings.seconds), *flags)
    result = json.loads(world.from_client(*argv, timeout=settings.seconds + 30))
    return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9


def beside(candidate: Candidate, settings: Settings) -> Numbers:
    """Small requests, alone and beside one bulk stream in each direction's worse case, download."""
    with serving(candidate) as (world, proxy, _):
        bulk_server(world)
        alone = wrk(world, proxy, settings.seconds, "keep", "none", connections=8)
        stream = world.start(
            "bulk", *bulk_client(1, "-t", str(settings.seconds + 3), "-R"), client=True
        )
        time.sleep(0.5)
        numbers = wrk(world, proxy, settings.seconds, "keep", "none", connections=8)
        if stream.process.poll() is not None:
            raise Failed(f"the bulk stream ended early: {stream.say()}")
    return {
        "beside_p99_us": numbers["p99_us"],
        "beside_alone_p99_us": alone["p99_us"],
        "beside_ratio": numbers["p99_us"] / alone["p99_us"],
    }


def live(candidate: Candidate, settings: Settings) -> Numbers:
    """The kernel chooses the client's ports, as it does for real clients."""
    with serving(candidate) as (world, _, _):
        answer = world.ask("live", str(LIVE_CAP), str(HANGS_AFTER_S), timeout=90)
    return {
        "live_count": answer["alive"],
        "live_hung": answer["hung"] + answer["failed"],
        "live_dead": answer["dead"],
    }


def syscalls(candidate: Candidate, settings: Settings) -> Numbers:
    """System calls per connection: each a new one with one request, 64 at once."""
    if not candidate.proxies or not (settings.whole or candidate.main):
        return {}
    with serving(candidate) as (world, proxy, _):
        assert proxy is not None
        summary = world.scratch / "strace"
        to = [word for pid in proxy.pids for word in ("-p", str(pid))]
        strace = world.start("strace", "strace", "-c", "-f", "-o", str(summary), *to)
        deadline = time.monotonic() + 10
        while strace.say().count("attached") < len(proxy.pids):
            strace.check()
            if time.monotonic() > deadline:
                raise Failed(f"strace does not attach: {strace.say()}")
            time.sleep(0.01)
        done = world.ask("churn", str(settings.traced), str(CONCURRENCY))["done"]
        strace.process.send_signal(signal.SIGINT)
        strace.process.wait(10)
        if not done:
            raise Failed("no connection was served under strace")
        calls = _calls(summary.read_text())
    each = {f"syscall_{name}": count / done for name, count in calls.items()}
    return each | {"syscalls": sum(each.values())}


def _calls(summary: str) -> dict[str, int]:
    """Calls by name out of `strace -c`: lines "% time seconds usecs/call calls [errors] name"."""
    found = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?([a-z_0-9]+)$", summary, re.M)
    return {name: int(count) for count, name in found if name != "total"}


def curve(candidate: Candidate, settings: Settings) -> Numbers:
    """The churn again, by workers and by how many other connections are open at the same time."""
    if not candidate.proxies or not (settings.whole or candidate.main):
        return {}
    numbers: Numbers = {}
    for workers in settings.curve_workers:
        with serving(candidate, workers) as (world, proxy, _), crowd(world) as reach:
            wrk(world, proxy, 1, "close", "none")  # else the first point would pay the warming up
            for count in settings.curve_open:
                reach(count)
                point = wrk(world, proxy, max(2, settings.seconds // 2), "close", "none")
                numbers |= named(f"curve_{workers}_{count}", point)
    return numbers


TESTS: dict[str, Callable[[Candidate, Settings], Numbers]] = {
    "startup": startup,
    "memory": memory,
    "churn": churn,
    "keepalive": keepalive,
    "single": single,
    "header": header,
    "bulk": bulk,
    "beside": beside,
    "live": live,
    "syscalls": syscalls,
    "curve": curve,
}
