"""`tproxyd exec -- CMD`: a program beside the daemon whose life is the daemon's.

For containers with one entry point: CMD starts when the rules and the listeners stand, signals that
are sent to the daemon are CMD's, and when CMD ends the daemon ends with its exit code, after a
drain. Until then nothing stops interception: an application that shuts down slowly on SIGTERM does
it with its connections alive.

CMD has no capability and gets none: all sets but the bounding one are empty, and with
no_new_privs not even the execve(2) of root fills them from that one (security/commoncap.c,
cap_bprm_creds_from_file: never more than before). What the daemon changed for itself (the limit of
open files, signals) is put back.

CMD gets a process group of its own, and the terminal if we have it: Ctrl-C is for CMD alone, which
would see it twice if we also passed on what the terminal sends to our group.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from tproxyd import child
from tproxyd.errors import KernelError
from tproxyd.linux import CAP_SETGID, CAP_SETUID, CAPABILITY_NAMES, become, capabilities, keep_only

log = logging.getLogger("tproxyd")

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as shells say it
BY_SIGNAL = 128  # and the signal's number

# Before CMD runs, and after, these end the daemon; the others are only ever CMD's.
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_OTHERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGWINCH, signal.SIGCONT)
# Python ignores them from its start, and its child would inherit that.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
# What systemd asks of the daemon, which is its main process.
_OUR_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class User(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def user(text: str) -> User:
    """Whom USER or USER:GROUP names; numbers need not be known here. ValueError if it is nobody."""
    name, colon, group = text.partition(":")
    entry = _entry(name)
    if group:
        gid = _gid(group)
        groups: tuple[int, ...] = ()
    elif colon:
        raise ValueError(f'"{text}" names no group behind its colon')
    elif entry is None:
        gid, groups = int(name), ()
    else:
        gid = entry.pw_gid
        groups = tuple(os.getgrouplist(entry.pw_name, gid))
    return User(entry.pw_uid if entry else int(name), gid, groups, entry.pw_dir if entry else "/")


def _entry(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(_number(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        if name.isdecimal():
            return None
        raise ValueError(f'there is no user "{name}" here') from None


def _gid(name: str) -> int:
    try:
        return _number(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ValueError(f'there is no group "{name}" here') from None


def _number(text: str) -> int:
    if int(text) >= 0xFFFF_FFFF:  # (uid_t)-1 means "leave it"
        raise ValueError(f"{text} is not the number of a user or group")
    return int(text)


class Command:
    """CMD, before, while and after it runs. To be made before the daemon changes its process."""

    def __init__(self, argv: Sequence[str], user: User | None) -> None:
        self._argv, self._user = list(argv), user
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)
        # nohup's SIGHUP, a background job's SIGINT: who ignores one wants CMD to ignore it, too.
        self._ignored = frozenset(
            number
            for number in signal.valid_signals()
            if signal.getsignal(number) is signal.SIG_IGN and number not in _IGNORED_BY_PYTHON
        )
        self.signals = ({*_STOP, *_OTHERS} - self._ignored) | {signal.SIGTERM}
        self._pid = 0
        self._ended: int | None = None  # as waitstatus_to_exitcode gives it
        self._stopped_by = signal.SIGTERM

    def __str__(self) -> str:
        return os.path.basename(self._argv[0]) or self._argv[0]

    def check(self) -> None:
        """KernelError where it can't be started as the user that was asked for."""
        if self._user is None or (self._user.uid, self._user.gid) == (os.geteuid(), os.getegid()):
            return
        missing = sorted({CAP_SETUID, CAP_SETGID} - capabilities())
        if missing:
            names = " and ".join(CAPABILITY_NAMES[number] for number in missing)
            raise KernelError(
                f"run {self} as user {self._user.uid}",
                f"{names} missing",
                "give the daemon these too, or leave --user away and start it as that user"
                " with CAP_NET_ADMIN and CAP_NET_RAW as ambient capabilities",
            )

    @property
    def started(self) -> bool:
        return bool(self._pid) or self._ended is not None

    @property
    def code(self) -> int:
        """What the daemon exits with: CMD's exit code, 128 + n for signal n.

        Where a signal came before CMD could start, as if it had been CMD's end.
        """
        ended = -self._stopped_by if self._ended is None else self._ended
        return ended if ended >= 0 else BY_SIGNAL - ended

    def start(self) -> None:
        """KernelError when there can be no more processes."""
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the terminal is CMD's now; we go on writing
        try:
            self._pid = child.fork(self._run, keep=())
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise KernelError(f"start {self}", why, "allow more processes or memory") from error
        log.info("started %s, pid %d", self, self._pid)

    def takes(self, number: int) -> bool:
        """A signal came: whether it was for CMD, or for nobody."""
        if self._pid:
            os.kill(self._pid, number)  # it is not reaped, so the pid is still its own
            return True
        if not self.started and number in _STOP:
            self._stopped_by = signal.Signals(number)
        return number not in _STOP

    def reaped(self, pid: int, code: int) -> bool:
        """Whether the process that just ended was CMD."""
        if pid != self._pid:
            return False
        self._pid, self._ended = 0, code
        return True

    # In the child -------------------------------------------------------------------------------

    def _run(self) -> NoReturn:
        os.setpgid(0, 0)
        _take_terminal()
        for number in {*self.signals, *_IGNORED_BY_PYTHON, signal.SIGTTOU, signal.SIGINT}:
            signal.signal(number, signal.SIG_DFL)
        for number in self._ignored:
            signal.signal(number, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._files)
        if self._user is not None and self._user[:2] != (os.geteuid(), os.getegid()):
            become(self._user.uid, self._user.gid, self._user.groups)
        keep_only(frozenset())
        try:
            os.execvpe(self._argv[0], self._argv, self._environment(os.environ))
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            hint = "is it in this image, and on the PATH?"
            sys.stderr.write(f"tproxyd: can't run {self._argv[0]}: {why}; {hint}\n")
            sys.exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)

    def _environment(self, ours: Mapping[str, str]) -> dict[str, str]:
        theirs = {name: value for name, value in ours.items() if name not in _OUR_VARIABLES}
        if self._user is not None:
            theirs["HOME"] = self._user.home
        return theirs


def _take_terminal() -> None:
    try:
        ours = os.tcgetpgrp(0) == os.getpgid(os.getppid())
    except OSError:  # stdin is no terminal, or not ours
        return
    if ours:
        os.tcsetpgrp(0, os.getpgrp())  # allowed from the background while SIGTTOU is ignored
