"""Real servers as the application: programs of others, which read PROXY headers their own way."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from lib.netns import Namespace
from lib.programs import Program, address, listener, running, typed
from lib.topology import PORT
from lib.waits import wait_for

_NGINX = """
daemon off; master_process off; pid {scratch}/pid; error_log stderr info;
events {{}}
http {{
  log_format seen '$proxy_protocol_addr:$proxy_protocol_port'
                  ' to $proxy_protocol_server_addr:$proxy_protocol_server_port';
  access_log {scratch}/out seen;
  client_body_temp_path {scratch}/b; proxy_temp_path {scratch}/p; fastcgi_temp_path {scratch}/f;
  uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s;
  server {{
    listen {port} proxy_protocol; listen [::]:{port} ipv6only=on proxy_protocol;
    return 200 "nginx\\n";
  }}
}}
"""

_HAPROXY_SEEN = (
    "%[src]:%[src_port] to %[dst]:%[dst_port] id %[fc_pp_unique_id,hex] for %[fc_pp_authority]"
)
_HAPROXY = """
global
  nbthread 1
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

_ENVOY_ADMIN_PORT = 9901
_ENVOY_SEEN = (
    "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%:%DOWNSTREAM_REMOTE_PORT%"
    " to %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%:%DOWNSTREAM_LOCAL_PORT%"
    " for %FILTER_STATE(envoy.network.proxy_protocol.tlv:FIELD:authority)%\n"
)


class Server:
    """One that has PROXY headers in front of every connection, and says who came."""

    def __init__(self, name: str, program: Program, namespace: Namespace) -> None:
        self._name, self._program, self._namespace = name, program, namespace

    def saw(self) -> str:
        """The last line of its log, once there is one: `client:port to destination:port …`."""
        return wait_for(self._program.said, "a line in its log")[-1]

    def silent(self) -> int:
        """Connections with a good header and nothing behind it, as health checks are.

        Not each one is seen: Envoy does not look at a header that comes together with FIN.
        """
        match self._name:
            case "nginx":
                told = "client closed connection while waiting for request"
                return sum(told in line for line in self._program.complained())
            case "haproxy":
                return sum(" to " in line for line in self._program.said())
            case _:
                found = {name: n for name, n in self._counts().items() if name.endswith("found")}
                return sum(found.values())

    def complaints(self) -> list[str]:
        """What it says against the headers that came."""
        match self._name:
            case "nginx":
                return [line for line in self._program.complained() if "PROXY protocol" in line]
            case "haproxy":
                return [line for line in self._program.said() if " to " not in line]
            case _:
                return [name for name in self._counts() if not name.endswith("found")]

    def _counts(self) -> dict[str, int]:
        """Envoy's counters of PROXY headers, those that are not zero."""
        query = "GET /stats?usedonly&filter=prox HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        with self._namespace.connect("127.0.0.1", _ENVOY_ADMIN_PORT) as sock:
            sock.sendall(query.encode())
            answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        lines = [line.partition(": ") for line in answer.splitlines() if "proxy_proto" in line]
        return {name: int(value) for name, _, value in lines}


@contextlib.contextmanager
def greeting(listener: socket.socket, word: bytes = b"ready") -> Iterator[list[str]]:
    """An application that says one word to everybody, and no more: the hosts that came, so far."""
    hosts: list[str] = []

    def serve() -> None:
        while True:
            try:
                sock, peer = listener.accept()
            except OSError:  # not listening any more
                return
            hosts.append(peer[0])
            with sock, contextlib.suppress(ConnectionError):  # a balancer that is gone
                sock.sendall(word)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield hosts
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextlib.contextmanager
def serving(program: str, namespace: Namespace, port: int = PORT) -> Iterator[Server]:
    """nginx, haproxy or envoy as an HTTP server that answers with its name, over both families.

    It takes no connection without a header.
    """

    def config(scratch: Path) -> str:
        match program:
            case "nginx":
                return _NGINX.format(scratch=scratch, port=port)
            case "haproxy":
                return _HAPROXY.format(seen=_HAPROXY_SEEN, port=port)
            case _:
                return _envoy(port)

    with running(program, namespace, port, config) as process:
        yield Server(program, process, namespace)


def _envoy(port: int) -> str:
    authority = {"tlv_type": 2, "on_tlv_present": {"key": "authority"}}
    reads_headers = typed(
        "envoy.filters.listener.proxy_protocol",
        "filters.listener.proxy_protocol.v3.ProxyProtocol",
        rules=[authority],
        tlv_location="FILTER_STATE",
    )
    seen = typed(
        "envoy.access_loggers.stdout",
        "access_loggers.stream.v3.StdoutAccessLog",
        log_format={"text_format_source": {"inline_string": _ENVOY_SEEN}},
    )
    answer = {
        "match": {"prefix": "/"},
        "direct_response": {"status": 200, "body": {"inline_string": "envoy\n"}},
    }
    http = typed(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="application",
        delayed_close_timeout="0s",  # else it waits a second after "Connection: close"
        use_remote_address=True,
        http_protocol_options={
            "accept_http_10": True,
            "default_host_for_http_10": "application",
        },
        access_log=[seen],
        route_config={
            "virtual_hosts": [{"name": "application", "domains": ["*"], "routes": [answer]}]
        },
        http_filters=[typed("envoy.filters.http.router", "filters.http.router.v3.Router")],
    )
    resources = {"listeners": [listener(port, http, reads_headers)]}
    admin = {"address": address("127.0.0.1", _ENVOY_ADMIN_PORT)}
    return json.dumps({"static_resources": resources, "admin": admin})
