"""The locks of a network namespace: one holder, gone with its process, and no stranger's."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import threading
from multiprocessing.connection import Connection

import pytest

from tproxyd.errors import KernelError
from tproxyd.kernel import claim, machine, nslock
from tproxyd.kernel.nslock import Lock, take
from tproxyd.tests.strangers import needs_root, squatter, stranger


def _no_groups(_: Lock) -> None:
    raise nslock._NoGroups


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> Lock:
    """Nobody else's, in the place of both."""
    number = 0x8000 + secrets.randbelow(0x8000)
    lock = Lock(number, f"\0tproxyd/test/{secrets.token_hex(8)}")
    for module, name in (nslock, "STATE"), (nslock, "KEEPER"), (claim, "KEEPER"):
        monkeypatch.setattr(module, name, lock)
    return lock


@pytest.fixture(params=[pytest.param("groups", marks=needs_root), "names"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One with nfnetlink_log, and one without."""
    if request.param == "names":
        monkeypatch.setattr(nslock, "_group", _no_groups)
        monkeypatch.setattr(nslock, "_GROUPS", "/nowhere")
    return str(request.param)


@pytest.mark.usefixtures("kernel")
def test_the_lock_is_free_again(lock: Lock) -> None:
    for _ in range(3):
        held = take(lock, 0)
        assert held
        assert take(lock, 0) is None
        assert nslock.holder(lock) == os.getpid()
        held.close()
        assert nslock.holder(lock) == 0


@pytest.mark.usefixtures("kernel")
def test_the_second_waits_for_the_first(lock: Lock) -> None:
    order: list[str] = []
    inside, waiting = threading.Event(), threading.Event()

    def second() -> None:
        inside.wait()
        waiting.set()
        with machine._locked():
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with machine._locked():
        assert take(lock, 0) is None
        inside.set()
        waiting.wait()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def _hold(lock: Lock, kernel: str, held: Connection) -> None:
    if kernel == "names":
        nslock._group = _no_groups  # type: ignore[assignment]
    with take(lock, 0) or pytest.fail("it is taken"):
        held.send(os.getpid())
        signal.pause()


def test_a_holder_that_is_killed_holds_nothing(
    lock: Lock, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    holder = context.Process(target=_hold, args=(lock, kernel, theirs))
    holder.start()
    try:
        pid = ours.recv()
        monkeypatch.setattr(machine, "LOCK_PATIENCE_S", 0.05)
        with pytest.raises(KernelError, match=rf"process {pid}\).*; end that process"):
            machine._locked().__enter__()
        monkeypatch.setattr(machine, "LOCK_PATIENCE_S", 10.0)
        os.kill(pid, signal.SIGKILL)
        with machine._locked():
            pass
    finally:
        holder.kill()
        holder.join()
        for end in (ours, theirs):
            end.close()
        holder.close()


# Strangers ----------------------------------------------------------------------------------------


@needs_root
def test_who_may_not_change_the_state_takes_no_lock(lock: Lock) -> None:
    with stranger(), pytest.raises(PermissionError):
        take(lock, 0)
    with take(lock, 0) or pytest.fail("it is taken"):
        with stranger(), pytest.raises(PermissionError):
            take(lock, 0)
        with stranger(), machine._locked():  # he may read
            pass
        with stranger():
            claim.refuse_beside("change the kernel state")
            with pytest.raises(KernelError, match="run it as root, or give it CAP_NET_ADMIN"):
                claim.take("keep the kernel state", "", 0)


@needs_root
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("listens", [True, False])
def test_a_name_that_a_stranger_has_taken_is_no_lock(
    lock: Lock, listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_BESIDE_PATIENCE_S", 0.05)
    monkeypatch.setattr(machine, "LOCK_PATIENCE_S", 0.05)
    with squatter(lock.name, listens=listens):
        assert claim.holder() == ""
        claim.refuse_beside("clean")
        with machine._locked():
            pass
        mine = claim.take("keep the kernel state", "tproxyd (process 7)", 0.05)
        assert mine.doors() == ()
        mine.answer()
        mine.close()


@needs_root
def test_a_keeper_is_named_though_a_stranger_answers_to_its_name(lock: Lock) -> None:
    with squatter(lock.name):
        mine = claim.take("keep the kernel state", "", 0)
        name = f"tproxyd (process {os.getpid()}: "
        assert claim.holder().startswith(name)
        with pytest.raises(KernelError) as caught:
            claim.take("keep the kernel state", "", 0)
        assert caught.value.why.startswith(name)
        assert caught.value.why.endswith(" already keeps the kernel state here")
        mine.close()


@pytest.mark.usefixtures("kernel", "lock")
def test_a_keeper_says_what_it_is_called() -> None:
    assert claim.holder() == ""
    mine = claim.take("keep the kernel state", "tproxyd (process 7: run)", 0)
    told: list[str] = []
    asking = threading.Thread(target=lambda: told.append(claim.holder()))
    asking.start()
    while asking.is_alive():
        mine.answer()
    assert told == ["tproxyd (process 7: run)"]
    assert claim.holder() == f"tproxyd (process {os.getpid()})"  # it has not answered
    mine.close()
    assert claim.holder() == ""


@needs_root
def test_a_kernel_without_nfnetlink_log(lock: Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nslock, "_CONFIGURE", 200 << 8 | 1)  # of a subsystem that is none
    with pytest.raises(nslock._NoGroups):
        nslock._group(lock)
    with take(lock, 0) or pytest.fail("it is taken") as held:
        assert held.getsockname() == lock.name.encode()
