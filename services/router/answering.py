"""From the chunks of a program to the pieces of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from services.router.admission.line import Turn
from services.router.answer import Answer
from services.router.errors import PolicyFailed
from services.router.metrics import TOKENS, TTFT_SECONDS, of
from services.router.programs.runner import PolicyRun
from services.router.prompt_logprobs import PromptLogprobs, joined
from services.router.record import Record
from services.router.request import PolicyRequest
from services.router.text.output import NoOutput, TextOutput
from services.router.values import Chunk, FinishReason, Usage

_TOKENS = tuple(map(TOKENS.labels, ("prompt", "cached", "output")))


class Answering:
    """The answer of one run, piece by piece. As a context it closes the run: all it left on engines has ended then."""

    def __init__(
        self, run: PolicyRun, request: PolicyRequest, output: TextOutput | NoOutput, record: Record, turn: Turn
    ) -> None:
        self.ended = False
        self._told: list[PromptLogprobs] = []  # comes in pieces before the first token
        self._cut_off = Answer()  # what the stop string that was completed leaves of its chunk
        self._run, self._request, self._output, self._record, self._turn = run, request, output, record, turn
        record.legs = run.legs
        run.on_end(self._end_turn)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._record.is_answered = kind is None
        try:
            if kind is None:
                await asyncio.sleep(0)  # in which most programs end by themselves
        finally:
            try:
                await self._run.close()
            finally:
                self._end_turn()

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

    def _end_turn(self) -> None:
        """Engines have no more to do for it, though its reader may not have taken all yet: others need not wait."""
        run, turn = self._run, self._turn
        turn.num_tokens = run.num_tokens
        if run.finished:
            turn.finished(run.num_tokens)
        turn.end()

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
            return None
        return self._noted(piece) if piece.text or piece.token_ids else None

    async def _stopped(self) -> Answer:
        """The end of an answer whose sequence has not ended."""
        await self._run.stop_early()
        return self._last(self._cut_off, None)

    def _last(self, piece: Answer, finish: FinishReason | None) -> Answer:
        self.ended = True
        run, text = self._run, piece.text
        if not self._output.stopped:
            text += self._output.finish()
        num_prompt_tokens = len(self._request.prompt)
        # What goes on after a failure finds tokens of the answer cached too.
        cached = min(run.legs.generation().matched_tokens, num_prompt_tokens)
        usage = Usage(num_prompt_tokens, cached, self._output.num_tokens)
        for counter, number in zip(_TOKENS, (num_prompt_tokens, cached, usage.output_tokens), strict=True):
            if number:
                counter.inc(number)
        finish = self._output.reason(finish)
        return self._noted(Answer(text, piece.token_ids, piece.logprobs, finish, usage, run.legs.legs()))

    def _noted(self, answer: Answer) -> Answer:
        record = self._record
        record.output_tokens += len(answer.token_ids)
        return answer if record.first_token_s is not None else self._first(answer)

    def _first(self, answer: Answer) -> Answer:
        record, run = self._record, self._run
        self._turn.first_token()
        record.served_by, record.first_token_s = run.served_by, record.elapsed_s()
        of(TTFT_SECONDS, record.model, record.policy).observe(record.first_token_s)
        return answer._replace(
            request_id=record.request_id,
            program=run.served_by,
            engine=run.legs.generating_engine(),
            prompt_ids=self._request.prompt,
            prompt_logprobs=joined(self._told) if self._told else None,
        )
