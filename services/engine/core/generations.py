"""StartGenerate: sequences from their arrival to their last output, with or without a reservation."""

from __future__ import annotations

from collections import Counter

from services.engine.core.account import Account
from services.engine.core.admission import check_start_generate
from services.engine.core.api import FinishReason, GuideReady, SequenceOutput, StartGenerate, TokenLogprobs
from services.engine.core.booking import Booking
from services.engine.core.context import Context
from services.engine.core.fingerprints import fingerprint
from services.engine.core.plan import Chosen
from services.engine.core.reservations import Reservations
from services.engine.core.sequence import Phase, Sequence
from services.engine.core.stopping import finish_reason, has_all
from services.engine.core.timers import Timer
from services.engine.errors import DeadlineExceeded, GuidesUnavailable, InvalidGuide, SequenceExists
from services.engine.sampling.prompt_logprobs import PromptLogprobs
from services.protocol.errors import InvalidRange, PromptMismatch, ReservationGone, ServiceError
from services.protocol.reservation import ReservationState


class Generation:
    """One live StartGenerate. Changed by Generations only."""

    def __init__(self, desk: Generations, command: StartGenerate, sequence: Sequence) -> None:
        self._desk = desk
        self.command = command
        self.sequence = sequence
        self.booking: Booking | None = None  # the reservation that it waits for or has
        self.timer: Timer | None = None

    def cancel(self) -> None:
        """The stream has ended."""
        self._desk.finish(self, FinishReason.CANCELLED)

    def abort(self) -> None:
        """Its owner ends it; the stream hears of it."""
        self._desk.finish(self, FinishReason.CANCELLED)

    def kv_filled(self) -> None:
        """The reservation that it waits for has everything."""
        self._desk.attach(self)

    def kv_lost(self, error: ServiceError) -> None:
        """The reservation that it waits for has ended."""
        self.booking = None
        self._desk.fail(self, error)


class Generations:
    """Owns all live generations."""

    def __init__(self, context: Context, reservations: Reservations) -> None:
        self._context = context
        self._reservations = reservations
        self._live: dict[int, Generation] = {}  # by the sequence's number

    def __len__(self) -> int:
        return len(self._live)

    def get(self, number: int) -> Generation | None:
        """The generation of a sequence, or None if the sequence is a send or has ended."""
        return self._live.get(number)

    @property
    def num_waiting_for_kv(self) -> int:
        """Sequences whose KV has not all arrived."""
        return sum(1 for one in self._live.values() if one.sequence.phase is Phase.WAITING_FOR_KV)

    def start(self, command: StartGenerate) -> None:
        """Takes a sequence. Raises its refusal, and then there is none."""
        context = self._context
        check_start_generate(command, context.config)
        mark = fingerprint(command)
        known = context.calls.find(command.key, mark)
        if known is not None and known.call is not None:
            raise SequenceExists("A sequence of this request id is alive.")
        context.check_not_draining()
        booking = self._find_booking(command)
        if booking is None:
            context.check_queue()
        if command.deadline is not None and command.deadline <= context.clock():
            raise DeadlineExceeded("The deadline had passed when the request arrived.")
        generation = Generation(self, command, self._sequence(command))
        is_guided = self._compile_guide(generation)
        context.calls.begin(command.key, mark, generation)
        self._live[generation.sequence.number] = generation
        if command.deadline is not None:
            generation.timer = context.timers.at(command.deadline, lambda: self._too_late(generation))
        if has_all(generation.sequence, command.sampling, context.config):
            self.finish(generation, FinishReason.LENGTH)
        elif not is_guided:
            self._enqueue(generation, booking)

    def guide_ready(self, news: GuideReady) -> None:
        """The guide of a sequence, if it still lives, is compiled: it joins the queue, unless there is no more to say.

        The reservation is looked up again: its lease ran on meanwhile.
        """
        generation = self._live.get(news.number)
        if generation is None:
            return
        if isinstance(news.outcome, ServiceError):
            self.fail(generation, news.outcome)
            return
        generation.sequence.guide = news.outcome
        if news.outcome.is_finished:
            self.finish(generation, FinishReason.STOP)
            return
        try:
            self._enqueue(generation, self._find_booking(generation.command))
        except ServiceError as error:
            self.fail(generation, error)

    def attach(self, generation: Generation) -> None:
        """Takes over the pages of a filled reservation and joins the queue. They are whole, so they are published.

        Where tokens of the prompt are to be rated it keeps only the pages before them: a page cannot tell the logits.
        """
        context, sequence, booking = self._context, generation.sequence, generation.booking
        assert booking is not None
        sequence.pages.extend(self._reservations.attach(booking))
        sequence.has_computed(min(booking.end, sequence.goal - 1))
        sequence.num_published = booking.num_matched // context.config.page_size
        account = sequence.account
        account.matched_tokens = booking.num_matched
        account.transferred_tokens = len(booking.rules.window)
        account.transferred_bytes = booking.num_bytes
        account.transfer_s = context.clock() - account.arrived_at
        context.scheduler.publish(sequence)
        if sequence.num_computed > sequence.match_limit:
            context.pool.release(sequence.give_back(sequence.match_limit))
        context.scheduler.add(sequence)

    def settle(self, generation: Generation, begin: int, chosen: Chosen | None, scored: PromptLogprobs | None) -> None:
        """Positions from `begin` are computed, the next of the prompt's tokens rated if that was asked for, and a token
        chosen unless more of the prompt is to come."""
        sequence, now = generation.sequence, self._context.clock()
        account = sequence.account
        account.computed_tokens += max(0, min(sequence.num_computed, sequence.num_given) - begin)
        if scored is not None:
            sequence.num_told += len(scored)
        if chosen is None:
            if scored is not None:
                self._put(generation, scored=scored)
            return
        account.prefilled(now)
        account.generated_tokens += 1
        sequence.append(chosen.token_id)
        if sequence.guide is not None:
            try:
                sequence.guide.advance(chosen.token_id)
            except InvalidGuide as error:
                self.fail(generation, error)
                return
        reason = finish_reason(sequence, generation.command.sampling, self._context.config)
        if reason is not None:
            self._context.faults.reach("start_generate.end")
            self._end(generation)
        self._put(generation, chosen, scored=scored, reason=reason)

    def preempted(self, number: int) -> None:
        """The scheduler took the sequence's pages back; a reservation it had is used up."""
        generation = self._live[number]
        if generation.booking is not None:
            self._reservations.detach(generation.booking)
            generation.booking = None

    def finish(self, generation: Generation, reason: str) -> None:
        """Ends a sequence without a further token."""
        self._end(generation)
        self._put(generation, reason=reason)

    def fail(self, generation: Generation, error: ServiceError) -> None:
        """Ends a sequence with an error."""
        self._end(generation)
        self._put(generation, error=error)

    def fail_all(self, error: ServiceError) -> None:
        """The engine stops: tells everybody, and leaves its own books as they are."""
        for generation in self._live.values():
            self._put(generation, error=error)

    def count_users(self, users: Counter[int]) -> None:
        """Adds the pages of all sequences to the books of an audit."""
        for generation in self._live.values():
            users.update(generation.sequence.pages)

    def _compile_guide(self, generation: Generation) -> bool:
        """Has the sequence's guide compiled, if it has one; guide_ready goes on. GuidesUnavailable, QueueFull."""
        sequence, guide = generation.sequence, generation.command.sampling.guide
        if guide is None:
            return False
        if self._context.guides is None:
            raise GuidesUnavailable("This engine cannot guide its output.")
        sequence.phase = Phase.WAITING_FOR_GUIDE
        self._context.guides.compile(sequence.number, guide, tuple(sequence.tokens[sequence.num_prompt :]))
        return True

    def _enqueue(self, generation: Generation, booking: Booking | None) -> None:
        if booking is None:
            self._context.scheduler.add(generation.sequence)
        else:
            self._await(generation, booking)

    def _find_booking(self, command: StartGenerate) -> Booking | None:
        """The reservation that a command names, if it does. Raises what is wrong with it."""
        if command.reservation is None:
            return None
        booking = self._reservations.find(command.reservation)
        if command.begin > booking.end:
            raise InvalidRange(f"begin {command.begin} is beyond the reservation's end {booking.end}.")
        seed = self._context.chain((), command.cache_salt).seed
        if seed != booking.chain.seed or list(command.prompt[: booking.end]) != booking.chain.tokens:
            raise PromptMismatch("The reservation was made for another prompt or cache salt.")
        return booking

    def _sequence(self, command: StartGenerate) -> Sequence:
        context, num_given = self._context, len(command.prompt)
        return Sequence(
            next(context.arrivals),
            command.key,
            context.chain(command.prompt, command.cache_salt),
            Account(context.clock()),
            goal=num_given,
            num_prompt=command.prompt_token_count or num_given,
            sampling=command.sampling,
            forced=command.forced,
            num_told=None if command.sampling.prompt_logprobs is None else max(1, command.prompt_logprobs_begin),
        )

    def _await(self, generation: Generation, booking: Booking) -> None:
        generation.booking = booking
        if booking.rules.state is ReservationState.FILLED:
            try:
                self.attach(generation)
            except ReservationGone as error:  # the lease has run out since it was looked up
                generation.kv_lost(error)
        else:
            generation.sequence.phase = Phase.WAITING_FOR_KV
            booking.waiter = generation

    def _too_late(self, generation: Generation) -> None:
        self.fail(generation, DeadlineExceeded("The deadline of the request passed."))

    def _end(self, generation: Generation) -> None:
        """Gives everything back. Full pages are in the cache already."""
        sequence, booking = generation.sequence, generation.booking
        had_pages = booking is not None and booking.is_attached
        if self._context.guides is not None and sequence.phase is Phase.WAITING_FOR_GUIDE:
            self._context.guides.cancel(sequence.number)
        self._context.scheduler.remove(sequence)
        self._context.pool.release(sequence.take_pages())
        if booking is not None:
            booking.waiter = None
            if had_pages:
                self._reservations.detach(booking)
        if generation.timer is not None:
            generation.timer.cancel()
        self._context.calls.finish(sequence.key)
        del self._live[sequence.number]

    def _put(
        self,
        generation: Generation,
        chosen: Chosen | None = None,
        *,
        scored: PromptLogprobs | None = None,
        reason: str | None = None,
        error: ServiceError | None = None,
    ) -> None:
        """Adds to the step's outputs; the last of a sequence carries its account."""
        logprobs: tuple[TokenLogprobs, ...] = ()
        if chosen is not None and chosen.logprob is not None:
            logprobs = (TokenLogprobs((chosen.token_id, chosen.logprob), chosen.top),)
        is_last = reason is not None or error is not None
        output = SequenceOutput(
            key=generation.command.key,
            token_ids=(chosen.token_id,) if chosen else (),
            logprobs=logprobs,
            finish_reason=reason,
            error=error,
            timing=generation.sequence.account.timing(self._context.clock()) if is_last else None,
            call_id=generation.command.call_id,
            prompt_logprobs=scored,
        )
        self._context.outputs.append(output)
