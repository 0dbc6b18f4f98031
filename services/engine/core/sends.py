"""RemoteSend: prompts that are computed to be moved, piece by piece, into a peer's reservation.

What the cache has is pushed at once. Every computed piece is pushed before its step runs, under a ready counter that
rises during the step as layers are done, so that the transfer of a layer overlaps the computing of the next. Without a
free counter the piece is pushed after the step instead.
"""

from __future__ import annotations

from collections import Counter

from services.engine.core import api
from services.engine.core.account import Account
from services.engine.core.admission import check_remote_send
from services.engine.core.calls import Entry
from services.engine.core.context import Context
from services.engine.core.fingerprints import fingerprint
from services.engine.core.plan import StepPlan
from services.engine.core.ports import PushSpec
from services.engine.core.send import Send
from services.engine.core.sequence import Phase, Sequence
from services.engine.errors import DeadlineExceeded, NoPages, RequestCancelled, TransferServiceGone
from services.protocol.errors import ServiceError
from services.protocol.timing import Timing


class Sends:
    """Owns all live sends."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._live: dict[int, Send] = {}  # by the sequence's number
        self._by_push: dict[int, Send] = {}

    def __len__(self) -> int:
        return len(self._live)

    def get(self, number: int) -> Send | None:
        """The send of a sequence, or None if the sequence generates or has ended."""
        return self._live.get(number)

    # --- verbs ------------------------------------------------------------------------------------------------

    def remote_send(self, command: api.RemoteSend) -> None:
        """Takes a send, or joins the one that it repeats. Raises its refusal, and then there is none."""
        context = self._context
        context.link.service()
        check_remote_send(command, context.config)
        mark = fingerprint(command)
        known = context.calls.find(command.key, mark)
        if known is not None and (isinstance(known.call, Send) or known.result is not None):
            self._join(known, command)
            return
        context.check_not_draining()
        if command.deadline is not None and command.deadline <= context.clock():
            raise DeadlineExceeded("The deadline had passed when the request arrived.")
        self._begin(command, mark)

    # --- around a step ----------------------------------------------------------------------------------------

    def planned(self, plan: StepPlan) -> list[int]:
        """Posts what the step's plan makes possible. Returns the ready slots to raise as layers are computed."""
        for number in plan.refused:
            delay_s = self._context.retry_delay_s()
            self.fail(self._live[number], NoPages("Too few pages to compute the send.", retry_delay_s=delay_s))
        for number in plan.admitted:
            if (send := self._live.get(number)) is not None:
                self._post(send, self._end_readable(send.sequence), None)
        slots: list[int] = []
        for segment in plan.segments:
            send = self._live.get(segment.number)
            if send is not None and send.unposted(segment.end):
                slot = self._context.link.take_slot()
                if slot is not None:
                    slots.append(slot)
                    self._post(send, segment.end, slot)
        return slots

    def settle(self, send: Send, begin: int) -> None:
        """Positions from `begin` are computed."""
        send.account.computed_tokens += send.sequence.num_computed - begin
        self._post(send, send.sequence.num_computed, None)
        if send.sequence.phase is Phase.COMPUTED:
            send.account.prefilled(self._context.clock())
            self._finish_if_over(send)

    # --- news -------------------------------------------------------------------------------------------------

    def push_ended(self, news: api.PushEnded) -> None:
        """A piece has been moved, or not. The source pages are read no more."""
        send = self._by_push.pop(news.push_id, None)
        if send is None:
            return
        slot = send.pushes.live.pop(news.push_id)
        if slot is not None:
            self._context.link.return_slot(slot)
        send.account.transferred_bytes += news.bytes
        send.account.transfer_s = max(send.account.transfer_s, news.exposed_s)
        send.pushes.is_committed |= news.committed
        if news.error is not None and not send.pushes.is_committed:
            self.fail(send, news.error)
        else:
            self._finish_if_over(send)

    def service_lost(self) -> None:
        """Every push has ended with the service."""
        error = TransferServiceGone("The KV transfer service went away during the transfer.", retry_delay_s=1.0)
        self._by_push.clear()
        for send in list(self._live.values()):
            send.pushes.live.clear()
            self.fail(send, error)

    def fail_all(self, error: ServiceError) -> None:
        """The engine stops: tells everybody, and leaves its own books as they are."""
        for send in self._live.values():
            self._answer(send, error)

    def count_users(self, users: Counter[int]) -> None:
        """Adds the pages of all sends to the books of an audit."""
        for send in self._live.values():
            users.update(send.sequence.pages)

    # --- inside -----------------------------------------------------------------------------------------------

    def _end_readable(self, sequence: Sequence) -> int:
        """Up to where pages can be read before the step: it begins by copying one that is matched in part."""
        is_done = sequence.num_computed == sequence.goal
        num_partial = 0 if is_done else sequence.num_computed % self._context.config.page_size
        return sequence.num_computed - num_partial

    def _begin(self, command: api.RemoteSend, mark: bytes) -> None:
        context, end = self._context, command.range.end
        chain = context.chain(command.prompt[:end], command.cache_salt)
        num_prompt = command.prompt_token_count or len(command.prompt)
        account = Account(context.clock())
        sequence = Sequence(next(context.arrivals), command.key, chain, account, goal=end, num_prompt=num_prompt)
        send = Send(command, sequence, self._abort)
        if not command.range:
            sequence.phase = Phase.COMPUTED
        elif not self._take_cached(sequence):
            context.check_queue()
            context.scheduler.add(sequence)
        context.calls.begin(command.key, mark, send)
        self._live[sequence.number] = send
        latest = context.clock() + context.config.max_send_s
        deadline = latest if command.deadline is None else min(command.deadline, latest)
        send.timer = context.timers.at(deadline, lambda: self._too_late(send))
        if sequence.phase is Phase.COMPUTED:
            self._post(send, sequence.num_computed, None)
            self._finish_if_over(send)

    def _take_cached(self, sequence: Sequence) -> bool:
        """Pins all pages if the cache has the whole range: then there is nothing to wait for."""
        context = self._context
        match = context.pool.match(sequence.chain, sequence.goal)
        if match.num_tokens < sequence.goal:
            return False
        context.pool.retain(match.page_ids)
        sequence.pages.extend(match.page_ids)
        sequence.has_computed(match.num_tokens)
        sequence.phase = Phase.COMPUTED
        sequence.account.matched_tokens = match.num_tokens
        sequence.account.scheduled(context.clock())
        sequence.account.prefilled(context.clock())
        return True

    def _join(self, known: Entry, command: api.RemoteSend) -> None:
        """A retry shares the outcome of what it repeats."""
        send, result = known.call, known.result
        if isinstance(send, Send):
            send.num_callers += 1
            result = send.result
            if result is None:
                send.replies.append(command.reply)
        if result is not None:
            command.reply(result)

    def _post(self, send: Send, end: int, slot: int | None) -> None:
        """Pushes what is not posted yet of the positions before `end`."""
        part = send.unposted(end)
        if not part or send.result is not None or send.pushes.is_committed:
            return
        link, command = self._context.link, send.command
        indices = part.page_indices(self._context.config.page_size)
        push_id = link.next_push_id()
        send.pushes.live[push_id] = slot
        send.pushes.end = part.end
        self._by_push[push_id] = send
        link.port.push(
            PushSpec(
                push_id=push_id,
                page_ids=tuple(send.sequence.pages[indices.start : indices.stop]),
                range=part,
                target=command.address,
                attempt=command.attempt,
                attempt_range=command.range,
                writer_id=self._context.writer_id(command.key),
                ready_slot=slot,
            )
        )

    def _finish_if_over(self, send: Send) -> None:
        """Answers when everything is in place, and lets go of the pages when nothing reads them."""
        pushes, context = send.pushes, self._context
        is_all_posted = pushes.end == send.range.end
        if send.result is None and pushes.is_committed and not (is_all_posted and pushes.live):
            # Committed before all was posted: an earlier send had done it all.
            send.account.transferred_tokens = len(send.range)
            self._succeed(send)
        elif send.result is None and not send.range:
            self._succeed(send)
        elif send.result is None and is_all_posted and not pushes.live:
            self.fail(send, TransferServiceGone("Everything was moved, but it was not committed."))
            return
        if send.result is not None and not pushes.live:
            if not pushes.is_committed and pushes.end > send.range.begin and not self._context.link.is_lost:
                self._give_up_attempt(send)
            context.pool.release(send.sequence.take_pages())
            context.calls.finish(send.command.key, send.result if isinstance(send.result, Timing) else None)
            del self._live[send.sequence.number]

    def _give_up_attempt(self, send: Send) -> None:
        command = send.command
        writer_id = self._context.writer_id(command.key)
        self._context.link.port.end_attempt(command.address, command.attempt, command.range, writer_id)

    def _succeed(self, send: Send) -> None:
        self._context.faults.reach("remote_send.end")
        self._stop(send)
        self._answer(send, send.account.timing(self._context.clock()))

    def fail(self, send: Send, error: ServiceError) -> None:
        """Answers with an error, once, and winds up."""
        if send.result is None:
            self._stop(send)
            self._answer(send, error)
        self._finish_if_over(send)

    def _abort(self, send: Send) -> None:
        """Stops a send: pushes at the next page, computing after the step that runs."""
        self.fail(send, RequestCancelled("The request was cancelled."))

    def _stop(self, send: Send) -> None:
        """Computes no more and cancels what still moves. The pages stay until that has ended."""
        sequence = send.sequence
        self._context.scheduler.remove(sequence)
        if send.timer is not None:
            send.timer.cancel()
        for push_id in send.pushes.live:
            self._context.link.port.cancel_push(push_id)

    def _answer(self, send: Send, result: Timing | ServiceError) -> None:
        send.result = result
        replies, send.replies = send.replies, []
        for reply in replies:
            reply(result)

    def _too_late(self, send: Send) -> None:
        self.fail(send, DeadlineExceeded("The deadline of the request passed."))
