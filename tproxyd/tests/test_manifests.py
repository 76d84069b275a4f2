"""The manifests in scripts/kubernetes: against the published schemas, and against our own words."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tproxyd import cli
from tproxyd.config import Config
from tproxyd.configfile import parse

HERE = Path(__file__).resolve().parents[2] / "scripts" / "kubernetes"
# The first with native sidecars by default, and the newest that the schemas know.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
COMPONENTS = ("sidecar", "pair")
# By which field kustomize tells the entries of a list apart (the schemas' x-kubernetes-patch-merge-
# key); other lists are replaced whole.
MERGE_KEYS = {"containers": "name", "initContainers": "name"}

Json = dict[str, Any]


def documents(path: str) -> list[Json]:
    return [document for document in yaml.safe_load_all((HERE / path).read_text()) if document]


def merged(base: Json, patch: Json) -> Json:
    """A strategic merge patch laid over `base`."""
    result = {**base, **patch}
    for key in base.keys() & patch.keys():
        if isinstance(base[key], dict) and isinstance(patch[key], dict):
            result[key] = merged(base[key], patch[key])
        elif by := MERGE_KEYS.get(key):
            assert not {each[by] for each in base[key]} & {each[by] for each in patch[key]}
            result[key] = [*patch[key], *base[key]]
    return result


def deployment(component: str) -> Json:
    """The application of base/ with a component in it, as kustomize builds it."""
    [application] = [each for each in documents("base/whoami.yaml") if each["kind"] == "Deployment"]
    [patch] = documents(f"{component}/patch.yaml")
    patch["metadata"]["name"] = application["metadata"]["name"]  # the target's is kept
    return merged(application, patch)


def manifests() -> Iterator[tuple[str, Json]]:
    for path in ("base/whoami.yaml", "node/daemonset.yaml", "node/namespace.yaml"):
        for each in documents(path):
            yield f"{path} {each['kind']}", each
    for component in COMPONENTS:
        yield component, deployment(component)


MANIFESTS = dict(manifests())
WORKLOADS = {name: MANIFESTS[name] for name in (*COMPONENTS, "node/daemonset.yaml DaemonSet")}


def ours() -> Iterator[tuple[str, Json]]:
    """Every container of ours in every pod."""
    for name, workload in WORKLOADS.items():
        pod = workload["spec"]["template"]["spec"]
        for kind in ("initContainers", "containers"):
            for container in pod.get(kind, ()):
                if container["image"] == "tproxyd":
                    yield f"{name} {kind} {container['name']}", container


OURS = dict(ours())


def variables(container: Json) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", ())}


def configuration(container: Json) -> Config:
    files = {each["mountPath"] for each in container.get("volumeMounts", ())}
    text = (HERE / "node/tproxyd.toml").read_text() if "/etc/tproxyd" in files else ""
    return parse(text, "manifest", variables(container))


# The schemas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_knows_every_field(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_schemas_would_find_a_mistake(name: str) -> None:
    wrong = copy.deepcopy(WORKLOADS[name])
    [first, *_] = wrong["spec"]["template"]["spec"]["containers"]
    first["securityContexts"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("path", sorted(HERE.glob("*/kustomization.yaml")), ids=str)
def test_kustomizations_name_files_that_exist(path: Path) -> None:
    kustomization = yaml.safe_load(path.read_text())
    named = [
        *kustomization.get("resources", ()),
        *kustomization.get("components", ()),
        *(patch["path"] for patch in kustomization.get("patches", ())),
        *(name for each in kustomization.get("configMapGenerator", ()) for name in each["files"]),
    ]
    assert named
    assert [name for name in named if not (path.parent / name).exists()] == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, which has kustomize in it")
def test_kustomize_builds_what_is_validated_here() -> None:
    """So that our own merge is what theirs is."""
    build = ("kubectl", "kustomize", str(HERE / "base"))
    built = subprocess.run(build, capture_output=True, text=True, check=True).stdout
    [theirs] = [each for each in yaml.safe_load_all(built) if each["kind"] == "Deployment"]
    want = deployment("sidecar")
    [container] = want["spec"]["template"]["spec"]["initContainers"]
    container["image"] = "registry.example/tproxyd:0.1.0"
    assert theirs == want


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, which has kustomize in it")
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "DaemonSet"])
def test_into_what_a_component_goes(kind: str, component: str, tmp_path: Path) -> None:
    """Not into a DaemonSet, which may have the node's network: there it would take every port."""
    [application] = [each for each in documents("base/whoami.yaml") if each["kind"] == "Deployment"]
    application["kind"] = kind
    (tmp_path / "application.yaml").write_text(yaml.safe_dump(application))
    where = os.path.relpath(HERE / component, tmp_path.resolve())
    kustomization = {"resources": ["application.yaml"], "components": [where]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    build = ("kubectl", "kustomize", str(tmp_path))
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = yaml.safe_load(done.stdout)
    want = application if kind == "DaemonSet" else deployment(component) | {"kind": kind}
    assert built == want


# Our own words ------------------------------------------------------------------------------------


def test_there_are_four_containers_of_ours() -> None:
    assert len(OURS) == 4


@pytest.mark.parametrize("name", OURS)
def test_arguments_and_settings_are_ours(name: str) -> None:
    args = cli._arguments().parse_args(OURS[name]["args"])
    assert args.command in (cli.run, cli.install)
    config = configuration(OURS[name])
    [listener] = config.listeners
    assert config.workers == 2
    assert listener.intercepts


@pytest.mark.parametrize("name", [name for name in OURS if "install" not in name])
def test_probes_reach_the_admin_endpoint_around_the_proxy(name: str) -> None:
    container = OURS[name]
    config = configuration(container)
    admin, [listener] = config.admin, config.listeners
    assert admin is not None
    ports = {each["name"]: each["containerPort"] for each in container.get("ports", ())}
    asked = {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    for kind, path in asked.items():
        get = container[f"{kind}Probe"]["httpGet"]
        assert (get["path"], ports.get(get["port"], get["port"])) == (path, admin.port)
        # In a pod the kubelet comes from outside; on the node it asks the node itself.
        assert admin.host == get.get("host", "0.0.0.0")
    assert admin.host == "127.0.0.1" or _taken(listener.intercept.exclude_ports, admin.port)


def _taken(ranges: tuple[tuple[int, int], ...], port: int) -> bool:
    return any(low <= port <= high for low, high in ranges)


@pytest.mark.parametrize("name", OURS)
def test_as_few_rights_as_it_takes(name: str) -> None:
    context = OURS[name]["securityContext"]
    changes_rules = {"run": "--install" in OURS[name]["args"], "install": True}
    needs = ["NET_ADMIN"] if changes_rules[OURS[name]["args"][0]] else []
    needs += ["NET_RAW"] if OURS[name]["args"][0] == "run" else []
    assert context["capabilities"] == {"drop": ["ALL"], "add": needs}
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False


def test_the_pair_agrees() -> None:
    install, run = (OURS[name] for name in OURS if name.startswith("pair "))
    assert variables(install) == variables(run)
    assert (install["args"], run["args"]) == (["install"], ["run"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_drain_fits_into_the_grace_period(name: str) -> None:
    pod = WORKLOADS[name]["spec"]["template"]["spec"]
    grace = pod.get("terminationGracePeriodSeconds", 30)
    for each, container in OURS.items():
        if each.startswith(name):
            assert configuration(container).drain_timeout_s < grace


def test_a_node_keeps_the_ports_by_which_it_is_reached() -> None:
    config = parse((HERE / "node/tproxyd.toml").read_text(), "x")
    for port in (22, 6443, 10250):
        assert not _taken(config.listeners[0].intercept.ports, port)
