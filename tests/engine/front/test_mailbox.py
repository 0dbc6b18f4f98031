"""What a caller leaves untaken is merged, and cut where a message would be too large."""

from __future__ import annotations

from services.engine.core.api import FinishReason, RequestKey, SequenceOutput, TokenLogprobs
from services.engine.front.streams import MAX_TAKEN_NUMBERS, Caller, Streams

KEY, OTHER = RequestKey("me", "a"), RequestKey("me", "b")


def caller() -> Caller:
    return Caller(Streams(lambda command: None))


async def test_outputs_of_many_steps_come_as_one() -> None:
    mailbox = caller()
    for token in range(5):
        mailbox.put(SequenceOutput(KEY, (token,)))
        mailbox.put(SequenceOutput(OTHER, (token + 10,)))
    mailbox.put(SequenceOutput(KEY, (5,), finish_reason=FinishReason.STOP))
    first, second = await mailbox.take()
    assert (first.token_ids, first.finish_reason) == ((0, 1, 2, 3, 4, 5), FinishReason.STOP)
    assert (second.token_ids, second.finish_reason) == ((10, 11, 12, 13, 14), None)


async def test_more_than_a_message_holds_comes_in_several() -> None:
    mailbox, top = caller(), tuple((token, -1.0) for token in range(20))
    num_tokens = MAX_TAKEN_NUMBERS // 10
    for token in range(num_tokens):
        last = FinishReason.LENGTH if token == num_tokens - 1 else None
        logprobs = (TokenLogprobs((token, -1.0), top),)
        for key in (KEY, OTHER):
            mailbox.put(SequenceOutput(key, (token,), logprobs, finish_reason=last))
    tokens: dict[RequestKey, list[int]] = {KEY: [], OTHER: []}
    finished: list[RequestKey] = []
    while len(finished) < 2:
        taken = await mailbox.take()
        assert sum(len(each.token_ids) * 22 for each in taken) <= MAX_TAKEN_NUMBERS + 22
        for each in taken:
            assert len(each.logprobs) == len(each.token_ids)
            assert each.key not in finished
            tokens[each.key] += each.token_ids
            if each.finish_reason is not None:
                finished.append(each.key)
    assert tokens == {KEY: list(range(num_tokens)), OTHER: list(range(num_tokens))}
