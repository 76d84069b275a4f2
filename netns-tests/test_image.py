"""The container image with two capabilities, on a read-only root: it works, and leaves nothing."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import pytest
import yaml
from lib.daemon import ROOT, tproxyd
from lib.image import NET, Container, Image, image
from lib.streams import assert_talks, receive_to_end
from lib.topology import V4, Family, Topology
from lib.waits import wait_for

# linux/capability.h: 12 is CAP_NET_ADMIN, 13 CAP_NET_RAW.
BITS = f"{1 << 12 | 1 << 13:016x}"


@pytest.fixture(scope="module")
def built() -> Iterator[Image]:
    with image() as built:
        yield built


@pytest.mark.parametrize("uid", [0, 1337])
def test_the_application_sees_the_client(
    built: Image, net: Topology, family: Family, uid: int
) -> None:
    before = net.pod.dump()
    with Container(built, net.pod, uid=uid) as container:
        container.wait_ready()
        status = container.status()
        assert status["Uid"].split()[0] == str(uid)
        assert {status["CapPrm"], status["CapBnd"]} == {BITS}
        assert int(status["CapEff"], 16) == 1 << 13  # the other one is effective where it is used
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        pair = net.pair(family)
        assert pair.app.getpeername()[0] == family.client
        assert_talks(pair)
        assert net.pod.dump() != before
        pair.client.close()
        pair.app.close()
        container.signal(signal.SIGTERM)
        assert container.wait() == 0
        assert '"downstream_remote_address"' in container.stdout
    assert net.pod.dump() == before


def test_variables_say_whom_to_believe(built: Image, net: Topology) -> None:
    """As in a manifest, without a file.

    Where /proc/sys is read-only conntrack marks answers on their way out, which a packet without a
    route never is on: pods have a default route.
    """
    net.pod.ip(f"route add default via {V4.client}")
    said = {"TPROXYD_TRUSTED": f"{V4.client}/32=require", "TPROXYD_ADMIN": "0.0.0.0:9133"}
    with Container(built, net.pod, environment=said) as container:
        container.wait_ready()
        net.app(V4)
        client = net.connect()
        client.sendall(f"PROXY TCP4 {V4.stranger} {V4.pod} 4711 80\r\n".encode())
        assert net.accept().getpeername()[0] == V4.stranger


def probed(net: Topology) -> int:
    """What the kubelet's HTTP probe gets at the pod's address; 0 while nobody listens."""
    try:
        with net.client.connect(V4.pod, 9133) as node:
            node.sendall(b"GET /readyz HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n")
            return int(receive_to_end(node).split()[1])
    except ConnectionRefusedError:
        return 0


def from_manifest(component: str, kind: str, built: Image, net: Topology) -> Container:
    """The container as it stands in scripts/kubernetes."""
    patch = yaml.safe_load((ROOT / "scripts/kubernetes" / component / "patch.yaml").read_text())
    [said] = patch["spec"]["template"]["spec"][kind]
    return Container(
        built,
        net.pod,
        argv=tuple(said["args"]),
        capabilities=tuple(said["securityContext"]["capabilities"]["add"]),
        uid=said["securityContext"]["runAsUser"],
        environment={each["name"]: each["value"] for each in said["env"]},
    )


def test_the_native_sidecar(built: Image, net: Topology) -> None:
    """Its startup probe succeeds when the application may start, and the proxy never sees it."""
    before = net.pod.dump()
    with from_manifest("sidecar", "initContainers", built, net) as container:
        wait_for(lambda: probed(net) == 200, "the startup probe")
        pair = net.pair()
        assert pair.app.getpeername()[0] == V4.client
        assert probed(net) == 200
        pair.client.close()
        pair.app.close()
        container.signal(signal.SIGTERM)
        assert container.wait() == 0
        assert len(container.stdout.splitlines()) == 1  # the pair; no probe is in the access log
    assert net.pod.dump() == before


def test_init_container_and_sidecar(built: Image, net: Topology) -> None:
    """install with NET_ADMIN alone and an end; then run beside the rules with NET_RAW alone."""
    before = net.pod.dump()
    with from_manifest("pair", "initContainers", built, net) as container:
        assert container.wait() == 0
    with pytest.raises(ConnectionRefusedError):  # nothing goes around the proxy
        net.pair()
    with from_manifest("pair", "containers", built, net):
        wait_for(lambda: probed(net) == 200, "the startup probe")
        pair = net.pair()
        assert pair.app.getpeername()[0] == V4.client
        assert_talks(pair)
    assert tproxyd(net.pod, "clean").returncode == 0
    assert net.pod.dump() == before


@pytest.mark.parametrize("missing", [*NET, ""])
def test_the_capability_that_is_missing_is_named(built: Image, net: Topology, missing: str) -> None:
    before = net.pod.dump()
    left = tuple(name for name in NET if name != missing) if missing else ()
    with Container(built, net.pod, capabilities=left) as container:
        assert container.wait() == 3
        named = set(re.findall(r"CAP_(\w+)", container.stderr))
        assert named == {missing or "NET_ADMIN"}
        assert "Traceback" not in container.stderr
    assert net.pod.dump() == before


def test_one_container(built: Image, net: Topology) -> None:
    """exec: the application in the same container, without a capability."""
    before = net.pod.dump()
    script = (
        "trap 'exit 7' TERM; touch /tmp/written; ls /tmp;"
        "grep -e CapEff -e CapPrm /proc/self/status; sleep 1000 & wait"
    )
    with Container(built, net.pod, argv=("exec", "--", "sh", "-c", script)) as container:
        wait_for(lambda: "CapEff" in container.stdout, "the application")
        assert re.findall(r"Cap\w+:\s*(\w+)", container.stdout) == ["0" * 16] * 2
        assert "written" not in container.stdout
        container.signal(signal.SIGTERM)
        assert container.wait() == 7
    assert net.pod.dump() == before


def test_no_compiler_and_no_pip_in_it(built: Image) -> None:
    found = [
        path.name
        for place in ("usr/bin", "opt/tproxyd/bin")
        for path in (built.root / place).iterdir()
    ]
    assert "tproxyd" in found
    assert not {"cc", "gcc", "c99", "ld", "as"} & set(found)
    assert not list((built.root / "opt/tproxyd").glob("lib/python*/site-packages/tproxyd/tests"))
