"""What a forked child has of its parent's files: those that it is given, and no others."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tproxyd import child
from tproxyd.tests.talker import PATIENCE_S


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        os.close(fd)


def open_now() -> set[int]:
    found = set()
    for fd in range(2000):
        try:
            os.fstat(fd)
        except OSError:
            continue
        found.add(fd)
    return found


def in_a_child(pipe: tuple[int, int], *keep: int, before: Callable[[], None]) -> set[int]:
    """What is open in a child that is given `keep` by a process that has done `before`."""
    told = pipe[1]

    def tell() -> None:
        os.write(told, repr(open_now()).encode())

    def parent() -> None:
        before()
        there = open_now()
        assert os.waitpid(child.fork(tell, [told, *keep]), 0)[1] == 0
        assert open_now() == there

    assert os.waitpid(child.fork(parent, [*pipe, *keep]), 0)[1] == 0
    return set(map(int, os.read(pipe[0], 4096).decode().strip("{}").split(",")))


def test_it_has_what_it_is_given(pipe: tuple[int, int]) -> None:
    reader, writer = pipe

    def open_some() -> None:
        fcntl.fcntl(reader, fcntl.F_DUPFD, 1000)

    assert in_a_child(pipe, before=open_some) == {0, 1, 2, writer}
    assert in_a_child(pipe, reader, before=open_some) == {0, 1, 2, reader, writer}


def test_none_is_left_to_read_a_directory_by(pipe: tuple[int, int]) -> None:
    def use_up() -> None:
        limit = pipe[1] + 5
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        with suppress(OSError):
            while True:
                os.dup(0)

    assert in_a_child(pipe, before=use_up) == {0, 1, 2, pipe[1]}


# A sandbox, or a Python that was built for an old libc, has no close_range(2), and os.closerange()
# then tries one number after the other. Here system call 436 is ENOSYS, by seccomp(2).
WITHOUT_CLOSE_RANGE = """
import ctypes, errno, os, struct
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER, CLOSE_RANGE = 38, 22, 2, 436
LOAD, EQUAL, RETURN, DENY, ALLOW = 0x20, 0x15, 0x06, 0x0005_0000 | errno.ENOSYS, 0x7FFF_0000
code = struct.pack("=" + 4 * "HBBI", *(
    *(LOAD, 0, 0, 0), *(EQUAL, 0, 1, CLOSE_RANGE), *(RETURN, 0, 0, DENY), *(RETURN, 0, 0, ALLOW)
))
code = ctypes.create_string_buffer(code, len(code))
libc = ctypes.CDLL(None)
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
program = struct.pack("HP", 4, ctypes.addressof(code))
assert libc.prctl(PR_SET_SECCOMP, FILTER, program, 0, 0) == 0
assert libc.syscall(CLOSE_RANGE, 1000, 1000, 0) == -1

from tproxyd import child
assert os.waitpid(child.fork(lambda: None, ()), 0)[1] == 0
"""


def test_where_the_kernel_closes_no_ranges() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_CLOSE_RANGE], check=True, timeout=PATIENCE_S)
