"""A soak: hours of everyday life in minutes, faults included, and a table of what has drifted.

It ends with 1 when a byte was wrong, lost or doubled, when a connection failed that no fault
excuses, or when memory, files, sockets or latency have grown beyond their bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from lib.daemon import ROOT, Daemon
from lib.netns import Namespace, run
from lib.topology import Topology
from lib.waits import wait_for

from soak import drift, faults

CONFIG = """
workers = 2
drain_timeout_s = 300.0   # what is open at a reload or an upgrade lives for less
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.1.3", "fd00:9:1::3"]
policy = "require"
"""
WARM_UP_S = 8.0
SAMPLE_EVERY_S = 5.0
UNLOGGED = 50  # access-log lines that a worker may take with it
DRAINED_S = 60.0  # what is under way at the end: bulk, stalled readers


class Helper:
    """app.py or load.py at work: its lines of JSON, failures apart."""

    def __init__(self, namespace: Namespace, module: str, *args: str) -> None:
        self.module = module
        self.failures: list[faults.Failure] = []
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()
        path = f"{ROOT}:{ROOT / 'netns-tests'}:{ROOT / 'scripts/lib'}"
        self.process = subprocess.Popen(
            namespace.argv(sys.executable, "-m", module, *args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            if "what" in told:
                self.failures.append({**told, "by": self.module.rpartition(".")[2]})
            else:
                self.answers.put(told)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self, timeout: float) -> dict[str, Any]:
        return self.answers.get(timeout=timeout)

    def check(self) -> None:
        assert self.process.poll() is None, f"{self.module} ended: {self.process.returncode}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def helping(namespace: Namespace, module: str, *args: str) -> Iterator[Helper]:
    helper = Helper(namespace, module, *args)
    try:
        helper.answer(10)  # ready
        yield helper
    finally:
        helper.end()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (30)")
    parser.add_argument("--rate", type=float, default=80.0, help="new connections a second (80)")
    parser.add_argument("--seed", type=int, default=None, help="of load and faults (random)")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}, {args.minutes:g} minutes, {args.rate:g} connections a second")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        net = stack.enter_context(Topology())
        net.client.ip(
            "addr add 10.9.1.3/24 dev c0",
            "addr add fd00:9:1::3/64 dev c0 nodad",
        )
        stack.callback(_end_what_is_left, net.pod)
        app = stack.enter_context(helping(net.pod, "soak.app"))
        daemon = stack.enter_context(Daemon(net.pod, CONFIG))
        load = stack.enter_context(helping(net.client, "soak.load", str(seed), str(args.rate)))
        return soak(daemon, app, load, 60 * args.minutes, random.Random(seed))


def _end_what_is_left(pod: Namespace) -> None:
    """A supervisor that an upgrade has put in the place of ours, and its children."""
    for pid in run("ip", "netns", "pids", pod.name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def soak(daemon: Daemon, app: Helper, load: Helper, seconds: float, rng: random.Random) -> int:
    load.tell(f"run {WARM_UP_S}")
    load.answer(WARM_UP_S + DRAINED_S)
    before = _at_rest(daemon)
    inflicted = faults.Faults(daemon, rng, faults.available(daemon))
    names = ", ".join(f"{fault.name} every {fault.every_s:g} s" for fault in inflicted.faults)
    print(f"faults, about: {names}")

    load.tell(f"run {seconds}")
    inflicted.start()
    began = time.monotonic()
    samples: list[drift.Numbers] = []
    problems: list[str] = []
    minutes = 0
    while (now := time.monotonic() - began) < seconds:
        load.check()
        app.check()
        if now >= SAMPLE_EVERY_S * len(samples):
            samples.append(drift.sample(daemon))
        if now >= 60 * (minutes + 1):
            minutes += 1
            _say_so_far(minutes, inflicted, len(app.failures) + len(load.failures))
        try:
            inflicted.step()
        except AssertionError as error:
            problems.append(str(error))
            break
        time.sleep(0.2)
    result = load.answer(seconds - now + DRAINED_S)
    after = _at_rest(daemon)

    failures = sorted(app.failures + load.failures, key=lambda each: float(each["at"]))
    unexcused = inflicted.unexcused(failures)
    problems += [
        f"{each['at'] - began:7.1f} s  {each['what']} ({each['by']}): {each['detail'][:300]}"
        for each in unexcused
    ]
    problems += _told(daemon, Counter(window.name for window in inflicted.windows))
    rows = drift.table(before, samples, after, result["fifths"])
    problems += [f"{row.name}: {row.broken}" for row in rows if row.broken]

    _say_counts(result, inflicted, failures)
    print(drift.written(rows))
    for problem in problems[:40]:
        print(f"PROBLEM {problem}")
    print(f"{len(problems)} problems" if problems else "clean")
    return int(bool(problems))


def _at_rest(daemon: Daemon) -> drift.Numbers:
    wait_for(lambda: daemon.metric("tproxyd_connections_active") == 0, "the load to end", 30)
    time.sleep(1)  # for the last lines of the access log
    return drift.sample(daemon)


def _told(daemon: Daemon, done: Counter[str]) -> list[str]:
    """What the daemon's own words give away, and whether it has counted right."""
    problems = [
        f"the log: {line}"
        for line in daemon.stderr.splitlines()
        if "bug" in line or "Traceback" in line
    ]
    reasons: Counter[str] = Counter()
    with (daemon.scratch / "out").open() as lines:
        for line in lines:
            reasons[json.loads(line)["close_reason"]] += 1
    if reasons["internal"]:
        problems.append(f"{reasons['internal']} connections ended as internal")
    # A line waits up to 0.05 s for company, and a worker that is killed takes those along.
    unlogged = daemon.metric("tproxyd_connections_total") - reasons.total()
    deaths = done[faults.WORKER_KILLED]
    # A new process counts anew.
    if not done["upgrade"] and not 0 <= unlogged <= UNLOGGED * deaths:
        problems.append(f"{unlogged:g} connections more counted than logged, {deaths} workers died")
    if not daemon.status()["ready"]:
        problems.append(f"not ready: {daemon.status()['not_ready_because']}")
    print(f"ends: {', '.join(f'{count:,} {word}' for word, count in reasons.most_common())}")
    return problems


def _say_so_far(minutes: int, inflicted: faults.Faults, failures: int) -> None:
    counts = Counter(window.name for window in inflicted.windows)
    done = ", ".join(f"{count} × {name}" for name, count in counts.items()) or "no fault yet"
    lost = f"; {failures} ends lost, judged at the end" if failures else ""
    print(f"# minute {minutes}: {done}{lost}", file=sys.stderr, flush=True)


def _say_counts(
    result: dict[str, Any], inflicted: faults.Faults, failures: list[faults.Failure]
) -> None:
    done = ", ".join(f"{count:,} {name}" for name, count in sorted(result["done"].items()))
    print(
        f"done: {done}; {result['moved'] / 2**20:,.0f} MiB;"
        f" the slowest through the proxy {result['worst']['short']:.2f} s,"
        f" beside it {result['worst']['direct']:.2f} s"
    )
    for name in dict.fromkeys(window.name for window in inflicted.windows):
        windows = [window for window in inflicted.windows if window.name == name]
        longest = max(window.mended - window.began for window in windows)
        lost = sum(window.lost for window in windows)
        print(
            f"{name}: {len(windows)} times, whole again within {longest:.2f} s;"
            f" {lost} ends of connections lost by it"
        )
    told = ", ".join(f"{n} {what}" for what, n in Counter(e["what"] for e in failures).items())
    print(f"what the ends told: {told or 'nothing amiss'}")


if __name__ == "__main__":
    sys.exit(main())
