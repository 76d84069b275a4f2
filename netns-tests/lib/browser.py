"""A headless Chromium inside a namespace, driven over the WebDriver protocol (W3C).

The protocol is JSON over HTTP, and the standard library speaks both: one function is the whole
client. chromedriver runs in the namespace, and so does the browser that it starts; we reach it
through a socket of that namespace.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lib.netns import Namespace
from lib.waits import wait_for

DRIVER_PORT = 9515  # of a namespace that has no other
# A browser on a busy machine: half a second to start when alone.
START_S, COMMAND_S = 60.0, 60.0

_SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # which it can't have as root
    "--disable-gpu",
    "--disable-dev-shm-usage",  # small in a container
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
)


def missing() -> str:
    """Why there can be no browser here; "" where there can."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"there is no {name}; try: apt-get install chromium chromium-driver"
    return ""


class Browser:
    """`with Browser(namespace) as browser:`; one window."""

    def __init__(self, namespace: Namespace, width: int = 1280, height: int = 900) -> None:
        self._namespace = namespace
        self._size = width, height

    def __enter__(self) -> Browser:
        self._profile = Path(tempfile.mkdtemp(prefix="tproxyd-browser-"))
        try:
            self._start()
        except BaseException as error:
            error.add_note(self._said())
            self._end()
            raise
        return self

    def _start(self) -> None:
        with (self._profile / "driver").open("wb") as said:
            self._driver = subprocess.Popen(
                self._namespace.argv("chromedriver", f"--port={DRIVER_PORT}"),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, "HOME": str(self._profile)},
                start_new_session=True,  # the browser's processes are of its group
            )
        wait_for(self._listens, "chromedriver to listen", START_S)
        width, height = self._size
        told = self._ask(
            "POST",
            "/session",
            capabilities={
                "alwaysMatch": {
                    "browserName": "chrome",
                    "goog:chromeOptions": {
                        "args": [
                            *_SWITCHES,
                            f"--window-size={width},{height}",
                            f"--user-data-dir={self._profile / 'profile'}",
                        ]
                    },
                    "goog:loggingPrefs": {"browser": "ALL"},
                }
            },
        )
        self._session = f"/session/{told['sessionId']}"

    def _listens(self) -> bool:
        assert self._driver.poll() is None, "chromedriver ended"
        with contextlib.suppress(ConnectionRefusedError):
            self._namespace.connect("127.0.0.1", DRIVER_PORT).close()
            return True
        return False

    def _said(self) -> str:
        text = (self._profile / "driver").read_text(errors="replace")
        return f"--- chromedriver ---\n{text[-4000:]}"

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._ask("DELETE", self._session)
        self._end()

    def _end(self) -> None:
        if driver := getattr(self, "_driver", None):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        # Processes of it that are about to end may still write there.
        shutil.rmtree(self._profile, ignore_errors=True)

    def _ask(self, method: str, path: str, **what: Any) -> Any:  # noqa: ANN401 - foreign JSON
        connection = http.client.HTTPConnection("127.0.0.1", DRIVER_PORT)
        connection.sock = self._namespace.connect("127.0.0.1", DRIVER_PORT)
        with contextlib.closing(connection):
            connection.sock.settimeout(COMMAND_S)
            body = json.dumps(what) if method == "POST" else None
            connection.request(method, path, body, {"Content-Type": "application/json"})
            value = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    # ----- what a test does with it

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._session}/url", url=url)

    def run(self, script: str, *args: object) -> Any:  # noqa: ANN401
        """What a JavaScript function body returns in the page."""
        path = f"{self._session}/execute/sync"
        return self._ask("POST", path, script=script, args=args)

    def text(self, selector: str) -> str:
        """What a person reads there."""
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)

    def console(self) -> list[str]:
        """What was written to the console since the last look, by the page or about it."""
        entries = self._ask("POST", f"{self._session}/se/log", type="browser")
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def devtools(self, command: str, **what: object) -> Any:  # noqa: ANN401
        path = f"{self._session}/goog/cdp/execute"
        return self._ask("POST", path, cmd=command, params=what)

    def prefer(self, scheme: str) -> None:
        """ "light" or "dark"."""
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=wanted)

    def resize(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))
