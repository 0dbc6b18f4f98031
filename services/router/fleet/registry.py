"""All engines of this router, and the models they serve together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from services.router.admission.ticket import Capacity
from services.router.errors import ModelRequired, NoEngine, UnknownModel
from services.router.fleet import choose
from services.router.fleet.block_index import BlockIndex
from services.router.fleet.choose import DECODE, PREFILL, ROLE
from services.router.fleet.info import EngineSnapshot
from services.router.fleet.member import Member
from services.router.fleet.roster import Roster
from services.router.metrics import ENGINES
from services.router.request import ModelKey
from services.router.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_MOST_NAMED = 500  # characters of a sentence that lists models
_COUNT_AGAIN_S = 0.05
_PASSED_OVER = "most engines of its model have other weights, another --dtype or --kv-dtype, or another vocabulary"


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be served now, by at least one engine."""

    key: ModelKey
    tokenizer: Tokenizer
    members: tuple[Member, ...]
    max_context: int  # of the engine with the shortest: a policy may pick any
    vocab_size: int


class Registry:
    """Follows every member while it runs. Engines that give one model name to different weights or vocabularies are
    never mixed: the kind that most of them have is served, then that of the first address."""

    def __init__(self, *, retire_s: float = 600.0) -> None:
        """`retire_s`: how long requests may go on at an engine that was removed."""
        self.members: dict[str, Member] = {}
        self.block_index = BlockIndex()
        self._rosters: dict[ModelKey, Roster[Member]] = {}  # of those that were asked for since the fleet changed
        self._models: dict[str, Model] = {}
        self._known: set[str] = set()  # names of models, of engines that are away too
        self._passed_over: set[Member] = set()  # those that take work and get none
        self._tasks: dict[Member, asyncio.Task[None]] = {}
        self._retiring: dict[Member, asyncio.Task[None]] = {}
        self._retire_s = retire_s
        self._capacities: dict[ModelKey, tuple[float, Capacity]] = {}  # with when it was counted
        self._on_load: list[tuple[Callable[[], None], Callable[[], bool]]] = []
        self._on_report: list[Callable[[EngineSnapshot], None]] = []
        self._listeners: list[Callable[[], None]] = []
        for state in ("healthy", "passed_over", "unhealthy"):  # none is a count too: alerts find it from the first look
            ENGINES.labels(state).set(0)

    def add(self, member: Member) -> None:
        """Begins to follow an engine."""
        self.members[member.address] = member
        self._tasks[member] = asyncio.create_task(member.run(), name=f"member {member.address}")
        member.breaker.show()
        self.changed()

    def remove(self, address: str) -> None:
        """Nothing new begins there. Requests that use it go on."""
        member = self.members.pop(address)
        self._retiring[member] = asyncio.create_task(self._retire(member), name=f"retire {address}")
        self.changed()

    def member(self, address: str) -> Member:
        """The engine of that address. NoEngine if it has been removed."""
        member = self.members.get(address)
        if member is None:
            raise NoEngine(f"engine {address} has been removed", retry_delay_s=_RETRY_S)
        return member

    async def stop(self) -> None:
        """Ends every stream and sequence."""
        tasks = [*self._retiring.values(), *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        members = {*self.members.values(), *self._retiring, *self._tasks}
        await asyncio.gather(*(member.client.close() for member in members))

    async def _retire(self, member: Member) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._retire_s):
                await member.unused()
        member.let_go()
        task = self._tasks.pop(member)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await member.client.close()
        member.blocks.close()
        if member.address not in self.members:
            member.breaker.hide()
        del self._retiring[member]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever an engine joined or left."""
        self._listeners.append(listener)

    def on_load(self, listener: Callable[[], None], wants: Callable[[], bool]) -> None:
        """Calls `listener` for each load report while `wants()`."""
        self._on_load.append((listener, wants))

    def on_report(self, listener: Callable[[EngineSnapshot], None]) -> None:
        """Calls `listener` with each engine that has told its load."""
        self._on_report.append(listener)

    def loaded(self, member: Member) -> None:
        """An engine has told its load."""
        for report in self._on_report:
            report(member.snapshot())
        for listener, wants in self._on_load:
            if wants():
                self._capacities.clear()
                listener()

    def moved(self, member: Member) -> None:
        """An engine's load has changed."""
        for roster in self._rosters.values():
            roster.moved(member)

    def opened(self, member: Member) -> None:
        """An engine's breaker has opened."""
        for roster in self._rosters.values():
            roster.opened(member)

    def changed(self) -> None:
        """An engine joined or left."""
        self._find_duplicates()
        healthy = [member for member in self.members.values() if member.healthy]
        num_duplicates = sum(bool(member.duplicate_of) for member in self.members.values())
        self._models = _models(healthy)
        self._pass_over(set(healthy).difference(*(model.members for model in self._models.values())))
        ENGINES.labels("healthy").set(len(healthy) - len(self._passed_over))
        ENGINES.labels("passed_over").set(len(self._passed_over))
        ENGINES.labels("unhealthy").set(len(self.members) - len(healthy) - num_duplicates)
        self._known = {member.info.model.name for member in self.members.values() if member.info is not None}
        self._rosters.clear()
        self._capacities.clear()
        for listener in self._listeners:
            listener()
        for listener, _ in self._on_load:
            listener()

    def _find_duplicates(self) -> None:
        """An engine at several addresses, as a name has them that resolves to IPv4 and IPv6, counts once: it has the
        room of one engine, and cannot send KV to itself."""
        first: dict[bytes, str] = {}
        for member in self.members.values():
            address = member.address
            if not member.problem and member.info is not None and member.info.incarnation:
                address = first.setdefault(member.info.incarnation, member.address)
            member.duplicate_of = "" if address == member.address else address

    def state(self, member: Member) -> str:
        """Why a member gets no work; empty if it does."""
        return member.state or (_PASSED_OVER if member in self._passed_over else "")

    def engines(self, key: ModelKey) -> list[EngineSnapshot]:
        """Engines that take work for that model now, by name and address."""
        model = self._models.get(key.name)
        if model is None or model.key != key:
            return []
        return [member.snapshot() for member in model.members if member.breaker.admits]

    def roster(self, key: ModelKey) -> Roster[Member]:
        """The engines that take work for that model now, to choose from."""
        roster = self._rosters.get(key)
        if roster is None:
            model = self._models.get(key.name)
            members = model.members if model is not None and model.key == key else ()
            roster = self._rosters[key] = Roster(members, self.block_index)
        return roster

    def capacity(self, key: ModelKey) -> Capacity:
        """What the engines of a model can take in all, counted anew after a moment: fleets may be large."""
        now, known = time.monotonic(), self._capacities.get(key)
        if known is None or now - known[0] >= _COUNT_AGAIN_S:
            model = self._models.get(key.name)
            known = now, _capacity(model.members if model is not None and model.key == key else ())
            self._capacities[key] = known
        return known[1]

    def models(self) -> list[Model]:
        """What can be served now, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def model(self, name: str) -> Model:
        """The model of that name; for an empty name the only one. NoEngine, UnknownModel, ModelRequired."""
        model = self._models.get(name)
        if model is not None:
            return model
        known = self._known
        if name and known and name not in known:
            others = ", ".join(sorted(known))[:_MOST_NAMED]
            raise UnknownModel(f"no engine serves a model named {name[:100]!r}; there is {others}")
        if not name and len(known) > 1:
            raise ModelRequired(f"name one of the models: {', '.join(sorted(known))}")
        if not name and self._models:
            return next(iter(self._models.values()))
        raise NoEngine("no healthy engine serves this model", retry_delay_s=_RETRY_S)

    def _pass_over(self, members: set[Member]) -> None:
        for member in members - self._passed_over:
            model = member.info.model.name if member.info is not None else ""
            fields = {"address": member.address, "model": model, "why": _PASSED_OVER}
            log.warning("engine gets no work", extra={"fields": fields})
        self._passed_over = members


def _place(member: Member) -> tuple[str, str]:
    """Of one that has joined: every router over the same fleet has its engines in the same order."""
    return choose.name(member.snapshot())


def _capacity(members: Sequence[Member]) -> Capacity:
    """Where engines are labelled with both roles, sequences count where they decode and prompts where they prefill."""
    roles = {member: member.label(ROLE) for member in members if member.breaker.admits}
    has_roles = {PREFILL, DECODE} <= set(roles.values())
    num_engines = sequences = others_sequences = others_prompt_tokens = 0
    for member, role in roles.items():
        if not (has_roles and role == DECODE):
            num_engines += 1
            others_prompt_tokens += member.others.prompt_tokens
        if not (has_roles and role == PREFILL) and member.info is not None:
            sequences += max(1, member.info.max_batch_size)
            others_sequences += member.others.sequences
    return Capacity(num_engines, sequences, others_sequences, others_prompt_tokens)


def _models(healthy: Iterable[Member]) -> dict[str, Model]:
    """The models that these engines serve, by name."""
    groups: defaultdict[ModelKey, list[Member]] = defaultdict(list)
    for member in healthy:
        if member.info is not None:
            groups[member.info.model].append(member)
    models: dict[str, Model] = {}
    # Sorting is stable: of equally large groups the one that was met first stays first.
    for key, members in sorted(groups.items(), key=lambda group: -len(group[1])):
        infos = [member.info for member in members if member.info is not None]
        tokenizer = members[0].tokenizer
        if key.name not in models and tokenizer is not None:
            models[key.name] = Model(
                key,
                tokenizer,
                tuple(sorted(members, key=_place)),
                max_context=min(info.max_context for info in infos),
                vocab_size=min(info.vocab_size for info in infos),
            )
    return models
