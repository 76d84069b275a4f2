"""scripts/bench: measure, report. Its options are those that `--help` prints."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from bench import candidates, measures, plot, report, results
from bench.candidates import Candidate
from bench.world import Failed, remove_left_behind, run

REPETITIONS = 5


def main() -> int:
    args = _arguments()
    if args.replay:
        found = results.read(args.replay)
    else:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        remove_left_behind()
        try:
            found = _measure(args)
        finally:  # an interrupt may have come while a world was being removed
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            remove_left_behind(ours=True)
    print(report.draw(found), end="")
    if args.json:
        args.json.write_text(found.as_json())
    if args.plot:
        plot.save(found, args.plot)
    return 1 if found.failures else 0


def _arguments() -> argparse.Namespace:
    tests = list(measures.TESTS)
    names = [each.name for each in candidates.ALL]
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure tproxyd beside Envoy and HAProxy, and alone client and application.",
        epilog=f"tests: {', '.join(tests)}; candidates: {', '.join(names)}",
    )

    def words(known: list[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            chosen = text.split(",")
            if wrong := [word for word in chosen if word not in known]:
                raise argparse.ArgumentTypeError(f"{wrong[0]}: known are {', '.join(known)}")
            return chosen

        return read

    parser.add_argument("--quick", action="store_true", help="one short repetition, under 90 s")
    parser.add_argument("--only", type=words(tests), metavar="TEST,…", help="by default all")
    parser.add_argument(
        "--candidates",
        type=words(names),
        metavar="NAME,…",
        help=f"by default {','.join(candidates.DEFAULT)}",
    )
    parser.add_argument("--reps", type=int, metavar="N", help=f"by default {REPETITIONS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything as data, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture: .png or .svg")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="report an older --json again")
    args = parser.parse_args()
    if args.reps is None:
        args.reps = 1 if args.quick else REPETITIONS
    if args.candidates is None:
        args.candidates = measures.QUICK_CANDIDATES if args.quick else candidates.DEFAULT
    if args.only is None:
        args.only = [name for name in tests if not (args.quick and name in measures.QUICK_OMITS)]
    return args


def _measure(args: argparse.Namespace) -> results.Results:
    chosen = [each for each in candidates.ALL if each.name in args.candidates]
    tests = [name for name in measures.TESTS if name in args.only]
    settings = measures.QUICK if args.quick else measures.FULL
    found = results.Results(
        about=_about(),
        settings={each.name: f"{each.title}: {each.settings}" for each in chosen},
        runs={each.name: [] for each in chosen},
    )
    began = time.monotonic()
    try:
        for repetition in range(args.reps):
            for runs in found.runs.values():
                runs.append({})
            turn = repetition % len(chosen)
            for test in tests:
                for each in (*chosen[turn:], *chosen[:turn]):
                    _one(test, each, settings, found)
    except KeyboardInterrupt:
        found.failures.append(f"interrupted in repetition {repetition + 1} of {args.reps}")
    found.about["load"] += f"; {_load()} after {time.monotonic() - began:.0f} s"
    found.about["measured"] = (
        f"medians of {args.reps} repetitions, every test {settings.seconds} s, in a fresh pair of"
        " network namespaces each, TCP by Reno; wrk with one thread and nginx with one worker share"
        " the machine's CPUs with the proxy"
    )
    return found


def _one(
    test: str, candidate: Candidate, settings: measures.Settings, found: results.Results
) -> None:
    repetition = len(found.runs[candidate.name])
    began = time.monotonic()
    try:
        found.runs[candidate.name][-1] |= measures.TESTS[test](candidate, settings)
        how = "done"
    except Failed as error:
        how = f"failed: {error}"
        # What it said itself is above, in full; its last line says most.
        lines = str(error).strip().splitlines()
        said = f"{lines[0][:60]} … {lines[-1]}" if len(lines) > 1 else lines[0]
        found.failures.append(f"{test} of {candidate.name}, repetition {repetition}: {said}")
    took = time.monotonic() - began
    print(f"# {repetition} {test:<10} {candidate.name:<14} {took:5.1f} s {how}", file=sys.stderr)


def _about() -> dict[str, str]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["scripts/bench", *_measuring(sys.argv[1:])]),
        "machine": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} CPUs,"
        f" {int(memory[1]) / 2**20 if memory else 0:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "versions": ", ".join(
            [
                f"tproxyd {_said(str(candidates.TPROXYD), '--version')}",
                f"on Python {_said(str(candidates.TPROXYD.with_name('python')), '--version')}",
                f"Envoy {_said(candidates.envoy_binary(), '--version')}",
                f"HAProxy {_said('haproxy', '-v')}",
                f"nginx {_said('nginx', '-v')}",
                f"iperf3 {_said('iperf3', '--version')}",
                f"wrk {_said('dpkg-query', '-W', 'wrk')}",
            ]
        ),
        "load": f"{_load()}, {_busy():.0%} of the CPUs busy with others, before",
    }


def _measuring(argv: list[str]) -> list[str]:
    """The arguments that decide what is measured, not where it is written."""
    words = iter(argv)
    kept = []
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--json", "--plot"):
            kept.append(word)
        elif not value:
            next(words, None)
    return kept


def _load() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _busy() -> float:
    """What the machine does while we do nothing: it is taken from every candidate."""

    def read() -> tuple[int, int]:
        times = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(times), times[3] + times[4]

    total, idle = read()
    time.sleep(1)
    total_then, idle_then = read()
    return 1 - (idle_then - idle) / (total_then - total)


def _said(*argv: str) -> str:
    """The version in what a program says of itself."""
    said = run("sh", "-c", f"{shlex.join(argv)} 2>&1").replace(argv[0], "")
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else "?"


if __name__ == "__main__":
    sys.exit(main())
