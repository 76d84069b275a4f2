"""A gateway and a sidecar in one daemon: the sidecar takes nothing that is made to the gateway."""

from __future__ import annotations

import pytest
from lib.daemon import Daemon
from lib.gateway import backend, end, through, to_neighbour
from lib.streams import assert_talks
from lib.topology import Family, Topology


@pytest.mark.parametrize("via", ["tproxy", "redirect"])
@pytest.mark.parametrize("bind", ["*", "address"])
def test_both(net: Topology, family: Family, via: str, bind: str) -> None:
    server = backend(net, family)
    web = to_neighbour(family, bind="*" if bind == "*" else family.pod)
    with Daemon(net.pod, f'{web}\n[[listener]]\nintercept.via = "{via}"\n') as daemon:
        pair = through(net, family, server)
        assert pair.app.getpeername()[0] == family.pod_beyond
        assert_talks(pair)
        end(pair)
        sidecar = net.pair(family)
        assert sidecar.app.getpeername()[0] == family.client
        assert_talks(sidecar)
        end(sidecar)
        records = daemon.wait_log(2)
        assert {record["listener"] for record in records} == {"web", "inbound"}
        net.connect_and_end(family, 15006)
        assert "loop" in {record["close_reason"] for record in daemon.wait_log(3)}
