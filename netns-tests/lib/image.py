"""The image of scripts/container, run by crun as Kubernetes would: in a pod, with few rights.

The root file system is read-only, /proc/sys as well, there is no writable file but those of /dev,
no_new_privs is set, of all capabilities there are those that the test names, and of system calls
those that podman and CRI-O allow by default (containers/common, pkg/seccomp).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest

from lib.daemon import ROOT, children
from lib.netns import Namespace, run
from lib.waits import wait_for

CACHE = ROOT / ".cache" / "container"
NET = ("NET_ADMIN", "NET_RAW")
_BUILDAH = ("buildah", "--root", f"{CACHE}/storage", "--runroot", "/run/tproxyd-container")
# crun refuses hosts with both versions of cgroups mounted; we want none of either.
_UNIFIED = "mount -t cgroup2 none /sys/fs/cgroup && exec crun --cgroup-manager disabled"
_CRUN = ("unshare", "--mount", "sh", "-c", f'{_UNIFIED} --root /run/tproxyd-crun "$@"', "crun")
_CANNOT = 75  # EX_TEMPFAIL, of build-here: nothing to do with us
_serial = itertools.count(1)


class Image(NamedTuple):
    root: Path
    argv: tuple[str, ...]  # entry point and command
    environment: tuple[str, ...]


@contextlib.contextmanager
def image() -> Iterator[Image]:
    """Built if anything in it has changed, and mounted."""
    if shutil.which("crun") is None:
        pytest.skip("no crun to run the image with; try: apt-get install crun")
    build = (str(ROOT / "scripts/container/build-here"),)
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode == _CANNOT:
        pytest.skip(f"the image is not tested: {built.stderr.strip()}")
    assert built.returncode == 0, built.stderr
    described: dict[str, Any] = json.loads(run(*_BUILDAH, "inspect", "--type", "image", "tproxyd"))
    config = described["OCIv1"]["config"]
    container = run(*_BUILDAH, "from", "--pull-never", "tproxyd").strip()
    try:
        root = Path(run(*_BUILDAH, "mount", container).strip())
        yield Image(root, (*config["Entrypoint"], *config["Cmd"]), tuple(config["Env"]))
    finally:
        run(*_BUILDAH, "umount", container)
        run(*_BUILDAH, "rm", container)


class Container:
    """`with Container(image, pod, …) as container:`, from start until it is gone."""

    def __init__(
        self,
        image: Image,
        namespace: Namespace,
        *,
        argv: tuple[str, ...] = (),  # instead of the image's own, behind its entry point
        capabilities: tuple[str, ...] = NET,
        uid: int = 0,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._image, self._namespace = image, namespace
        self._argv = (image.argv[0], *argv) if argv else image.argv
        self._capabilities = [f"CAP_{name}" for name in capabilities]
        self._uid, self._environment = uid, environment or {}
        self.name = f"tproxyd-{os.getpid()}-{next(_serial)}"

    def __enter__(self) -> Container:
        self._bundle = Path(tempfile.mkdtemp(prefix="tproxyd-"))
        (self._bundle / "config.json").write_text(json.dumps(self._specification()))
        with (self._bundle / "out").open("wb") as out, (self._bundle / "err").open("wb") as err:
            self.process = subprocess.Popen(
                (*_CRUN, "run", "--bundle", str(self._bundle), self.name),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pid in children(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        if error is not None:
            error.add_note(f"--- the container's stderr ---\n{self.stderr}\n--- stdout ---")
            error.add_note(self.stdout)
        shutil.rmtree(self._bundle)

    @property
    def stdout(self) -> str:
        return (self._bundle / "out").read_text()

    @property
    def stderr(self) -> str:
        return (self._bundle / "err").read_text()

    @property
    def pid(self) -> int:
        """Of the container's PID 1, seen from here."""
        return children(self.process.pid)[0]

    def wait_ready(self) -> Container:
        wait_for(
            lambda: "tproxyd: ready in " in self.stderr or self.process.poll() is not None,
            "tproxyd in the container",
        )
        assert self.process.poll() is None, f"exit {self.process.returncode}"
        return self

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self.process.wait(10)

    def status(self) -> dict[str, str]:
        """/proc/PID/status of its PID 1."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        pairs = (line.partition(":") for line in lines)
        return {name: value.strip() for name, _, value in pairs}

    def _specification(self) -> dict[str, Any]:
        """OCI Runtime Specification 1.0, config.md and config-linux.md.

        Another user than root keeps capabilities over execve(2) only where they are ambient.
        """
        sets = ["bounding", "effective", "permitted"]
        sets += ["inheritable", "ambient"] if self._uid else []
        mounts = [
            _mount("/proc", "proc"),
            _mount("/dev", "tmpfs", "nosuid", "mode=755"),
            _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        ]
        return {
            "ociVersion": "1.0.0",
            "process": {
                "user": {"uid": self._uid, "gid": self._uid},
                "args": self._argv,
                "env": [*self._image.environment, *map("=".join, self._environment.items())],
                "cwd": "/",
                "capabilities": dict.fromkeys(sets, self._capabilities),
                "noNewPrivileges": True,
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 20_000, "soft": 1024}],
            },
            "root": {"path": str(self._image.root), "readonly": True},
            "mounts": mounts,
            "linux": {
                "namespaces": [
                    *({"type": kind} for kind in ("pid", "mount", "ipc", "uts")),
                    {"type": "network", "path": f"/run/netns/{self._namespace.name}"},
                ],
                "readonlyPaths": ["/proc/sys"],
                "seccomp": _seccomp(self._capabilities),
            },
        }


def _mount(where: str, kind: str, *options: str) -> dict[str, object]:
    return {"destination": where, "type": kind, "source": kind, "options": options}


_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def _seccomp(capabilities: list[str]) -> dict[str, Any]:
    """The default profile as the specification writes it: without conditions on capabilities."""
    profile = json.loads(Path("/usr/share/containers/seccomp.json").read_text())
    here = _ARCHITECTURES[platform.machine()]

    def holds(rule: dict[str, Any]) -> bool:
        wants, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        return (
            here in wants.get("arches", [here])
            and set(wants.get("caps", ())) <= set(capabilities)
            and not set(excludes.get("caps", ())) & set(capabilities)
        )

    known = ("names", "action", "args", "errnoRet")
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "syscalls": [
            {key: rule[key] for key in known if rule.get(key) is not None}
            for rule in profile["syscalls"]
            if holds(rule)
        ],
    }
