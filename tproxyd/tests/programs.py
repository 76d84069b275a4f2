"""The program itself as a process: `python -m tproxyd run`, an ordinary listener on loopback.

Nothing of it needs a privilege, and its workers are the real ones.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tproxyd.tests.daemons import free_port
from tproxyd.tests.talker import PATIENCE_S, Talker

ROOT = Path(__file__).resolve().parents[2]


# Puts the files that it gets (their numbers, up to "--") where systemd would, and goes on as
# systemd's child would: execve keeps the pid that LISTEN_PID names.
_START = """
import fcntl, os, sys
at = sys.argv.index("--")
files = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1:at]]
for number, fd in enumerate(files, 3):
    os.dup2(fd, number, inheritable=True)
if files:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(files)))
os.execv(sys.argv[at + 1], sys.argv[at + 1 :])
"""


class Echo:
    """An upstream that says everything back; `with Echo() as echo`, at echo.port."""

    def __enter__(self) -> Echo:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._server.accept()
                threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)


class Program(Talker):
    """`with Program(config) as program`, from its start until every process of it is gone."""

    def __init__(
        self,
        config: str,
        *options: str,
        environment: dict[str, str] | None = None,
        closed: Sequence[int] = (),
    ) -> None:
        """`config` may say PORT and ADMIN, each a free port. It starts without files `closed`."""
        super().__init__()
        self.port, self.admin_port = free_port(), free_port()
        self._config, self._options = config, options
        self._environment = environment or {}
        self._closed = closed
        self._exit = ExitStack()

    def __enter__(self) -> Program:
        self.scratch = Path(self._exit.enter_context(tempfile.TemporaryDirectory()))
        self.file = self.scratch / "tproxyd.toml"
        self.write(self._config)
        self.stderr, self._write = os.pipe()
        self._exit.callback(os.close, self.stderr)
        self._sessions: list[subprocess.Popen[bytes]] = []
        self._start([])
        return self

    def again(self, kept: Sequence[int]) -> None:
        """Start it once more, as systemd would: with these files from descriptor 3 on."""
        self._start(kept)

    def _start(self, kept: Sequence[int]) -> None:
        argv = [sys.executable, "-m", "tproxyd", "run", *self._options, "-c", str(self.file)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, kept), "--", *argv],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._write,
            env={**os.environ, **self._environment},
            start_new_session=True,
            pass_fds=kept,
            preexec_fn=self._close_some,
        )
        self._sessions.append(self.process)
        self.pid = self.process.pid

    def _close_some(self) -> None:
        for fd in self._closed:
            os.close(fd)

    def no_more_of_it(self) -> None:
        """`rest` ends when every process is gone: this one must not hold the pipe either."""
        if self._write >= 0:
            os.close(self._write)
            self._write = -1

    def __exit__(self, *_: object) -> None:
        """Whatever the test did: nothing of it lives on."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for each in self._sessions:
            each.wait()
        self.no_more_of_it()
        self._exit.close()

    def write(self, config: str) -> None:
        text = config.replace("PORT", str(self.port)).replace("ADMIN", str(self.admin_port))
        self.file.write_text(text)

    # What it says

    def wait_ready(self) -> Program:
        self.wait_line(r"ready in \d+ ms")
        return self

    def rest(self) -> list[str]:
        self.no_more_of_it()
        return super().rest()

    def processes(self) -> set[int]:
        """Those that live: what one start began is a session."""
        sessions = {each.pid for each in self._sessions}
        found = set()
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                pid = int(entry.parent.name)
                state = entry.read_text().rpartition(")")[2].split()[0]
                if os.getsid(pid) in sessions and state != "Z":
                    found.add(pid)
        return found

    # What one can do to it

    def signal(self, number: int, pid: int = 0) -> None:
        os.kill(pid or self.pid, number)

    def connect(self, port: int = 0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port), timeout=PATIENCE_S)


def echoes(sock: socket.socket, word: bytes = b"hello") -> bool:
    """Whether what is said on this connection comes back."""
    sock.sendall(word)
    got = b""
    while len(got) < len(word) and (data := sock.recv(len(word) - len(got))):
        got += data
    return got == word
