"""A relay in the model of tcpmodel.py: what is done to it, and the laws that hold at any time."""

from __future__ import annotations

from dataclasses import dataclass

from tproxyd.errors import CloseReason
from tproxyd.flow.pipes import Pipe
from tproxyd.flow.relay import Limits, Relay
from tproxyd.tests.tcpmodel import BUFFER, PIPE, FakeDriver, FakeTcp, Net, Outcome

LIMITS = Limits(idle_s=100.0, half_close_s=10.0)


class Watched(Relay):
    """Tells a play when it is over."""

    def __init__(self, play: Play, early: bytes, limits: Limits) -> None:
        super().__init__(play.client, play.app, early, limits)
        self.play = play

    def finished(self, reason: CloseReason, detail: str, aborted: bool) -> None:
        self.play.finished(Outcome.of(self, reason, detail, aborted))


class Play:
    """One relay between two fake connections, and the laws that hold for it at any time."""

    def __init__(
        self,
        early: bytes = b"",
        window: int = 40,
        limits: Limits = LIMITS,
        pipes: int = 1,
    ) -> None:
        self.net = Net()
        self.client = FakeTcp(self.net, "client", 10, window)
        self.app = FakeTcp(self.net, "app", 11, window)
        self.driver = FakeDriver(self.client, self.app, pipes=pipes)
        self.pipes = pipes
        self.early = early
        self.client.far_sent = len(early)  # read by the walk, behind the header
        self.relay = Watched(self, early, limits)
        self.outcomes: list[Outcome] = []

    def start(self) -> None:
        self.relay.start(self.driver)
        self.check()

    def finished(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if outcome.aborted:
            held = self.client.held + self.app.held
            assert not held, "what MSG_MORE holds back is thrown away by a close that resets"
        self.client.closed = self.app.closed = True

    @property
    def over(self) -> bool:
        return bool(self.outcomes)

    def poll(self, order: int = 0) -> None:
        """One epoll_wait, and the events it returned."""
        streams = [self.client, self.app][:: -1 if order else 1]
        batch = [(each, each.told()) for each in streams if each.ready]
        for stream, _ in batch:
            stream.ready = False
        for stream, events in batch:
            self.event(stream, events)
        for _ in range(len(self.driver.tasks)):
            self.driver.tasks.popleft().go_on()
        self.check()

    def event(self, stream: FakeTcp, events: int) -> None:
        """The engine forgets the handlers of a relay that is over, so it never sees these."""
        if events and not self.over and stream in self.driver.handlers:
            self.driver.handlers[stream].on_event(events)
        self.check()

    def settle(self) -> None:
        """Both far ends read all there is, until nothing happens any more. No timer helps."""
        for _ in range(10_000):
            if self.over:
                self.client.held = self.app.held = 0  # close() lets everything go
            self.net.syscall()
            self.client.far_read(1_000_000)
            self.app.far_read(1_000_000)
            if not (self.client.ready or self.app.ready or self.driver.tasks):
                if not self.net.meanwhile:
                    return
                continue
            if not self.over:
                self.poll()
                continue
            return
        raise AssertionError("it never settles")

    def check(self) -> None:
        assert len(self.outcomes) <= 1, "it ended twice"
        lent = 0
        for way in (self.relay.up, self.relay.down):
            if isinstance(way.rest, Pipe):
                assert 0 < way.rest.held <= PIPE
                lent += 1
            else:
                assert len(way.rest) <= max(BUFFER, len(self.early)), "more than a buffer is held"
        assert len(self.driver.pipes) + lent == self.pipes, "a pipe is lost"
        self._check_fin(self.client, self.app)
        self._check_fin(self.app, self.client)

    def _check_fin(self, sender: FakeTcp, receiver: FakeTcp) -> None:
        if receiver.fin:
            what = f"{receiver.name} was told of an end that {sender.name} never said"
            assert sender.far_fin, what
            held = receiver.far_got + len(receiver.outbox)
            assert held == sender.far_sent or receiver.far_rst, "FIN came before the last byte"


@dataclass(frozen=True)
class Op:
    who: str  # "client", "app": the far end acts; "poll", "stale"
    what: str = ""
    size: int = 0
    meanwhile: bool = False  # at the relay's next system call, not now

    def __call__(self, play: Play) -> None:
        if self.who == "poll":
            play.poll(self.size)
        elif self.who == "stale":
            play.event(play.client if self.what == "client" else play.app, self.size)
        elif self.meanwhile:
            play.net.meanwhile.append(lambda: self.act(play))
        else:
            self.act(play)

    def act(self, play: Play) -> None:
        if play.over:
            return
        far = play.client if self.who == "client" else play.app
        match self.what:
            case "write":
                far.far_write(self.size)
            case "read":
                far.far_read(self.size)
            case "fin":
                far.far_finish()
            case "rst":
                far.far_reset()
            case "lie":
                far.lies = True
