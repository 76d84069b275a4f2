"""How many connections each client has, and how fast it makes new ones, over all workers.

Each worker has a table in shared memory (proc/clients.py owns it) that it alone writes and all
others read: no locks, no system calls, and what a killed worker had counted goes with its table.
A worker counts first and asks afterwards: it adds the connection to its own table, then sums up
all of them, and takes it back if that is over a limit. Two that come at once on two workers see
each other, so a limit is never exceeded; for the last place both may be refused. (Workers that a
reload retires do not see those that come: for the milliseconds in which both accept, each set has
the limit for itself.)

    table    keys, 16 bytes each, 32 to a bucket; then for each key two 64-bit words:
    live     connections open now
    rate     second << 32 | new ones in it << 16 | new ones in the second before it

The key is a hash of 128 bits of the listener's name and the client, keyed with a seed that the
supervisor draws. So nobody can choose addresses that crowd a bucket or share a key, and of a
million clients two share one by accident with a chance of 10^-27; a key read while it is being
written is nobody's; and any text is a client, zone and all ("fe80::1%eth0").

What one process reads while another writes: a count is one aligned word, which x86-64 and arm64
never tear. A new entry's key stands before its counts. An entry is reused when it has no
connection and its rate is more than two seconds old; a reader looks at the key again after the
counts. (arm64 may swap the two looks: a client at its limit is then refused once, wrongly.)
A store may wait in the processor while later loads are answered: of 2 million times that two
processes stored and then loaded what the other stored, both missed it between 2 and 427,039 times,
and never with `_fence` in between. In `enter` itself it was not seen in 600,000 ties without the
fence either, so much does the interpreter store meanwhile; but that is luck, and the fence 0.08 µs.

The rate is a sliding window: new ones in this second, and of those in the last one the share that
a window one second long still covers. So in no second of the clock does a client get more than
max_new_per_s; after a pause it gets them all at once, and in the worst second that begins anywhere
just under twice as many. What is refused does not count: who hammers gets the rate and no more, and
is not locked out.

A client whose bucket is full is counted in this process alone, exactly, but unseen by the others.
A table has twice the entries that a worker can need, and with all of those needed there are 0.05
such clients in it.

enter and leave together, with 2 workers that both have the client: 3.0 µs, 3.8 with a rate; with 8:
4.9 and 7.0. Of it the two hashes are 0.9. Pure.
"""

from __future__ import annotations

import _thread
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from mmap import mmap

from tproxyd.config import PerClient

_KEY = 16  # bytes
_ENTRY = _KEY + 16  # and its two counts
_BUCKET = 32  # entries
SMALLEST = _BUCKET * _ENTRY  # bytes: a table of one bucket
SEED = 16  # bytes
# More than one worker accepts in the seconds that a client is remembered for its rate.
_RECENT = 20_000
_COUNT = 0xFFFF  # the largest count of new connections in a second; more are not told apart

Cells = memoryview | list[int]


def table_size(connections: int) -> int:
    """Bytes of the table of a worker that holds so many connections: 2 MiB for 10,000."""
    buckets = 2 * (connections + _RECENT) // _BUCKET
    return SMALLEST << buckets.bit_length()


class _Rule:
    """A listener's limits, and where its keys begin: by name, for a reload may move it."""

    __slots__ = ("_salt", "connections", "per_s", "why_connections", "why_per_s")

    def __init__(self, listener: str, limits: PerClient, seed: bytes) -> None:
        self.connections, self.per_s = limits.max_connections, limits.max_new_per_s
        self.why_connections = f"per_client.max_connections = {self.connections}"
        self.why_per_s = f"per_client.max_new_per_s = {self.per_s}"
        person = blake2b(listener.encode(), digest_size=blake2b.PERSON_SIZE).digest()
        self._salt = blake2b(digest_size=_KEY, key=seed, person=person)

    def key(self, host: str) -> bytes:
        hashed = self._salt.copy()
        hashed.update(host.encode())
        return hashed.digest()


class ClientCounts:
    """One worker's view: its own table, and what the others have in theirs.

    `limits` are those of the listeners, by name and in order. Where there are none, nothing is
    counted.
    """

    def __init__(
        self, tables: Sequence[mmap], own: int, limits: Mapping[str, PerClient], seed: bytes
    ) -> None:
        """`tables` are all of the same size; the one at `own` is this worker's."""
        both = [(each.find, memoryview(each).cast("Q")) for each in tables]
        self._memory = tables[own]
        self._find, self._cells = both.pop(own)
        self._others = both
        self._counts = len(self._memory) // _ENTRY * _KEY // 8  # where they begin, in words
        self._mask = len(self._memory) // SMALLEST - 1
        self._rules = [
            None if each == PerClient() else _Rule(name, each, seed)
            for name, each in limits.items()
        ]
        self._outside: dict[bytes, list[int]] = {}  # clients whose bucket was full
        self.overflows = 0  # how often one was
        fence = _thread.allocate_lock()
        fence.acquire()
        self._fence = (fence.release, fence.acquire)

    def enter(self, listener: int, host: str, now: float) -> str:
        """Count a connection of a client: "", or the limit against it, and it is not counted.

        `now` is time.monotonic(), now.
        """
        rule = self._rules[listener]
        if rule is None:
            return ""
        key = rule.key(host)
        start = (int.from_bytes(key[:4]) & self._mask) * (_BUCKET * _KEY)
        end = start + _BUCKET * _KEY
        second = int(now)
        found = self._find(key, start, end)
        cells: Cells = self._cells
        if found >= 0:
            at = self._counts + (found >> 3)
        else:
            cells, at = self._place(key, start, second)

        live = cells[at] = cells[at] + 1
        recent = last = was = 0
        if rule.per_s:
            was = cells[at + 1]
            cells[at + 1] = _one_more(was, second)
            recent, last = _counted(cells[at + 1], second)
        # Ours is stored before theirs is read: a release and then an acquire are a full fence, and
        # of a lock that nobody waits for no system call.
        release, acquire = self._fence
        release()
        acquire()
        for find, theirs in self._others:
            found = find(key, start, end)
            if found >= 0:
                there = self._counts + (found >> 3)
                their_live, their_rate = theirs[there], theirs[there + 1]
                if find(key, found, found + _KEY) < 0:
                    continue  # reused for another client meanwhile
                live += their_live
                if rule.per_s and their_rate:
                    more, before = _counted(their_rate, second)
                    recent += more
                    last += before

        if rule.connections and live > rule.connections:
            why = rule.why_connections
        elif rule.per_s and recent + last * (second + 1 - now) > rule.per_s:
            why = rule.why_per_s
        else:
            return ""
        cells[at] -= 1
        if rule.per_s:
            cells[at + 1] = was
        return why

    def leave(self, listener: int, host: str) -> None:
        """A connection that entered has ended."""
        rule = self._rules[listener]
        if rule is None:
            return
        key = rule.key(host)
        start = (int.from_bytes(key[:4]) & self._mask) * (_BUCKET * _KEY)
        found = self._find(key, start, start + _BUCKET * _KEY)
        if found >= 0:
            self._cells[self._counts + (found >> 3)] -= 1
        else:
            self._outside[key][0] -= 1

    def _place(self, key: bytes, start: int, second: int) -> tuple[Cells, int]:
        """Where to count a client that the table does not have."""
        counts = self._outside.get(key)
        if counts is not None and not _is_free(counts[0], counts[1], second):
            return counts, 0
        cells, first = self._cells, self._counts + (start >> 3)
        for at in range(first, first + 2 * _BUCKET, 2):
            if _is_free(cells[at], cells[at + 1], second):
                found = (at - self._counts) << 3
                self._memory[found : found + _KEY] = key
                return cells, at
        self.overflows += 1
        self._outside = {
            each: counts
            for each, counts in self._outside.items()
            if not _is_free(counts[0], counts[1], second)
        }
        self._outside[key] = counts = [0, 0]
        return counts, 0


def _is_free(live: int, rate: int, second: int) -> bool:
    """Whether an entry counts nothing, not even for a reader whose second has not ended yet."""
    return not live and (not rate or second - (rate >> 32) > 2)


def _one_more(rate: int, second: int) -> int:
    age = second - (rate >> 32)
    if age <= 0:
        return rate + 0x10000 if (rate >> 16) & _COUNT < _COUNT else rate
    return second << 32 | 0x10000 | ((rate >> 16) & _COUNT if age == 1 else 0)


def _counted(rate: int, second: int) -> tuple[int, int]:
    """New connections in this second, and in the one before it.

    Another worker may have looked at the clock later: all that it has counts as of this second.
    """
    age = second - (rate >> 32)
    if age == 0:
        return (rate >> 16) & _COUNT, rate & _COUNT
    if age == 1:
        return 0, (rate >> 16) & _COUNT
    if age < 0:
        return ((rate >> 16) & _COUNT) + (rate & _COUNT), 0
    return 0, 0
