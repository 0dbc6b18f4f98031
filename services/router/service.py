"""What the front doors offer, whatever protocol they speak: from an Ask to Answers."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

from services.protocol.errors import ServiceError
from services.router.admission.admission import Admission
from services.router.admission.line import Turn
from services.router.admission.ticket import Priority, Ticket
from services.router.answer import Answer
from services.router.answering import Answering
from services.router.asking import (
    Ask,
    Chat,
    Prompt,
    Text,
    Tokens,
    check,
    check_choices,
    check_detokenized,
    check_prompt,
    check_tokens,
)
from services.router.beside import beside
from services.router.fleet.registry import Model, Registry
from services.router.metrics import DURATION_SECONDS, REQUESTS, TPOT_SECONDS, of
from services.router.programs.catalogue import Catalogue
from services.router.programs.host import PolicyHost
from services.router.record import Record
from services.router.request import PolicyRequest
from services.router.salts import tenant_salt
from services.router.text.output import NoOutput, TextOutput
from services.router.traces import Traces
from services.router.values import Sampling

log = logging.getLogger(__name__)


class GenerationService:
    """Generates, tokenizes and detokenizes with the fleet's models."""

    def __init__(
        self,
        registry: Registry,
        catalogue: Catalogue,
        host: PolicyHost,
        traces: Traces,
        *,
        admission: Admission,
        max_request_s: float,
        salt_by_tenant: bool = False,
    ) -> None:
        """`salt_by_tenant`: prompts are cached for each tenant apart."""
        self._registry = registry
        self._catalogue = catalogue
        self._host = host
        self._traces = traces
        self._admission = admission
        self._max_request_s = max_request_s
        self._salt_by_tenant = salt_by_tenant

    async def generate(self, ask: Ask) -> AsyncGenerator[Answer, None]:
        """The answer as it comes. Closing the generator, or cancelling its consumer, ends all work for it."""
        with self._record(ask) as record, self._enter(ask):
            model, request = await self._request(ask, record)
            async with (
                self._admission.turn(_ticket(ask, request, model)) as turn,
                self._run(ask, model, request, record, turn) as answering,
            ):
                while not answering.ended:
                    yield await answering.next()

    async def deliver(
        self, ask: Ask, take: Callable[[Answer], bool], wait_for_room: Callable[[], Awaitable[None]]
    ) -> None:
        """As generate, for who need not wait to pass a piece on: `take` is given each in the turn of the event loop in
        which its tokens came; after it has said False, the next comes when `wait_for_room` has returned. Cancelling
        ends all work for it, and so does what `take` raises."""
        with self._record(ask) as record, self._enter(ask):
            model, request = await self._request(ask, record)
            async with (
                self._admission.turn(_ticket(ask, request, model)) as turn,
                self._run(ask, model, request, record, turn) as answering,
            ):
                await answering.deliver(take)
                while not answering.ended:
                    await wait_for_room()
                    await answering.deliver(take)

    @contextmanager
    def entering(self, ask: Ask, n: int, num_asks: int = 1) -> Iterator[None]:
        """Counts `n` answers to each of so many asks, `ask` the first, for as long as the block runs. A refusal counts
        as one request that ended. Overloaded, InvalidRequest, EmptyPrompt."""
        record = self._record(ask)
        with ExitStack() as stack:
            try:
                check(ask)
                check_choices(n)
                stack.enter_context(self._admission.enter(0 if ask.has_entered else num_asks * n))
            except ServiceError as error:
                self._ended(record, error.code.name)
                raise
            yield

    async def encode(self, prompt: Prompt, model_name: str) -> tuple[int, ...]:
        """Token ids of a prompt. Overloaded."""
        check_prompt(prompt)
        with self._admission.enter():
            return await _encode(prompt, self._registry.model(model_name))

    def decode(self, token_ids: tuple[int, ...], model_name: str) -> str:
        """Text of token ids."""
        model = self._registry.model(model_name)
        check_detokenized(token_ids, model)
        return model.tokenizer.decode(token_ids)

    def echo(self, ask: Ask, token_ids: tuple[int, ...]) -> str:
        """The text of a prompt of these ids: as it was given, or what the ids say."""
        return ask.prompt.text if isinstance(ask.prompt, Text) else self.decode(token_ids, ask.model)

    def models(self) -> list[Model]:
        """What can be served now."""
        return self._registry.models()

    def model(self, name: str) -> Model:
        """The model of that name; for an empty name the only one."""
        return self._registry.model(name)

    def _record(self, ask: Ask) -> Record:
        return Record(ask.name or f"{random.getrandbits(64):016x}", ask.time_left_s, self._ended)

    def _enter(self, ask: Ask) -> AbstractContextManager[None]:
        """Counts the request, unless it was, for as long as the block runs. Overloaded, InvalidRequest, EmptyPrompt."""
        check(ask)
        return self._admission.enter(0 if ask.has_entered else 1)

    async def _request(self, ask: Ask, record: Record) -> tuple[Model, PolicyRequest]:
        """What is to be run, by the program on record from now on."""
        # That of an answer which has begun stays what it is, whatever becomes of its name.
        program = beside(ask.beside) if ask.beside is not None else self._catalogue.resolve(ask.policy)
        record.program = record.served_by = program
        record.policy = program.name
        model = self._registry.model(ask.model)
        record.model = model.key.name
        limit_s = self._max_request_s if ask.time_left_s is None else min(ask.time_left_s, self._max_request_s)
        deadline = asyncio.get_running_loop().time() + limit_s
        prompt = await _encode(ask.prompt, model)
        check_tokens(prompt, model)
        sampling = _scoring(ask.sampling) if ask.prompt_only else ask.sampling
        # All that follows, on whatever engine, has this salt: lookups of what is cached, moves, replays, other answers.
        salt = tenant_salt(ask.owner, ask.tenant, ask.cache_salt) if self._salt_by_tenant else ask.cache_salt
        return model, PolicyRequest(record.request_id, model.key, prompt, sampling, salt, deadline)

    def _run(self, ask: Ask, model: Model, request: PolicyRequest, record: Record, turn: Turn) -> Answering:
        assert record.program is not None
        run = self._host.run(record.program, request)
        # All else comes after it: the engine works meanwhile.
        return Answering(run, request, _output(ask, model), record, turn)

    def _ended(self, record: Record, code: str) -> None:
        trace = record.trace(code)
        of(REQUESTS, record.model, record.policy, code).inc()
        of(DURATION_SECONDS, record.model, record.policy).observe(trace.duration_s)
        if record.program is not None:
            if (per_token_s := trace.per_token_s) is not None:
                of(TPOT_SECONDS, record.model, record.policy).observe(per_token_s)
            self._traces.add(record.request_id, trace)
            self._catalogue.ended(record.program, trace)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("request ended", extra={"fields": record.told(trace)})


async def _encode(prompt: Prompt, model: Model) -> tuple[int, ...]:
    match prompt:
        case Text(text):
            return await model.tokenizer.encode(text)
        case Chat(messages):
            return await model.tokenizer.encode_chat(messages)
        case Tokens(ids):
            return ids


def _ticket(ask: Ask, request: PolicyRequest, model: Model) -> Ticket:
    return Ticket(
        request.model,
        len(request.prompt),
        request.sampling.max_tokens,
        Priority(ask.priority) if ask.priority else Priority.NORMAL,
        ask.tenant,
        request.deadline,
        # What a client asks for beyond the context it cannot get, and must not count against its class.
        model.max_context - len(request.prompt),
        follows=ask.beside is not None,
    )


def _output(ask: Ask, model: Model) -> TextOutput | NoOutput:
    if ask.prompt_only:
        return NoOutput()
    detokenizer = model.tokenizer.detokenizer(continues=not isinstance(ask.prompt, Chat))
    return TextOutput(detokenizer, ask.stop, include_stop=ask.include_stop)


def _scoring(sampling: Sampling) -> Sampling:
    """For one that wants its prompt told and no more: engines compute it for one token, which nobody sees."""
    return replace(sampling, max_tokens=1, min_tokens=0, guide=None)
