"""What a caller leaves untaken is merged, and cut where a message would be too large."""

from __future__ import annotations

import numpy as np

from services.engine.core.api import FinishReason, RequestKey, SequenceOutput, TokenLogprobs
from services.engine.front.streams import MAX_TAKEN_NUMBERS, Caller, Streams
from services.engine.sampling.prompt_logprobs import PromptLogprobs

KEY, OTHER = RequestKey("me", "a"), RequestKey("me", "b")


def caller() -> Caller:
    return Caller(Streams(lambda command: None))


async def test_outputs_of_many_steps_come_as_one() -> None:
    mailbox = caller()
    for token in range(5):
        mailbox.put(SequenceOutput(KEY, (token,)))
        mailbox.put(SequenceOutput(OTHER, (token + 10,)))
    mailbox.put(SequenceOutput(KEY, (5,), finish_reason=FinishReason.STOP))
    first, second = (await mailbox.take()).outputs
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
        taken = (await mailbox.take()).outputs
        assert sum(len(each.token_ids) * 22 for each in taken) <= MAX_TAKEN_NUMBERS + 22
        for each in taken:
            assert len(each.logprobs) == len(each.token_ids)
            assert each.key not in finished
            tokens[each.key] += each.token_ids
            if each.finish_reason is not None:
                finished.append(each.key)
    assert tokens == {KEY: list(range(num_tokens)), OTHER: list(range(num_tokens))}


async def test_a_prompt_that_more_than_fills_messages_comes_before_the_tokens() -> None:
    mailbox, num_steps, rows = caller(), 40, 256
    for step in range(num_steps):
        own = np.arange(step * rows, (step + 1) * rows, dtype=np.float32)
        tops = np.repeat(own[:, None], 20, axis=1)
        tokens = (7,) if step == num_steps - 1 else ()
        mailbox.put(SequenceOutput(KEY, tokens, prompt_logprobs=PromptLogprobs(own, tops.astype(np.int32), tops)))
    mailbox.put(SequenceOutput(OTHER, (8,), finish_reason=FinishReason.LENGTH))
    mailbox.put(SequenceOutput(KEY, (9,), finish_reason=FinishReason.LENGTH))
    told: list[float] = []
    messages = [(await mailbox.take()).outputs]
    while messages[-1][-1].finish_reason is None or len(messages) < 2:
        messages.append((await mailbox.take()).outputs)
    for message in messages:
        numbers = 0
        for each in message:
            if (prompt := each.prompt_logprobs) is not None:
                told += prompt.logprobs.tolist()
                assert prompt.top_ids.tolist() == prompt.top_logprobs.tolist()
                assert not each.token_ids or len(told) == num_steps * rows
                numbers += len(prompt) * 41
        assert numbers <= MAX_TAKEN_NUMBERS
    assert told == [float(number) for number in range(num_steps * rows)]
    tokens_of = {key: [t for m in messages for e in m if e.key == key for t in e.token_ids] for key in (KEY, OTHER)}
    assert tokens_of == {KEY: [7, 9], OTHER: [8]}
