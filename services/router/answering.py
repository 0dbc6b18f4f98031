"""From the chunks of a program to the pieces of an answer, and what is noted of a request on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from services.router.admission.line import Turn
from services.router.errors import PolicyFailed
from services.router.fleet.legs import Legs
from services.router.metrics import TOKENS, TTFT_SECONDS, of
from services.router.programs.program import BoundProgram
from services.router.programs.runner import PolicyRun
from services.router.prompt_logprobs import PromptLogprobs, joined
from services.router.request import PolicyRequest
from services.router.text.output import NoOutput, Piece, TextOutput
from services.router.traces import Trace
from services.router.values import Chunk, FinishReason, Leg, Logprobs, Usage

_TOKENS = tuple(map(TOKENS.labels, ("prompt", "cached", "output")))


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of an answer. The first has the request's name and program, the generating engine's name and the prompt's
    token ids, and what was asked for of the prompt's tokens but the first; the last has finish, usage and legs."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
    legs: tuple[Leg, ...] = ()
    request_id: str = ""
    program: BoundProgram | None = None
    engine: str = ""
    prompt_ids: tuple[int, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None


class Record:
    """What is kept of a request while it runs: for metrics and its trace."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.model, self.policy, self.spec = "none", "none", ""
        self.program: BoundProgram | None = None
        self.first_token_s: float | None = None
        self.output_tokens = 0
        self.is_answered = False  # the last piece was taken
        self.legs = Legs()
        self._begin = time.monotonic()

    def elapsed_s(self) -> float:
        """Since the request came."""
        return time.monotonic() - self._begin

    def told(self, code: str) -> dict[str, object]:
        """For the log, when it has ended."""
        return {
            "request": self.request_id,
            "model": self.model,
            "policy": self.spec or self.policy,
            "code": code,
            "output": self.output_tokens,
            "seconds": f"{self.elapsed_s():.3f}",
        }

    def trace(self, code: str) -> Trace:
        """What is kept of it when it has ended."""
        return Trace(
            self.spec,
            self.legs.legs(),
            code,
            self.elapsed_s(),
            self.first_token_s,
            self.output_tokens,
            self.legs.decision,
        )


class Answering:
    """The answer of one run, piece by piece. Who began the run closes it."""

    def __init__(
        self, run: PolicyRun, request: PolicyRequest, output: TextOutput | NoOutput, record: Record, turn: Turn
    ) -> None:
        self.ended = False
        self._told: list[PromptLogprobs] = []  # comes in pieces before the first token
        self._cut_off = Piece()  # what the stop string that was completed leaves of its chunk
        self._run, self._request, self._output, self._record, self._turn = run, request, output, record, turn

    async def next(self) -> Answer:
        """New tokens or text, in the end the account. Raises how the program failed."""
        while (chunk := await self._run.take()) is not None:
            answer = self._feed(chunk)
            if answer is not None:
                return answer
            if self._output.stopped:
                return await self._stopped()
        raise PolicyFailed("the policy ended without a last chunk")

    async def deliver(self, take: Callable[[Answer], bool]) -> None:
        """Gives `take` the pieces, each in the turn of the event loop in which its tokens came, until the last or until
        it says False. Raises how the program failed, and what `take` raised."""

        def fed(chunk: Chunk) -> bool:
            answer = self._feed(chunk)
            if answer is None:
                return not self._output.stopped
            return take(answer) and not self.ended

        if await self._run.each(fed):
            raise PolicyFailed("the policy ended without a last chunk")
        if self._output.stopped and not self.ended:
            take(await self._stopped())

    def _feed(self, chunk: Chunk) -> Answer | None:
        """What it adds to the answer. None: nothing yet, or a stop string ends the answer before its sequence, and what
        is left to do takes time."""
        if chunk.prompt_logprobs:
            self._told.append(chunk.prompt_logprobs)
        piece = self._output.feed(chunk)
        if chunk.finish is not None:
            return self._last(piece, chunk.finish)
        if self._output.stopped:
            self._cut_off = piece
        elif piece.text or piece.token_ids:
            return self._answer(piece.text, piece)
        return None

    async def _stopped(self) -> Answer:
        """The end of an answer whose sequence has not ended."""
        await self._run.stop_early()
        return self._last(self._cut_off, None)

    def _last(self, piece: Piece, finish: FinishReason | None) -> Answer:
        self.ended = True
        run, text = self._run, piece.text
        if not self._output.stopped:
            text += self._output.finish()
        finish = self._output.reason(finish)
        num_prompt_tokens = len(self._request.prompt)
        # What goes on after a failure finds tokens of the answer cached too.
        cached = min(run.legs.generation().matched_tokens, num_prompt_tokens)
        usage = Usage(num_prompt_tokens, cached, self._output.num_tokens)
        for counter, number in zip(_TOKENS, (num_prompt_tokens, cached, usage.output_tokens), strict=True):
            counter.inc(number)
        return self._answer(text, piece, finish, usage, run.legs.legs())

    def _answer(
        self,
        text: str,
        piece: Piece,
        finish: FinishReason | None = None,
        usage: Usage | None = None,
        legs: tuple[Leg, ...] = (),
    ) -> Answer:
        record, run = self._record, self._run
        record.output_tokens += len(piece.token_ids)
        if record.first_token_s is not None:
            return Answer(text, piece.token_ids, piece.logprobs, finish, usage, legs)
        self._turn.first_token()
        record.spec, record.first_token_s = run.served_by.spec, record.elapsed_s()
        of(TTFT_SECONDS, record.model, record.policy).observe(record.first_token_s)
        return Answer(
            text,
            piece.token_ids,
            piece.logprobs,
            finish,
            usage,
            legs,
            record.request_id,
            run.served_by,
            run.legs.generating_engine(),
            self._request.prompt,
            joined(self._told),
        )
