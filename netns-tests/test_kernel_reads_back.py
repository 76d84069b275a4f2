"""Whatever is written, for any configuration, the real nft lists back as just that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lib.netns import Namespace

from tproxyd.addr import Endpoint, PrefixSet
from tproxyd.config import Config, Intercept, Listener, Scope, SourceKind, Via
from tproxyd.kernel.desired import Facts, desired
from tproxyd.kernel.nft import Nft
from tproxyd.kernel.state import KernelState, diff
from tproxyd.reader import merge_ranges

BACKEND = Endpoint("10.9.2.2", 80)
_networks = st.ip_addresses().flatmap(
    lambda ip: st.integers(1, ip.max_prefixlen).map(
        lambda length: ip_network(f"{ip}/{length}", strict=False)
    )
)
_prefixes = st.lists(_networks, max_size=5).map(PrefixSet)
_ports = st.lists(
    st.tuples(st.integers(1, 65535), st.integers(0, 300)).map(
        lambda pair: (pair[0], min(65535, sum(pair)))
    ),
    max_size=5,
).map(merge_ranges)
_interfaces = st.lists(
    st.from_regex(r"[a-z][a-z0-9._:-]{0,12}\*?", fullmatch=True), max_size=4, unique=True
).map(lambda names: tuple(sorted(names)))
_ids = st.sets(st.integers(0, 40) | st.integers(0, 0xFFFF_FFFE), max_size=5).map(
    lambda ids: tuple(sorted(ids))
)
_ways = st.sampled_from(
    [
        *((Scope.LOCAL, Via.TPROXY), (Scope.LOCAL, Via.REDIRECT)),
        *((Scope.FORWARD, Via.TPROXY), (Scope.OUTBOUND, Via.REDIRECT)),
    ]
)


@st.composite
def _intercepts(draw: st.DrawFn) -> Intercept:
    scope, via = draw(_ways)
    outbound = scope is Scope.OUTBOUND
    return Intercept(
        scope=scope,
        via=via,
        ports=draw(_ports.filter(bool)),
        exclude_ports=draw(_ports),
        sources=draw(_prefixes),
        destinations=draw(_prefixes),
        exclude_destinations=draw(_prefixes),
        interfaces=() if outbound else draw(_interfaces),
        exclude_uids=draw(_ids) if outbound else (),
        exclude_gids=draw(_ids) if outbound else (),
    )


_names = st.from_regex(r"[a-z][a-z0-9_-]{0,30}", fullmatch=True)
_listeners = st.lists(
    st.builds(
        Listener,
        name=_names,
        port=st.integers(1, 65535),
        intercept=_intercepts(),
        source=st.sampled_from(SourceKind),
        upstream=st.sampled_from([(), (BACKEND,)]),
    ),
    min_size=1,
    max_size=3,
    unique_by=(lambda listener: listener.name, lambda listener: listener.port),
).map(tuple)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Namespace]:
    with Namespace("sandbox") as sandbox:
        yield sandbox


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    mark=st.integers(1, 0xFFFF_FFFE),
    listeners=_listeners,
    ipv6=st.booleans(),
    host=st.booleans(),
    intercept=st.booleans(),
)
def test_whatever_is_written_reads_back_equal(
    sandbox: Namespace,
    mark: int,
    listeners: tuple[Listener, ...],
    ipv6: bool,
    host: bool,
    intercept: bool,
) -> None:
    config = replace(Config(), mark=mark, listeners=listeners)
    want = desired(config, facts=Facts(ipv6, host), intercept=intercept).firewall
    nft = Nft()
    sandbox.inside(nft.apply, want)
    have = sandbox.inside(nft.read)
    assert diff(KernelState(firewall=have), KernelState(firewall=want)) == ()
