"""Connections that come to an end by themselves, one access-log line each, as many as there can be.

Through a gateway in the pod whose upstream refuses: there is nothing to serve, and nothing to wait
for but the end.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

from lib.daemon import Daemon
from lib.gateway import GATEWAY_PORT, gateway, trusting
from lib.netns import Namespace
from lib.waits import wait_for

NOBODY = "127.0.0.1:9"  # the discard port, where nobody listens


def refusing(*settings: str, headers: bool = False) -> str:
    """The configuration. With `headers`, a client says as much as it likes in one."""
    options: dict[str, object] = {"eject_after": 0, "max_connect_attempts": 1}
    if headers:
        options |= {"proxy_protocol": trusting("127.0.0.0/8"), "max_header_bytes": 65_551}
    return "\n".join([*settings, "", gateway(NOBODY, **options)])


def once(namespace: Namespace, first: bytes = b"") -> None:
    """One connection, to its end: a reset, which may come before connect() has returned."""
    with (
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
        namespace.connect("127.0.0.1", GATEWAY_PORT) as client,
    ):
        client.sendall(first)
        while client.recv(65_536):
            pass


class Load:
    """`with Load(pod) as load:` one connection after the other, until the end or `stop`."""

    def __init__(self, namespace: Namespace, first: bytes = b"") -> None:
        self.namespace, self.first = namespace, first
        self.count = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                once(self.namespace, self.first)
                self.count += 1
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """How many there were."""
        self._stop.set()
        self._thread.join()
        assert self.failure is None, f"traffic was disturbed: {self.failure!r}"
        return self.count

    def wait_for_more(self, count: int) -> None:
        until = self.count + count
        wait_for(
            lambda: self.count >= until or self.failure,
            f"{count} more connections",
            60.0,
        )
        assert self.failure is None, f"traffic was disturbed: {self.failure!r}"


def ended(daemon: Daemon) -> float:
    """Connections that the daemon counts as over."""
    return daemon.metric("tproxyd_connections_total")


def dropped(daemon: Daemon) -> float:
    return daemon.metric("tproxyd_access_log_lines_dropped_total")
