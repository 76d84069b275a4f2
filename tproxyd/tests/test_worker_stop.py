"""A worker that is told to stop while it has no room for who waits."""

from __future__ import annotations

import errno
import os
import socket
import time
from dataclasses import replace
from typing import NoReturn

import pytest

from tproxyd.flow import listen
from tproxyd.flow.tally import ACCEPT_PAUSES, ACTIVE, CONNECTIONS
from tproxyd.tests.test_worker import PATIENCE_S, SILENT, config, open_files, refused, running


def test_a_stop_serves_what_waits_for_a_place() -> None:
    """Three in the queue, and the two that are open end one after the other: nobody is reset."""
    listening = 2 if listen.has_ipv6() else 1
    with running(config(proxy_protocol=SILENT), before=open_files(68 + listening)) as it:
        it.ready()
        far = [it.connect() for _ in range(5)]
        it.until(ACCEPT_PAUSES, value=1)
        it.until(ACTIVE, "inbound", value=2)
        it.control.send(b"drain\n")
        for each in far:
            each.send(b"GET /")
            refused(each)
        assert it.exit_code() == 0
        assert it.count(CONNECTIONS, "inbound", "header_missing") == 5
        with pytest.raises(ConnectionRefusedError):
            it.connect()


def test_a_stop_resets_what_still_waits_when_its_time_is_up() -> None:
    listening = 2 if listen.has_ipv6() else 1
    short = replace(config(proxy_protocol=SILENT), drain_timeout_s=0.2)
    with running(short, before=open_files(68 + listening)) as it:
        it.ready()
        far = [it.connect() for _ in range(5)]
        it.until(ACCEPT_PAUSES, value=1)
        it.until(ACTIVE, "inbound", value=2)
        it.control.send(b"drain\n")
        for each in far:
            refused(each)
        assert it.exit_code() == 0
        assert it.count(CONNECTIONS, "inbound", "drain_timeout") == 2


def test_a_stop_ends_in_time_where_there_was_never_a_file_for_who_waits() -> None:
    """No connection is open whose end would be the end of the worker."""

    def none_is_free(_: socket.socket) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def before() -> None:  # in its process
        listen.accept = none_is_free  # type: ignore[assignment]

    with running(config(drain_timeout_s=0.2), before=before) as it:
        it.ready()
        far = it.connect()
        deadline = time.monotonic() + PATIENCE_S
        while not it.count(ACCEPT_PAUSES):
            assert time.monotonic() < deadline
            os.sched_yield()
        it.control.send(b"drain\n")
        refused(far)
        assert it.exit_code() == 0
