"""The one process that resolves the names of upstreams and checks whether they answer.

In a process of its own, beside the supervisor and not in the workers: each name is asked for and
each address is checked once, however many workers there are, and what a name server answers is
parsed by nobody who has privileges. It runs as the user that the workers run as, so a unix socket
that they may not open is down.

Names go through getaddrinfo, so /etc/hosts, nsswitch.conf and resolv.conf count as for every
program (glibc reads a changed resolv.conf by itself since 2.26). That call blocks, hence a thread
for each name: one whose server is silent, 10 s by glibc's defaults, delays no other. It does not
tell how long an answer is good for either: a name is asked for again every `resolve_every_s`,
whatever its TTL, and sooner after a failure. A failure is anything but an address: NXDOMAIN, too,
is more often a mistake of today's than the wish to serve nobody. AI_ADDRCONFIG leaves out the
family that this host has no address of, not counting those of lo: else half of a name's addresses
would be tried in vain wherever there is no IPv6. (So on a host with IPv6 alone, localhost is ::1.)

A check is a TCP connect from our own address; with `send_proxy` the header follows that a proxy
sends for itself: v2 LOCAL (PROXY protocol 2.2), or a v1 line with our own addresses. Then FIN, and
what the upstream had to say is read, because closing over it would send RST, which some servers log
as an error. The first check of an address comes at once and its verdict counts; the second after a
random part of the interval, so that checks do not come in step.

EOF on its socket means that the supervisor is gone: it exits at once, whatever its threads do.

Measured: a check and what follows from it takes 0.7 ms of CPU; the process has 5 MB of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import random

from tproxyd.addr import Endpoint, is_name, is_unix, parse_ip
from tproxyd.config import Config, HealthCheck, Listener, SendProxy
from tproxyd.flow.listen import endpoint
from tproxyd.flow.proxyproto import encode_v1, encode_v2
from tproxyd.linux import CAP_NET_RAW, SO_MARK, name_process
from tproxyd.proc import picture, privileges
from tproxyd.proc.picture import NOT_YET, Address, Entry, Facts, Health

# After a failure a name is asked for again this soon, unless its own interval is shorter.
RETRY_S = 5.0
# What is read of an upstream that has something to say before it closes: a greeting, not a stream.
_READS, _READ_SIZE = 16, 4096


def serve(sock: socket.socket, config: Config, known: Facts) -> None:
    """Tell all facts, one JSON line, whenever one has changed; until the supervisor is gone."""
    name_process("tproxyd/prober")
    # For SO_MARK, and the mark for check sockets that our own rules would intercept.
    privileges.drop(frozenset((CAP_NET_RAW,)) if config.outbound else frozenset())
    sock.setblocking(False)
    asyncio.run(_serve(sock, config, known))


async def _serve(sock: socket.socket, config: Config, known: Facts) -> None:
    loop = asyncio.get_running_loop()
    loop.add_reader(sock, os._exit, 0)  # nothing ever comes but EOF
    changed = asyncio.Event()
    prober = Prober(config, known, changed.set)

    async def tell() -> None:
        while True:
            await changed.wait()
            changed.clear()  # while a line is sent more may change: the next one has it all
            try:
                await loop.sock_sendall(sock, f"{picture.encode(prober.facts())}\n".encode())
            except ConnectionError:
                os._exit(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(tell())
        group.create_task(prober.run())


def look_up(name: str) -> tuple[str, ...]:
    """The addresses of a name, in a stable order; OSError where there is none."""
    found = socket.getaddrinfo(
        name.encode("ascii"), None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    hosts = {endpoint(address).host for *_, address in found}
    return tuple(sorted(hosts, key=lambda host: (":" in host, int(parse_ip(host)))))


@dataclass(slots=True)
class Verdict:
    """What the checks of one address say so far."""

    health: Health = Health.UNCHECKED
    why: str = ""
    against: int = 0  # checks in a row that say otherwise

    def add(self, why: str, rules: HealthCheck) -> None:
        """One more check; `why` it failed, or ""."""
        says = Health.DOWN if why else Health.UP
        if self.health not in (says, Health.UNCHECKED):
            self.against += 1
            if self.against < (rules.fall if why else rules.rise):
                return
        self.health, self.why, self.against = says, why, 0


class Prober:
    """Calls `changed` when `facts()` has become another one."""

    def __init__(self, config: Config, known: Facts, changed: Callable[[], None]) -> None:
        self._lists = {i: each for i, each in enumerate(config.listeners) if each.upstream}
        self._mark = config.listener_mark if config.outbound else 0
        self._changed = changed
        self._answers: dict[tuple[int, str], tuple[str, ...]] = {}
        self._errors: dict[tuple[int, str], str] = {}
        self._verdicts: dict[tuple[int, Endpoint], Verdict] = {}
        self._checks: dict[tuple[int, Endpoint], asyncio.Task[None]] = {}
        self._failures = dict(known.failures)
        self._complete = known.complete
        self._told = known
        # A prober before this one may have known more than the configuration says.
        for i, entries in known.entries.items():
            for entry in entries:
                if is_name(entry.upstream):
                    hosts = tuple(each.where.host for each in entry.addresses)
                    self._answers[i, entry.upstream.host] = hosts
                    self._errors[i, entry.upstream.host] = entry.error
                for each in entry.addresses:
                    self._verdicts[i, each.where] = Verdict(each.health, each.why)

    async def run(self) -> None:
        names = self._answers.keys()
        threads = ThreadPoolExecutor(max(1, len(names)), "resolver")
        async with asyncio.TaskGroup() as self._group:
            for i, name in names:
                self._group.create_task(self._resolve(i, name, threads))
            for i in self._lists:
                self._check_all(i)

    def facts(self) -> Facts:
        return Facts(
            {i: self._entries(i) for i in self._lists}, dict(self._failures), self._complete
        )

    def _entries(self, i: int) -> tuple[Entry, ...]:
        return tuple(
            Entry(
                upstream,
                tuple(self._address(i, where) for where in self._stands_for(i, upstream)),
                self._errors.get((i, upstream.host), ""),
            )
            for upstream in self._lists[i].upstream
        )

    def _stands_for(self, i: int, upstream: Endpoint) -> tuple[Endpoint, ...]:
        hosts = self._answers.get((i, upstream.host), (upstream.host,))
        return tuple(Endpoint(host, upstream.port) for host in hosts)

    def _address(self, i: int, where: Endpoint) -> Address:
        verdict = self._verdicts[i, where]
        return Address(where, verdict.health, verdict.why)

    def _note(self) -> None:
        self._complete = self._complete or (
            NOT_YET not in self._errors.values()
            and all(self._verdicts[key].health != Health.UNCHECKED for key in self._checks)
        )
        facts = self.facts()
        if facts != self._told:
            self._told = facts
            self._changed()

    # Names ------------------------------------------------------------------------------------

    async def _resolve(self, i: int, name: str, threads: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            pause = self._lists[i].resolve_every_s
            try:
                hosts, error = await loop.run_in_executor(threads, look_up, name), ""
            except OSError as failure:
                hosts, error = (), (failure.strerror or str(failure)).lower()
            if hosts:
                self._answers[i, name] = hosts
                self._check_all(i)
            else:
                error = error or "the answer is empty"
                self._failures[i] += 1
                pause = min(pause, RETRY_S)
            self._errors[i, name] = error
            self._note()
            await asyncio.sleep(pause)

    # Checks -----------------------------------------------------------------------------------

    def _check_all(self, i: int) -> None:
        """A check for each address of the listener, and none for those it no longer has."""
        listener = self._lists[i]
        wanted = {(i, where) for each in listener.upstream for where in self._stands_for(i, each)}
        for key in [key for key in self._verdicts if key[0] == i and key not in wanted]:
            del self._verdicts[key]
            if key in self._checks:
                self._checks.pop(key).cancel()
        for key in wanted:
            verdict = self._verdicts.setdefault(key, Verdict())
            if listener.health_check.interval_s and key not in self._checks:
                task = self._group.create_task(self._check(listener, key[1], verdict))
                self._checks[key] = task

    async def _check(self, listener: Listener, where: Endpoint, verdict: Verdict) -> None:
        rules, loop = listener.health_check, asyncio.get_running_loop()
        part = random()
        while True:
            due = loop.time() + part * rules.interval_s
            part = 1.0
            sock, why = None, ""
            try:
                async with asyncio.timeout(rules.timeout_s):
                    sock = await knock(where, listener.send_proxy, self._mark)
            except OSError as error:  # and the TimeoutError of the line above
                why = _why(error, rules.timeout_s)
            verdict.add(why, rules)
            self._note()
            if sock is not None:
                await take_leave(sock, min(rules.timeout_s, due - loop.time()))
            await asyncio.sleep(due - loop.time())


async def knock(where: Endpoint, send_proxy: SendProxy, mark: int) -> socket.socket:
    """A connection to an upstream that has been told who we are. OSError."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if where.is_v6 else socket.AF_INET
    sock = socket.socket(
        socket.AF_UNIX if is_unix(where) else family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    )
    try:
        if is_unix(where):
            # Never in progress: EAGAIN is a full queue, which asyncio would take for success.
            sock.connect(where.host)
        else:
            if mark:
                sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            await loop.sock_connect(sock, where)
        if send_proxy is SendProxy.V2:
            await loop.sock_sendall(sock, encode_v2(None, None))
        elif send_proxy is SendProxy.V1 and is_unix(where):
            await loop.sock_sendall(sock, encode_v1(None, None))
        elif send_proxy is SendProxy.V1:
            ours, theirs = endpoint(sock.getsockname()), endpoint(sock.getpeername())
            await loop.sock_sendall(sock, encode_v1(ours, theirs))
    except BaseException:
        sock.close()
        raise
    return sock


async def take_leave(sock: socket.socket, seconds: float) -> None:
    """Close in order: FIN, and nothing left unread that would make it RST."""
    loop = asyncio.get_running_loop()
    with sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(seconds):
            for _ in range(_READS):
                if not await loop.sock_recv(sock, _READ_SIZE):
                    break


def _why(error: OSError, seconds: float) -> str:
    if isinstance(error, BlockingIOError):
        return "its accept queue is full"
    if error.errno is None:
        return f"no answer within {seconds:g} s"
    return os.strerror(error.errno).lower()
