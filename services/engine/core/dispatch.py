"""From a command to whoever carries it out, and its refusal back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from services.engine.core import api
from services.engine.core.cache_watch import CacheWatch
from services.engine.core.context import Context
from services.engine.core.generations import Generations
from services.engine.core.prep_recvs import PrepRecvs
from services.engine.core.reservations import Reservations
from services.engine.core.sends import Sends
from services.engine.errors import StepFailed
from services.protocol.errors import ServiceError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Desks:
    """The parts of the core that carry out commands."""

    context: Context
    reservations: Reservations = field(init=False)
    prep_recvs: PrepRecvs = field(init=False)
    generations: Generations = field(init=False)
    sends: Sends = field(init=False)
    cache_watch: CacheWatch = field(init=False)
    drains: list[api.Reply[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reservations = Reservations(self.context)
        self.prep_recvs = PrepRecvs(self.context, self.reservations)
        self.generations = Generations(self.context, self.reservations)
        self.sends = Sends(self.context)
        self.cache_watch = CacheWatch(self.context.pool)

    def take(self, command: api.Command) -> bool:
        """Carries a command out or answers it with its refusal. False if it failed for a reason of the engine's own."""
        try:
            self._dispatch(command)
        except ServiceError as error:
            self._refuse(command, error)
        except Exception:
            _log.exception("a command failed inside the engine", extra={"fields": {"command": type(command).__name__}})
            self._refuse(command, StepFailed("The engine failed to take the request in."))
            return False
        return True

    def fail_all(self, error: ServiceError) -> None:
        """Answers everything that is open; the engine stops."""
        self.generations.fail_all(error)
        self.sends.fail_all(error)
        self.prep_recvs.fail_all(error)
        self.reservations.fail_all(error)
        self._answer_drains(error)

    def answer_drains_if_done(self) -> None:
        """Drain is over when no sequence and no send is left."""
        if self.drains and not len(self.generations) and not len(self.sends):
            self._answer_drains(None)

    def _answer_drains(self, answer: ServiceError | None) -> None:
        drains, self.drains = self.drains, []
        for reply in drains:
            reply(answer)

    def _refuse(self, command: api.Command, error: ServiceError) -> None:
        if isinstance(command, api.StartGenerate):
            self.context.outputs.append(refusal_of(command, error))
        else:
            refuse(command, error)

    def _dispatch(self, command: api.Command) -> None:
        faults, calls = self.context.faults, self.context.calls
        match command:
            case api.StartGenerate():
                faults.reach("start_generate.begin")
                self.generations.start(command)
            case api.PrepRecv():
                faults.reach("prep_recv.begin")
                self.prep_recvs.prep_recv(command)
            case api.RemoteSend():
                faults.reach("remote_send.begin")
                self.sends.remote_send(command)
            case api.Cancel():
                if (call := calls.live(command.key)) is not None:
                    call.cancel()
            case api.Abort():
                if (call := calls.live(command.key)) is not None:
                    call.abort()
                command.reply(None)
            case api.Release():
                self.reservations.release(command)
            case api.Renew():
                command.reply(self.reservations.renew(command))
            case api.ListReservations():
                command.reply(self.reservations.list(command))
            case api.WatchCache():
                self.cache_watch.watch(command.watcher_id, command.on_event)
            case api.UnwatchCache():
                self.cache_watch.unwatch(command.watcher_id)
            case api.GuideReady():
                self.generations.guide_ready(command)
            case api.Drain():
                self.context.draining = True
                self.drains.append(command.reply)
            case _:
                self._take_news(command)

    def _take_news(self, news: api.Command) -> None:
        """What the KV transfer service says."""
        match news:
            case api.GrantProgress():
                self.reservations.grant_progress(news)
            case api.GrantOpened():
                self.reservations.grant_opened(news)
            case api.GrantFailed():
                self.reservations.grant_failed(news)
            case api.GrantDrained():
                self.reservations.grant_drained(news)
            case api.PushEnded():
                self.sends.push_ended(news)
            case api.TransferServiceReady():
                self.context.link.ready(news)
            case api.TransferServiceLost():
                self.context.link.lost()
                self.prep_recvs.service_lost()
                self.reservations.service_lost()
                self.sends.service_lost()


def refuse(command: api.Command, error: ServiceError) -> None:
    """Answers a command with an error; one that has no reply of its own is left alone. Any thread."""
    if isinstance(
        command,
        api.PrepRecv | api.RemoteSend | api.Release | api.Renew | api.Abort | api.ListReservations | api.Drain,
    ):
        command.reply(error)


def refusal_of(command: api.StartGenerate, error: ServiceError) -> api.SequenceOutput:
    """A StartGenerate's refusal, as the listener hears of it."""
    return api.SequenceOutput(command.key, error=error, call_id=command.call_id)
