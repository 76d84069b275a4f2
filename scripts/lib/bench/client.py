"""Our own client: what wrk and iperf3 cannot do. It runs in the client's namespace, by itself.

    client.py first [--to HOST] [--header] [--direct]   ask until somebody answers as expected
    client.py live CAP PATIENCE            keep opening, one at a time, until one hangs
    client.py crowd SOURCE …               stdin: "open N": up to N connections from these addresses
    client.py churn COUNT AT_ONCE          new connections, a request on each

Every answer is one line of JSON on stdout. It measures nothing whose result depends on how fast it
is itself.
"""

from __future__ import annotations

import argparse
import errno
import json
import resource
import select
import socket
import sys
import time
from collections.abc import Iterator

POD, STRANGER = "10.9.1.1", "106.52.131.116"
REQUEST = b"GET / HTTP/1.1\r\nHost: pod\r\n\r\n"
LAST_REQUEST = b"GET / HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n"
WHO = b"GET /who HTTP/1.1\r\nHost: pod\r\n\r\n"

# Between two attempts of `first`: finer than any difference in start-up time that matters, and not
# enough of them to slow down what starts.
ATTEMPT_EVERY_S = 0.002
GIVE_UP_S = 20.0
# What lives answers within milliseconds.
DEAD_AFTER_S = 2.0


def say(**answer: object) -> None:
    print(json.dumps(answer), flush=True)


def begin(to: tuple[str, int], source: tuple[str, int] | None = None) -> socket.socket:
    """A connection under way."""
    sock = socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET)
    sock.setblocking(False)
    if source is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(source)
    error = sock.connect_ex(to)
    if error not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(error, "connect")
    return sock


# first --------------------------------------------------------------------------------------------


def first(args: argparse.Namespace) -> None:
    """Attempts overlap: a SYN that the kernel drops before the proxy is there would wait a second.

    The application says whom it saw. It must be this host, or the header's client; with this
    socket's own port when there is no proxy, and with another one when there is (every candidate
    draws its own). So an answer from before the interception counts for nothing.
    """
    poll = select.epoll()
    attempts: dict[int, tuple[socket.socket, int]] = {}
    to = (args.to, 81 if args.header and args.direct else 80)
    start = now = time.monotonic()
    due, number, seen = start, 0, "nobody answered"
    say(ready=start)
    while now - start < GIVE_UP_S:
        if now >= due:
            due, number = now + ATTEMPT_EVERY_S, number + 1
            sock = begin(to)
            attempts[sock.fileno()] = sock, 20_000 + number % 10_000
            poll.register(sock, select.EPOLLOUT)
        for fd, events in poll.poll(max(0.0, due - now)):
            sock, port = attempts[fd]
            try:
                if events & select.EPOLLOUT:
                    header = f"PROXY TCP4 {STRANGER} {POD} {port} 80\r\n" if args.header else ""
                    sock.send(header.encode() + WHO)
                    poll.modify(fd, select.EPOLLIN)
                    continue
                answer = sock.recv(4096)
                host, own_port = sock.getsockname()[:2]
            except OSError as error:
                answer, seen = b"", str(error)
            if answer.startswith(b"HTTP/1.1 200 "):
                seen = answer.decode().splitlines()[-1]
                if _expected(seen.split(), host, own_port, args.header, args.direct):
                    say(at=time.monotonic(), seen=seen)
                    return
            poll.unregister(fd)
            sock.close()
            del attempts[fd]
        now = time.monotonic()
    sys.exit(f"{args.to}: not served as expected within {GIVE_UP_S:g} s; last seen: {seen}")


def _expected(seen: list[str], host: str, port: int, header: bool, direct: bool) -> bool:
    if direct:
        return seen[2:] == [STRANGER] if header else seen == [host, str(port)]
    return seen[0] == (STRANGER if header else host) and seen[1] != str(port)


# many ---------------------------------------------------------------------------------------------


class Many:
    """Connections that stay open, each of which has been served once."""

    def __init__(self, sources: Iterator[tuple[str, int]] | None = None) -> None:
        """Without `sources` the kernel chooses address and port, as it does for real clients."""
        self.sources = sources
        self.alive: list[socket.socket] = []
        self.poll = select.epoll()

    def open(
        self, count: int, at_once: int, patience: float, last: bool = False
    ) -> tuple[int, int]:
        """`count` more; how many hung (no answer within `patience`), how many failed.

        With `last` each is closed after its answer.
        """
        waiting: dict[int, tuple[socket.socket, float]] = {}
        begun = hung = failed = 0
        while begun < count or waiting:
            while begun < count and len(waiting) < at_once:
                begun += 1
                try:
                    sock = begin((POD, 80), next(self.sources) if self.sources else None)
                except OSError:
                    failed += 1
                    continue
                waiting[sock.fileno()] = sock, time.monotonic() + patience
                self.poll.register(sock, select.EPOLLOUT)
            for fd, events in self.poll.poll(0.1):
                sock, deadline = waiting[fd]
                try:
                    if events & select.EPOLLOUT and not events & select.EPOLLERR:
                        sock.send(LAST_REQUEST if last else REQUEST)
                        self.poll.modify(fd, select.EPOLLIN)
                        continue
                    served = sock.recv(4096).startswith(b"HTTP/1.1 200 ")
                except OSError:
                    served = False
                del waiting[fd]
                self.poll.unregister(fd)
                if served and not last:
                    self.alive.append(sock)
                else:
                    sock.close()
                    failed += not served
            now = time.monotonic()
            for fd, (sock, deadline) in list(waiting.items()):
                if deadline > now:
                    break  # in the order in which they were begun
                hung += 1
                self.poll.unregister(fd)
                del waiting[fd]
                sock.close()
        return hung, failed

    def dead(self, patience: float) -> int:
        """How many of them do not answer one more request."""
        waiting = {}
        failed = 0
        for sock in self.alive:
            try:
                sock.send(REQUEST)
            except OSError:
                failed += 1
                continue
            self.poll.register(sock, select.EPOLLIN)
            waiting[sock.fileno()] = sock
        deadline = time.monotonic() + patience
        while waiting and time.monotonic() < deadline:
            for fd, _ in self.poll.poll(0.1):
                self.poll.unregister(fd)
                sock = waiting.pop(fd)
                try:
                    failed += not sock.recv(4096).startswith(b"HTTP/1.1 200 ")
                except OSError:
                    failed += 1
        for fd in waiting:
            self.poll.unregister(fd)
        return failed + len(waiting)


def live(args: argparse.Namespace) -> None:
    many = Many()
    hung = failed = 0
    while len(many.alive) < args.cap and not hung and not failed:
        hung, failed = many.open(1, 1, args.patience)
    say(alive=len(many.alive), hung=hung, failed=failed, dead=many.dead(DEAD_AFTER_S))


def crowd(args: argparse.Namespace) -> None:
    """From ports that no candidate draws as source ports: not in the range of Linux (32768 to
    60999), nor below it, nor where tproxyd's rotation leads. So the crowd costs what open
    connections cost, and collides with nobody.
    """
    many = Many((source, port) for source in args.sources for port in range(61_000, 65_536))
    say(ready=time.monotonic())
    for line in sys.stdin:
        hung, failed = many.open(int(line.split()[1]) - len(many.alive), 64, 5.0)
        say(open=len(many.alive), hung=hung, failed=failed)


def churn(args: argparse.Namespace) -> None:
    hung, failed = Many().open(args.count, args.at_once, 5.0, last=True)
    say(done=args.count - hung - failed, hung=hung, failed=failed)


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("first")
    command.set_defaults(run=first)
    command.add_argument("--to", default=POD)
    command.add_argument("--header", action="store_true")
    command.add_argument("--direct", action="store_true")
    command = commands.add_parser("live")
    command.set_defaults(run=live)
    command.add_argument("cap", type=int)
    command.add_argument("patience", type=float)
    command = commands.add_parser("crowd")
    command.set_defaults(run=crowd)
    command.add_argument("sources", nargs="+")
    command = commands.add_parser("churn")
    command.set_defaults(run=churn)
    command.add_argument("count", type=int)
    command.add_argument("at_once", type=int)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
