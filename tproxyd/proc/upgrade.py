"""Handing everything over to a new process of the program: `tproxyd upgrade`, or SIGUSR2.

The running supervisor (the predecessor) starts the program anew, by the command line that it was
started with itself, and gives it its listening sockets by the protocol of systemd (LISTEN_FDS; one
more, by the name of "predecessor", is what the two talk over). The four promises of an upgrade are
those that Cloudflare's tableflip makes:

1. No old code runs on once it has worked: the predecessor takes no more connections, ends when
   those it has are done or its drain deadline passes, and touches neither sockets nor kernel state
   again.
2. The successor has time to prepare. It reads its configuration, starts its workers and only then
   asks for the rest; up to there, and in between, the predecessor serves.
3. A successor that fails on the way does no harm: it says why, or just dies, and the predecessor
   takes back what it had let go. Until it is told to have worked, it leaves alone what it was lent.
4. One upgrade at a time.

The predecessor's last word decides; until it has come the successor is on trial, and leaves without
a trace. Where the predecessor dies instead it serves on, unless there is a service manager: that
one starts another, and they would be in each other's way.

The listening sockets are never closed, so nothing in an accept queue is lost; both serve them while
they pass. The kernel state stands all the while and moves in one step where the new program, or a
configuration that has changed, wants another. Counters begin anew, as with every new process.

    successor       predecessor
    ready       →                 its workers accept
                    lets go of kernel state, admin endpoint and command socket
                ←   yours
    serving     →                 it has them; what fails here is "failed: …"
                ←   done          or "no": takes back what it had let go of
                    retires its workers, tells systemd the new MAINPID=, ends
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Sequence

from tproxyd import child
from tproxyd.errors import KernelError
from tproxyd.linux import die_with_parent
from tproxyd.proc import systemd

# For all of the successor's start: names are waited for 3 s, workers 10 s; the kernel state takes
# tenths of a second, and where it takes as long as it may (reconciler.py) the old process goes on.
UPGRADE_TIMEOUT_S = 30.0
# A successor that is dismissed has nothing to drain, and ends at once.
DISMISSED_S = 5.0
NAME = "predecessor"
ADMIN = "admin"
LISTENER = "listener"

_READY, _YOURS, _SERVING, _DONE = "ready", "yours", "serving", "done"
_FAILED, _NO = "failed: ", "no"


class Channel:
    """One word a datagram, both ways; "" when the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    async def hear(self) -> str:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
        except OSError:
            return ""
        return data.decode(errors="replace")

    def say(self, word: str) -> None:
        with contextlib.suppress(OSError):  # it is gone, and will be missed elsewhere
            self._sock.send(word.encode()[:65536])

    def close(self) -> None:
        self._sock.close()


# The predecessor's side ---------------------------------------------------------------------------


class Successor:
    """The new process, from its fork on."""

    def __init__(self, files: Sequence[tuple[str, socket.socket]]) -> None:
        """`files` with their names. KernelError when there can be no more processes."""
        with contextlib.ExitStack() as always, contextlib.ExitStack() as in_vain:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                always.callback(theirs.close)
                in_vain.callback(ours.close)
                told, tell = os.pipe()
                number = always.enter_context(open(told, "rb"))
                given = [*files, (NAME, theirs)]
                with open(tell, "wb"):
                    keep = [tell, *(sock.fileno() for _, sock in given)]
                    self.parent = child.fork(lambda: _stand_between(given, tell), keep)
                pid = number.read()
                if not pid:
                    raise OSError(errno.EAGAIN, "it can't be forked")
                self.pid = int(pid)
                in_vain.pop_all()
            except OSError as error:
                why = (error.strerror or str(error)).lower()
                hint = "allow more processes, files or memory"
                raise KernelError("start the new process", why, hint) from error
        self._channel = Channel(ours)
        self.gone = asyncio.Event()
        self.ending = ""  # how it ended

    async def is_ready(self) -> None:
        await self._expect(_READY)

    async def takes_over(self) -> None:
        """It may have the rest now; until it has. KernelError when it can't."""
        self._channel.say(_YOURS)
        await self._expect(_SERVING)

    async def _expect(self, word: str) -> None:
        heard = await self._channel.hear()
        if heard == word:
            return
        hint = "the old process goes on"
        if heard.startswith(_FAILED):
            raise KernelError("upgrade", f"the new process {heard.removeprefix(_FAILED)}", hint)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):  # EOF comes before SIGCHLD is heard
                await self.gone.wait()
        how = self.ending or "fell silent"
        raise KernelError("upgrade", f"the new process {how}; the log says why", hint)

    def dismiss(self) -> None:
        """It is not wanted (any more)."""
        self._channel.say(_NO)
        self._channel.close()
        if not self.gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    async def is_gone(self) -> None:
        """Dismissed: until it has ended, by SIGKILL where it does not hear."""
        try:
            async with asyncio.timeout(DISMISSED_S):
                await self.gone.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """It serves, and is no descendant of ours any more when this returns."""
        self._channel.say(_DONE)
        self._channel.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.parent, signal.SIGKILL)
            os.waitpid(self.parent, 0)


def _stand_between(files: Sequence[tuple[str, socket.socket]], tell: int) -> None:
    """In the forked child: be the parent of the new process, and end as it ends.

    When it has taken over this one is killed, and the new process is init's child. systemd asks for
    that at the moment it hears MAINPID=: of a main process that is not its own child it would not
    notice the end, nor wait for it at a stop (service_set_main_pid, main_pid_alien).
    """
    die_with_parent()  # nobody else would end it; the new process does not inherit that
    try:
        pid = os.fork()
    except OSError:  # no more processes: then no number is told
        sys.exit(1)
    if pid == 0:
        os.close(tell)
        _execute(files)
    os.write(tell, str(pid).encode())
    # Above all the channel: its EOF means that the new process is gone.
    child.close_all_but({0, 1, 2})
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other handling
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _execute(files: Sequence[tuple[str, socket.socket]]) -> None:
    """In the forked child: become the program that is there now."""
    above = systemd.FIRST_FD + len(files)
    copies = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, above) for _, sock in files]
    for at, copy in enumerate(copies, systemd.FIRST_FD):
        os.dup2(copy, at, inheritable=True)
        os.close(copy)
    environment = {
        **os.environ,
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(files)),
        "LISTEN_FDNAMES": ":".join(name for name, _ in files),
    }
    if "WATCHDOG_PID" in environment:
        environment["WATCHDOG_PID"] = str(os.getpid())
    for number in (*child.FOR_THE_SUPERVISOR, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    path, argv = program(sys.executable, sys.orig_argv)
    try:
        os.execve(path, argv, environment)
    except OSError as error:
        sys.stderr.write(f"tproxyd: can't run {path}: {error.strerror}; is it installed?\n")
        sys.exit(127)


def program(interpreter: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """What to execute, and how, to get the program as it is installed now.

    A script is run by its own first line, not by our interpreter: that of another version may lie
    elsewhere (scripts/install gives each a virtual environment), and ours would find our modules.
    """
    if len(argv) > 1 and argv[1][:1] != "-" and os.access(argv[1], os.X_OK):
        return argv[1], list(argv[1:])
    return interpreter, list(argv)


# The successor's side -----------------------------------------------------------------------------


class Inheritance:
    """What this process was started with: sockets of systemd's keeping, or of a predecessor."""

    def __init__(self) -> None:
        self.listeners: list[socket.socket] = []
        self.admin: socket.socket | None = None
        self.predecessor: Channel | None = None
        for name, sock in systemd.inherited():
            if name == NAME:
                self.predecessor = Channel(sock)
            elif name == ADMIN:
                # It is so already; but a copy of what Python takes for blocking is made blocking,
                # and with it the one that the predecessor accepts from.
                sock.setblocking(False)
                self.admin = sock
            elif sock.type == socket.SOCK_STREAM and sock.family != socket.AF_UNIX:
                sock.setblocking(False)
                self.listeners.append(sock)
            else:
                sock.close()

    async def take_over(self) -> bool:
        """Our workers can accept: kernel state and endpoints may be ours; whether somebody waits
        to hear how that goes.

        KernelError when the predecessor has thought better of it, or is gone and not to be missed.
        """
        await self._tell(_READY, _YOURS, UPGRADE_TIMEOUT_S)
        return self.predecessor is not None

    async def settle(self) -> None:
        """We serve; until that is the predecessor's last word, too. KernelError as above.

        However long it takes, even to be stopped: it may hear us late, and retire then.
        """
        await self._tell(_SERVING, _DONE, None)
        self._hang_up()

    def failed(self, failure: Exception) -> None:
        """The predecessor learns why."""
        if self.predecessor is not None:
            self.predecessor.say(f"{_FAILED}{failure}")
            self._hang_up()

    async def _tell(self, word: str, answer: str, seconds: float | None) -> None:
        if self.predecessor is None:
            return
        self.predecessor.say(word)
        heard = _NO
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                heard = await self.predecessor.hear()
        if heard == answer:
            return
        if heard:
            why = "the process that is to be replaced says no"
            raise KernelError("take over", why, "see its log; it goes on")
        self._hang_up()
        if os.environ.get("NOTIFY_SOCKET"):
            why = "the process that is to be replaced is gone"
            raise KernelError("take over", why, "its service manager starts it again")

    def _hang_up(self) -> None:
        if self.predecessor is not None:
            self.predecessor.close()
            self.predecessor = None
