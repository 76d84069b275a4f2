"""Real servers as the application: programs of others, which read PROXY headers their own way."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.netns import Namespace
from lib.topology import PORT
from lib.waits import wait_for

_NGINX = """
daemon off; master_process off; pid {scratch}/pid; error_log {scratch}/error.log;
events {{}}
http {{
  log_format seen '$proxy_protocol_addr:$proxy_protocol_port'
                  ' to $proxy_protocol_server_addr:$proxy_protocol_server_port';
  access_log {scratch}/seen.log seen;
  client_body_temp_path {scratch}/b; proxy_temp_path {scratch}/p; fastcgi_temp_path {scratch}/f;
  uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s;
  server {{
    listen {port} proxy_protocol; listen [::]:{port} ipv6only=on proxy_protocol;
    return 200 "nginx\\n";
  }}
}}
"""

_HAPROXY = """
global
  log stdout format raw local0
defaults
  mode http
  log global
  timeout client 10s
  timeout server 10s
  timeout connect 10s
frontend application
  log-format "{seen}"
  bind 0.0.0.0:{port} accept-proxy
  bind :::{port} v6only accept-proxy
  http-request return status 200 content-type text/plain string "haproxy"
"""


_SEEN = "%[src]:%[src_port] to %[dst]:%[dst_port] id %[fc_pp_unique_id,hex] for %[fc_pp_authority]"


class Server:
    """One that has PROXY headers in front of every connection, and says who came."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def saw(self) -> str:
        """The last line of its log, once there is one."""
        return wait_for(lambda: self._log.read_text().splitlines(), "a line in its log")[-1]


@contextlib.contextmanager
def serving(program: str, namespace: Namespace) -> Iterator[Server]:
    """nginx or haproxy on the application's port, over both families."""
    with tempfile.TemporaryDirectory(prefix=f"tproxyd-{program}-") as name:
        scratch = Path(name)
        config = _NGINX if program == "nginx" else _HAPROXY
        path = scratch / "config"
        path.write_text(config.format(scratch=scratch, port=PORT, seen=_SEEN))
        log = scratch / "seen.log"
        argv = (
            [program, "-c", str(path)] if program == "nginx" else [program, "-db", "-f", str(path)]
        )
        with (
            log.open("wb") as out,
            (scratch / "err").open("wb") as err,
            subprocess.Popen(namespace.argv(*argv), stdout=out, stderr=err) as process,
        ):
            try:
                listening = f"sport = :{PORT}"
                wait_for(
                    lambda: (
                        namespace.run("ss", "-Hltn", listening).count("LISTEN") == 2
                        or process.poll() is not None
                    ),
                    f"{program} to listen",
                )
                said = (scratch / "err").read_text()
                assert process.poll() is None, f"{program}: exit {process.returncode}: {said}"
                yield Server(log)
            finally:
                process.kill()
