"""A process in a namespace that does with proc.reconciler what a supervisor would, word by word.

And knocking, which finds a gap in interception: nobody listens here for tproxyd, so a client is
refused as long as the rules stand, and reaches the application where they do not.
"""

from __future__ import annotations

import json
import subprocess
import threading
from types import TracebackType
from typing import Any

from lib.daemon import ROOT, TPROXYD
from lib.netns import Namespace
from lib.topology import V4, V6, Topology

_SUPERVISOR = """
import asyncio, json, os, signal, sys
from tproxyd.configfile import parse
from tproxyd.errors import KernelError
from tproxyd.proc.reconciler import Reconciler
from tproxyd.proc.startup import log_to_stderr

async def main():
    loop = asyncio.get_running_loop()
    kernel = Reconciler(parse(json.loads(sys.argv[1]), "test"))
    loop.add_signal_handler(signal.SIGCHLD, lambda: kernel.reaped(os.waitpid(-1, 0)[0]))
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        verb, *config = json.loads(line)
        try:
            if verb == "close":
                kernel.close()
                report = None
            else:
                report = await getattr(kernel, verb)(*(parse(text, "test") for text in config))
            answer = {"changed": getattr(report, "changed", []), "state": str(
                getattr(report, "state", ""))}
        except KernelError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)

log_to_stderr()
asyncio.run(main())
"""


class Supervisor:
    """`do("install")` and so on: the methods of a Reconciler."""

    def __init__(self, pod: Namespace, config: str) -> None:
        self.process = subprocess.Popen(
            pod.argv(TPROXYD[0], "-c", _SUPERVISOR, json.dumps(config)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        _, told = self.process.communicate()
        if error is not None:
            error.add_note(f"--- what the supervisor wrote ---\n{told}")

    def begin(self, verb: str, *config: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([verb, *config]) + "\n")
        self.process.stdin.flush()

    def end(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def do(self, verb: str, *config: str) -> dict[str, Any]:
        self.begin(verb, *config)
        return self.end()


class Knocking:
    """`with Knocking(net):` clients come without a pause, and each of them is refused."""

    def __init__(self, net: Topology) -> None:
        self._net, self._stop = net, threading.Event()
        self._threads = [threading.Thread(target=self._knock, args=(f,)) for f in (V4.pod, V6.pod)]
        self.refused, self.passed = 0, 0

    def _knock(self, host: str) -> None:
        while not self._stop.is_set():
            try:
                self._net.client.connect(host, 80).close()
            except ConnectionRefusedError:
                self.refused += 1
            else:
                self.passed += 1

    def __enter__(self) -> Knocking:
        self._net.app(V4), self._net.app(V6)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def met_a_closed_door(self) -> bool:
        return self.refused > 0 and self.passed == 0
