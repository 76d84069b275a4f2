"""Real load balancers: programs of others that send PROXY headers, each in its own way.

They forward bytes (no HTTP), accept over both families, and connect onward to one place. A balancer
with `check` asks its server for health as well: it connects by itself, with a header that says so,
and waits for the server's first words.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from lib.netns import Namespace
from lib.programs import Json, Program, address, listener, quoted, running, typed

BALANCER_PORT = 8080
CHECKS_EVERY_MS = 100

_NGINX = """
load_module modules/ngx_stream_module.so;
daemon off; master_process off; pid {scratch}/pid;
events {{}}
stream {{
  server {{
    listen {port}; listen [::]:{port} ipv6only=on;
    proxy_pass {to};
    proxy_protocol on;
  }}
}}
"""

# HAProxy sends a unique id only where a format makes one. A server that takes its time is no dead
# one: the time for its first words is not that between two checks, as it would be by default.
_HAPROXY = """
global
  nbthread 1
  log stdout format raw local0
defaults
  mode tcp
  log global
  timeout client 10s
  timeout server 10s
  timeout connect 10s
listen balancer
  bind 0.0.0.0:{port}
  bind :::{port} v6only
  unique-id-format balancer-%ci-%cp
  {check}
  server application {to} {send} {options}
"""
_HAPROXY_CHECK = """
  option log-health-checks
  option tcp-check
  timeout check 10s
  tcp-check expect string {check}
"""


@contextlib.contextmanager
def sending(
    program: str,
    namespace: Namespace,
    to: tuple[str, int],
    version: str,
    *,
    port: int = BALANCER_PORT,
    check: str = "",
    v2_options: str = "",
) -> Iterator[Program]:
    """haproxy, nginx or envoy, accepting on `port` and sending `version` (v1, v2) on to `to`.

    `check` is what a healthy server says first (haproxy, envoy); it must be there to say it, for
    Envoy listens once it knows. `v2_options` are HAProxy's proxy-v2-options (crc32c, unique-id).
    """
    assert not v2_options or (program == "haproxy" and version == "v2")
    if program == "nginx":
        assert version == "v1", "nginx sends no v2"
        assert not check, "nginx makes no health checks"

    def config(scratch: Path) -> str:
        match program:
            case "nginx":
                return _NGINX.format(scratch=scratch, port=port, to=quoted(*to))
            case "haproxy":
                return _haproxy(to, version, port, check, v2_options)
            case _:
                return _envoy(to, version, port, check)

    with running(program, namespace, port, config) as process:
        yield process


def _haproxy(to: tuple[str, int], version: str, port: int, check: str, v2_options: str) -> str:
    options = []
    if v2_options:
        options.append(f"proxy-v2-options {v2_options}")
    if check:
        options.append(f"check check-send-proxy inter {CHECKS_EVERY_MS}")
    return _HAPROXY.format(
        port=port,
        to=quoted(*to),
        send="send-proxy" if version == "v1" else "send-proxy-v2",
        options=" ".join(options),
        check=_HAPROXY_CHECK.format(check=check) if check else "",
    )


def _envoy(to: tuple[str, int], version: str, port: int, check: str) -> str:
    plain = typed("envoy.transport_sockets.raw_buffer", "transport_sockets.raw_buffer.v3.RawBuffer")
    sends_headers = typed(
        "envoy.transport_sockets.upstream_proxy_protocol",
        "transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport",
        config={"version": version.upper()},
        transport_socket=plain,
    )
    forward = typed(
        "envoy.filters.network.tcp_proxy",
        "filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix="balancer",
        cluster="application",
    )
    cluster: Json = {
        "name": "application",
        "type": "STATIC",
        "connect_timeout": "10s",
        "transport_socket": sends_headers,
        "load_assignment": {
            "cluster_name": "application",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(*to)}}]}],
        },
    }
    if check:
        every = f"{CHECKS_EVERY_MS / 1000}s"
        cluster["health_checks"] = [
            {
                "timeout": "10s",
                "interval": every,
                "no_traffic_interval": every,
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "reuse_connection": False,
                "tcp_health_check": {"receive": [{"text": check.encode().hex()}]},
            }
        ]
        # Without it, the only server gets connections even while it is thought to be dead.
        cluster["common_lb_config"] = {"healthy_panic_threshold": {"value": 0}}
    resources = {"listeners": [listener(port, forward)], "clusters": [cluster]}
    return json.dumps({"static_resources": resources})
