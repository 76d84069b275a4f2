"""A run: the target for so many minutes, what it found, and with --keep a new corpus file."""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from fuzz import corpus

# Longer than a v1 line and a v2 header with both kinds of addresses, a certificate and a few more;
# beyond that there is only more of the same.
LONGEST = 700
# One input costs a few milliseconds when all of its splits are tried: a thousand times that hangs.
HANGS_AFTER_S = 10

WORDS = [
    *(b"PROXY", b"PROXY ", b" TCP4 ", b" TCP6 ", b" UNKNOWN", b"\r\n", b"::ffff:", b"192.0.2.1"),
    *(b"\r\n\r\n\0\r\nQUIT\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", b" 0 65535", b"%eth0"),
    *(b"\x21\x21\0\x24", b"\x20\0\0\0", b"\x21\x31\0\xd8", b"\x03\0\x04\0\0\0\0", b"\x04\0\0"),
    *(b"\x20\0\x05\x07\0\0\0\0", b"\x28\0\x01x", b"\xea\0\x02\x01a", b"\xee\0\x05\x01\0\0\0\0"),
    *(b"\xe0\0\x08", b"\x05\0\x80", b"\x02\0\x05"),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    keep = "write the smallest corpus that reaches all that was reached"
    parser.add_argument("--keep", action="store_true", help=f"{keep} ({corpus.KEPT.name})")
    args = parser.parse_args()

    corpus.WORKING.mkdir(parents=True, exist_ok=True)
    for data in corpus.kept():
        (corpus.WORKING / hashlib.sha1(data).hexdigest()).write_bytes(data)
    with tempfile.TemporaryDirectory(prefix="tproxyd-fuzz-") as name:
        scratch = Path(name)
        failed = _run(scratch, args.minutes)
        for finding in sorted(scratch.glob("found-*")):
            failed = True
            _say_finding(finding.read_bytes())
    if args.keep and not failed:
        _keep()
    return int(failed)


def _run(scratch: Path, minutes: float) -> bool:
    """Whether it ended otherwise than by the time being up; its progress goes to stderr."""
    words = scratch / "words"
    words.write_text("".join(f'"{_escaped(each)}"\n' for each in WORDS))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fuzz.target", str(corpus.WORKING), f"-dict={words}"),
            *(f"-max_total_time={round(60 * minutes)}", f"-timeout={HANGS_AFTER_S}"),
            *(f"-max_len={LONGEST}", f"-artifact_prefix={scratch}/found-"),
            *("-print_final_stats=1", "-reload=0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{corpus.ROOT}:{corpus.ROOT / 'scripts/lib'}"},
    )
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if re.match(r"#\d+\s+(INITED|pulse)", line):
            print(f"# {line.rstrip()}", file=sys.stderr)
    if process.wait() != 0:
        print("".join(line for line in told[-12:] if len(line) < 300), file=sys.stderr)
        return True
    said = "".join(told)
    executions = re.search(r"number_of_executed_units: (\d+)", said)
    reached = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/", said)
    if executions is None or not reached:
        print(f"the fuzzer told no figures:\n{said[-2000:]}", file=sys.stderr)
        return True
    edges, features, inputs = reached[-1]
    print(
        f"no finding in {int(executions[1]):,} executions ({minutes:g} minutes): {edges} edges"
        f" covered, {features} features, {inputs} inputs in the working corpus"
    )
    return False


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _say_finding(data: bytes) -> None:
    from tproxyd.tests import invariant

    print(f"found, {len(data)} bytes: {data!r}")
    try:
        invariant.check(data)
        print("it ended otherwise than by an exception, or only sometimes; see above")
    except Exception:
        print(traceback.format_exc())
    line = base64.b64encode(data).decode()
    print(f"to keep it for ever: echo {line} >>{corpus.FOUND.relative_to(corpus.ROOT)}")


def _keep() -> None:
    from tproxyd.tests import invariant

    worked = [path.read_bytes() for path in corpus.WORKING.iterdir()]
    chosen = corpus.smallest(invariant.check, [*corpus.kept(), *worked])
    corpus.keep(chosen)
    print(f"{corpus.KEPT.relative_to(corpus.ROOT)}: {len(chosen)} inputs")


if __name__ == "__main__":
    sys.exit(main())
