"""RouterService.Session to a client that reads more slowly than it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from microserve.router.v1 import router_pb2
from tokenizers import Tokenizer

from services.router.front.conversation import MAX_WAITING_BYTES, Conversation
from services.router.front.servicer import READER
from tests.fakes import PATIENCE_S, FakeModel
from tests.router.harness import request, running
from tests.router.talk import Talk, tokens
from tests.router.vocabularies import byte_level, files

WORD = "x" * 4000
NUM_WORDS = 2000  # eight times what may wait for a client, and more than a connection takes that nobody reads
NUM_LATER = 10


def talkative() -> tuple[FakeModel, int]:
    vocabulary = Tokenizer.from_str(byte_level().to_str())
    vocabulary.add_tokens([WORD])
    word: int = vocabulary.token_to_id(WORD)
    return FakeModel(files(vocabulary), script=(word,) * NUM_WORDS), word


class Watched:
    """What sessions do, in order: commands that begin a request, waits of the reader for room, and frames that go out
    to the client."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.reader_waits = asyncio.Event()
        begin, wait_for_room, take = Conversation.begin, Conversation.wait_for_room, Conversation.take

        def watched_begin(session: Conversation[Any], call_id: int, answer: Callable[..., Any]) -> None:
            self.events.append("begin")
            begin(session, call_id, answer)

        async def watched_wait(session: Conversation[Any]) -> None:
            task = asyncio.current_task()
            assert task is not None
            if task.get_name() == READER and session._waiting_bytes >= MAX_WAITING_BYTES:
                self.events.append("wait")
                self.reader_waits.set()
            await wait_for_room(session)

        async def watched_take(session: Conversation[Any]) -> list[Any]:
            outputs = await take(session)
            self.events.append("frame")
            return outputs

        for name, watched in (("begin", watched_begin), ("wait_for_room", watched_wait), ("take", watched_take)):
            patch.setattr(Conversation, name, watched)


@pytest.mark.slow
async def test_no_command_is_read_while_too_much_waits_for_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real connection, which is full after a while; all is answered once the client reads."""
    watched, (model, word) = Watched(monkeypatch), talkative()
    async with running(1, fake_model=model, client_timeout=PATIENCE_S) as suite, asyncio.timeout(PATIENCE_S):
        talk, num_asked = Talk(suite.stub), 1
        await talk.ask(1, request(max_tokens=NUM_WORDS))

        async def ask_for_more() -> None:
            nonlocal num_asked
            num_asked += 1
            await talk.ask(num_asked, router_pb2.GenerateRequest())  # which is refused at once

        while not watched.reader_waits.is_set():
            await ask_for_more()
        for _ in range(NUM_LATER):
            await ask_for_more()
        first, *others = await talk.answers(*range(1, num_asked + 1))
        assert tokens(first) == [word] * NUM_WORDS
        assert {output.error.reason for outputs in others for output in outputs} == {"EMPTY_PROMPT"}
        talk.call.cancel()
    after_waits = [after for before, after in zip(watched.events, watched.events[1:], strict=False) if before == "wait"]
    assert set(after_waits) == {"frame"}
    assert watched.events.count("begin") == num_asked
