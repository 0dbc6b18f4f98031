"""Guides compiled on threads: one answer each, bounded, and none of them ends a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.engine.core.api import GuideReady
from services.engine.errors import GuidesUnavailable, InvalidGuide, QueueFull
from services.engine.guide import compiler as compiling
from services.engine.guide import matcher as matching
from services.engine.guide.compiler import MAX_PENDING, NUM_THREADS, GuideCompiler
from services.engine.guide.matcher import GuideMatcher
from services.engine.sampling.guide import Guide
from tests.engine.guide.guides import END, VOCAB, regex
from tests.models import make_tiny_llama

Answers = queue.Queue[GuideReady]


@pytest.fixture
def answers() -> Answers:
    return queue.Queue()


@pytest.fixture
def compiler(tmp_path: Path, answers: Answers) -> Iterator[GuideCompiler]:
    content = (make_tiny_llama(tmp_path) / "tokenizer.json").read_bytes()
    made = GuideCompiler(content, VOCAB, (END,), answers.put)
    yield made
    made.close()


def test_every_guide_is_answered_once_with_a_state_of_its_own(compiler: GuideCompiler, answers: Answers) -> None:
    for number in range(10):
        compiler.compile(number, regex("[0-9]+"), ())
    ready = [answers.get(timeout=30) for _ in range(10)]
    assert sorted(news.number for news in ready) == list(range(10))
    states = [news.outcome for news in ready]
    assert all(isinstance(state, GuideMatcher) for state in states)
    assert len({id(state) for state in states}) == 10


def test_errors_are_answers(compiler: GuideCompiler, answers: Answers) -> None:
    compiler.compile(1, regex("(a"), ())
    assert isinstance(answers.get(timeout=30).outcome, InvalidGuide)
    compiler.compile(2, regex("a"), (5,))
    assert isinstance(answers.get(timeout=30).outcome, InvalidGuide)
    compiler.compile(3, regex("a"), ())
    assert isinstance(answers.get(timeout=30).outcome, GuideMatcher)


def test_a_tokenizer_that_the_library_cannot_read(answers: Answers) -> None:
    compiler = GuideCompiler(b"{}", VOCAB, (END,), answers.put)
    for number in range(2):
        compiler.compile(number, regex("a"), ())
        assert isinstance(answers.get(timeout=30).outcome, GuidesUnavailable)
    compiler.close()


def test_a_panic_of_the_library_is_an_answer(
    compiler: GuideCompiler, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def panic(*_: object) -> None:
        raise Panic

    with monkeypatch.context() as patch:
        patch.setattr(matching, "make_matcher", panic)
        compiler.compile(1, regex("a"), ())
        assert isinstance(answers.get(timeout=30).outcome, GuidesUnavailable)
    compiler.compile(2, regex("a"), ())
    assert isinstance(answers.get(timeout=30).outcome, GuideMatcher)


def test_no_more_than_so_many_wait(compiler: GuideCompiler, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, make = threading.Event(), matching.make_matcher

    def slow(*arguments: object) -> GuideMatcher:
        assert gate.wait(30)
        return make(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(matching, "make_matcher", slow)
    for number in range(MAX_PENDING):
        compiler.compile(number, regex(f"a{number}"), ())
    with pytest.raises(QueueFull) as raised:
        compiler.compile(MAX_PENDING, regex("b"), ())
    assert raised.value.retry_delay_s
    gate.set()
    assert {answers.get(timeout=30).number for _ in range(MAX_PENDING)} == set(range(MAX_PENDING))
    compiler.compile(MAX_PENDING, regex("b"), ())
    assert answers.get(timeout=30).number == MAX_PENDING
    assert NUM_THREADS < MAX_PENDING


def test_what_nobody_waits_for_any_more_is_not_compiled(
    compiler: GuideCompiler, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun, make = threading.Event(), queue.Queue[str](), matching.make_matcher

    def slow(tokenizer: object, guide: Guide, vocab_size: int) -> GuideMatcher:
        begun.put(guide.texts[0])
        assert gate.wait(30)
        return make(tokenizer, guide, vocab_size)  # type: ignore[arg-type]

    monkeypatch.setattr(matching, "make_matcher", slow)
    for number in range(MAX_PENDING):
        compiler.compile(number, regex(f"a{number}"), ())
    under_way = {begun.get(timeout=30) for _ in range(NUM_THREADS)}
    for number in range(MAX_PENDING):
        compiler.cancel(number)
    compiler.compile(MAX_PENDING, regex("b"), ())
    gate.set()
    numbers = {answers.get(timeout=30).number for _ in range(NUM_THREADS + 1)}
    assert {f"a{number}" for number in numbers - {MAX_PENDING}} == under_way
    assert begun.get(timeout=30) == "b"
    assert begun.empty()


def test_a_guide_is_compiled_once_while_it_is_kept(
    compiler: GuideCompiler, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], matching.make_matcher

    def counted(tokenizer: object, guide: object, vocab_size: int) -> GuideMatcher:
        made.append(guide)
        return make(tokenizer, guide, vocab_size)  # type: ignore[arg-type]

    monkeypatch.setattr(matching, "make_matcher", counted)
    monkeypatch.setattr(compiling, "MAX_KEPT", 2)
    a, b, c = regex("a"), regex("b"), regex("c")
    for guide in (a, b, a, c, a, b):  # b is the one that was used longest ago when c comes
        compiler.compile(0, guide, ())
        answers.get(timeout=30)
    assert made == [a, b, c, b]
