"""One line a connection: its fields and its quoting."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.addr import Client, Endpoint, OriginalDst, Peer, Source, Upstream
from tproxyd.config import Listener, LogFormat, SourceKind
from tproxyd.errors import CloseReason
from tproxyd.flow.announce import Announcement
from tproxyd.flow.proxyproto import Header, describe
from tproxyd.flow.record import Record, formatter, timestamp
from tproxyd.flow.tlv import Tlv
from tproxyd.tests import strategies as wire

FIELDS = {  # Envoy's names, and then ours
    "start_time",
    "duration",
    "bytes_received",
    "bytes_sent",
    "downstream_remote_address",
    "downstream_direct_remote_address",
    "downstream_local_address",
    "upstream_local_address",
    "upstream_local_address_asked",
    "upstream_host",
    "upstreams_failed",
    "upstream_cluster",
    "response_flags",
    "connection_termination_details",
    "listener",
    "close_reason",
    "proxy_protocol",
    "upstream_proxy_protocol",
    "source_fallback",
    "rtt_us",
    "retransmits",
}
LISTENER = Listener()
PEER, CLIENT = Peer(Endpoint("10.9.1.2", 40000)), Client(Endpoint("2001:db8::7", 51234))


def full() -> Record:
    life = Record(LISTENER, PEER, started=100.0, wall=1767225599.9996)
    life.client = CLIENT
    life.dst = OriginalDst(Endpoint("10.9.1.1", 80))
    life.upstream = Upstream(life.dst)
    life.source = Source(Endpoint("2001:db8::7", 16722))
    life.header = Header(2, 60, False, CLIENT, life.dst, (Tlv(5, b"id-1"),))
    life.announced = Announcement(2, "00ff", 3)
    life.fallback = "family"
    life.received, life.sent, life.rtt_us, life.retransmits = 3, 5, 250, 2
    life.reason, life.detail = CloseReason.UPSTREAM_FIN, ""
    return life


def parsed(life: Record, now: float = 101.2345) -> dict[str, Any]:
    line = life.json(now)
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    fields: dict[str, Any] = json.loads(line)
    return fields


# The line -----------------------------------------------------------------------------------------


def test_a_full_line() -> None:
    assert parsed(full()) == {
        "start_time": "2025-12-31T23:59:59.999Z",
        "duration": 1234,
        "listener": "inbound",
        "close_reason": "upstream_fin",
        "response_flags": "-",
        "connection_termination_details": None,
        "bytes_received": 3,
        "bytes_sent": 5,
        "downstream_remote_address": "[2001:db8::7]:51234",
        "downstream_direct_remote_address": "10.9.1.2:40000",
        "downstream_local_address": "10.9.1.1:80",
        "upstream_local_address": "[2001:db8::7]:16722",
        "upstream_local_address_asked": None,
        "upstream_host": "10.9.1.1:80",
        "upstreams_failed": None,
        "upstream_cluster": "inbound|80||",
        "proxy_protocol": {
            "version": 2,
            "destination": "10.9.1.1:80",
            "unique_id": parsed(full())["proxy_protocol"]["unique_id"],
        },
        "upstream_proxy_protocol": {"version": 2, "unique_id": "00ff", "tlvs_left_out": 3},
        "source_fallback": "family",
        "rtt_us": 250,
        "retransmits": 2,
    }


def test_a_line_of_a_connection_that_came_to_nothing() -> None:
    """The same fields, null where there is nothing to say; the peer stands in for the client."""
    fields = parsed(Record(LISTENER, PEER, 0.0, 0.0))
    assert fields.keys() == FIELDS == parsed(full()).keys()
    assert fields["downstream_remote_address"] == "10.9.1.2:40000"
    assert fields["close_reason"] == "internal"
    nothing = {name for name, value in fields.items() if value is None}
    assert nothing == {
        "upstream_proxy_protocol",
        "connection_termination_details",
        "downstream_local_address",
        "upstream_local_address",
        "upstream_local_address_asked",
        "upstream_host",
        "upstreams_failed",
        "upstream_cluster",
        "proxy_protocol",
        "source_fallback",
    }


def test_the_source_that_was_to_be() -> None:
    life = full()
    life.fallback = ""
    first = parsed(life)["upstream_local_address_asked"]
    assert first == "[2001:db8::7]:16722" == parsed(life)["upstream_local_address"]
    life.source = Source(Endpoint("2001:db8::7", 56591))
    assert parsed(life)["upstream_local_address_asked"] == first
    life.listener = replace(LISTENER, source=SourceKind.CLIENT_PORT)
    assert parsed(life)["upstream_local_address_asked"] == "[2001:db8::7]:51234"
    life.listener = replace(LISTENER, source=SourceKind.PROXY)
    assert parsed(life)["upstream_local_address_asked"] is None


def test_upstreams_that_were_tried_before() -> None:
    life = full()
    one, two = Upstream(Endpoint("10.0.0.5", 80)), Upstream(Endpoint("/run/app.sock", 0))
    life.listener = replace(LISTENER, upstream=(one, two))
    life.tried, life.upstream, life.source = ((one, "refused"),), two, None
    fields = parsed(life)
    assert fields["upstreams_failed"] == [{"upstream": "10.0.0.5:80", "why": "refused"}]
    assert fields["upstream_host"] == "unix:/run/app.sock"
    assert fields["upstream_cluster"] == "inbound"
    assert " -> unix:/run/app.sock, not 10.0.0.5:80 (refused) upstream_fin " in life.text(101.0)


@given(st.text(min_size=1))
def test_the_detail_is_quoted(detail: str) -> None:
    life = full()
    life.detail = detail
    assert parsed(life)["connection_termination_details"] == detail


@given(wire.headers)
def test_any_header_makes_a_line(header: Header) -> None:
    life = full()
    life.header = header
    assert parsed(life)["proxy_protocol"] == json.loads(json.dumps(describe(header)))


@pytest.mark.parametrize("reason", CloseReason)
def test_every_reason_has_a_flag_that_envoy_knows(reason: CloseReason) -> None:
    life = full()
    life.reason = reason
    fields = parsed(life)
    assert fields["close_reason"] == reason.value
    assert fields["response_flags"] in {
        "-",
        "UF",
        "UC",
        "DC",
        "UO",
        "UH",
        "DPE",
        "UAEX",
        "SI",
        "LR",
        "NC",
    }
    assert (fields["response_flags"] == "-") == reason.value.endswith("_fin")


def test_text() -> None:
    life = full()
    life.detail = "why"
    assert formatter(LogFormat.TEXT)(life, 101.2345) == (
        "2025-12-31T23:59:59.999Z inbound [2001:db8::7]:51234 via 10.9.1.2:40000"
        " -> 10.9.1.1:80 as [2001:db8::7]:16722 upstream_fin (why) 1234ms"
        " 3B up 5B down rtt 250us"
        ' said {"version": 2, "unique_id": "00ff", "tlvs_left_out": 3}\n'
    )
    bare = Record(LISTENER, PEER, 0.0, 0.0)
    assert formatter(LogFormat.TEXT)(bare, 0.5) == (
        "1970-01-01T00:00:00.000Z inbound 10.9.1.2:40000 -> ? internal 500ms"
        " 0B up 0B down rtt 0us\n"
    )
    assert formatter(LogFormat.JSON)(bare, 0.5).startswith("{")


@given(st.floats(0, 4e9))
def test_timestamps(wall: float) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", timestamp(wall))
