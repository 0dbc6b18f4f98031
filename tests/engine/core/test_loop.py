"""The loop thread: wakes for commands and timers, answers everything whatever happens to it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from services.engine.core import api
from services.engine.core.core import EngineCore
from services.engine.core.loop import EngineLoop
from services.engine.core.plan import RunnerBroken
from services.engine.sampling.params import SamplingParams
from services.protocol.errors import Code, ServiceError
from tests.engine.core.fake_runner import FakeRunner, expected_tokens
from tests.engine.core.world import VOCAB, make_config, prompt_of

WAIT_S = 60.0  # how long a test waits for what takes microseconds


class Listener:
    """Hands everything over to the test's thread."""

    def __init__(self) -> None:
        self.outputs: queue.Queue[api.SequenceOutput] = queue.Queue()
        self.fatal: queue.Queue[BaseException] = queue.Queue()

    def on_outputs(self, outputs: Sequence[api.SequenceOutput]) -> None:
        for output in outputs:
            self.outputs.put(output)

    def on_load(self, load: api.Load) -> None:
        pass

    def on_fatal(self, error: BaseException) -> None:
        self.fatal.put(error)

    def last_outputs(self, count: int) -> dict[int, api.SequenceOutput]:
        """The last output of each of `count` sequences."""
        last: dict[int, api.SequenceOutput] = {}
        while len(last) < count:
            output = self.outputs.get(timeout=WAIT_S)
            if output.finish_reason or output.error:
                last[output.call_id] = output
        return last


@contextmanager
def running(clock: Callable[[], float] = time.monotonic) -> Iterator[tuple[EngineLoop, Listener, FakeRunner]]:
    config, listener = make_config(), Listener()
    runner = FakeRunner(config.num_pages, config.page_size, config.vocab_size)
    loop = EngineLoop(EngineCore(config, runner, listener, clock=clock), listener, clock=clock)
    loop.start()
    yield loop, listener, runner
    assert loop.stop(WAIT_S)


def start(call_id: int, num_tokens: int, deadline: float | None = None) -> api.StartGenerate:
    key, params = api.RequestKey("test", str(call_id)), SamplingParams(max_tokens=num_tokens)
    return api.StartGenerate(key, prompt_of(5 + call_id), 0, 0, params, None, "", deadline, call_id=call_id)


def test_commands_from_many_threads() -> None:
    with running() as (loop, listener, _):
        threads = [threading.Thread(target=loop.submit, args=(start(n, 4),)) for n in range(1, 9)]
        for thread in threads:
            thread.start()
        last = listener.last_outputs(8)
        for thread in threads:
            thread.join()
    expected = {n: expected_tokens(prompt_of(5 + n), 4, SamplingParams(), VOCAB)[-1] for n in range(1, 9)}
    assert {n: output.token_ids[-1] for n, output in last.items()} == expected


def test_an_idle_loop_wakes_for_a_timer() -> None:
    with running() as (loop, listener, runner):
        held = threading.Event()
        runner.run = lambda plan, on_layer: held.wait(WAIT_S) and []  # type: ignore[method-assign,assignment,return-value]
        loop.submit(start(1, 4, deadline=time.monotonic() + 0.01))
        held.set()
        last = listener.last_outputs(1)
    assert last[1].error is not None


def test_stopping_answers_what_is_open_and_what_comes_after() -> None:
    answers: queue.Queue[ServiceError | None] = queue.Queue()
    with running() as (loop, listener, runner):
        entered, release = threading.Event(), threading.Event()

        def run(plan: object, on_layer: object) -> list[object]:
            entered.set()
            release.wait(WAIT_S)
            raise RuntimeError("never mind")

        runner.run = run  # type: ignore[method-assign,assignment]
        loop.submit(start(1, 40))
        assert entered.wait(WAIT_S)
        loop.submit(start(2, 40))
        assert not loop.stop(0.0)
        release.set()
        assert loop.stop(WAIT_S)
        loop.submit(start(3, 4))
        loop.submit(api.Abort(api.RequestKey("test", "1"), answers.put))
        last = listener.last_outputs(3)
    errors = [last[n].error for n in (2, 3)]
    assert [error.code for error in errors if error] == [Code.UNAVAILABLE] * 2
    refused = answers.get(timeout=WAIT_S)
    assert isinstance(refused, ServiceError)


def test_a_state_that_cannot_be_trusted_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as (loop, listener, runner):

        def broken(self: EngineCore) -> None:
            raise AssertionError("pages do not add up")

        monkeypatch.setattr(EngineCore, "check_invariants", broken)
        runner.fail_next = RuntimeError("a step fails")
        loop.submit(start(1, 4))
        loop.submit(start(2, 4))
        assert isinstance(listener.fatal.get(timeout=WAIT_S), AssertionError)
        loop.submit(start(3, 4))
        last = listener.last_outputs(3)
        assert all(output.error for output in last.values())


def test_the_listener_hears_of_an_end_that_goes_wrong_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever the core cannot answer any more is answered by the listener, or waits for ever."""
    with running() as (loop, listener, runner):

        def broken(self: EngineCore) -> None:
            raise AssertionError("pages do not add up")

        monkeypatch.setattr(EngineCore, "stop", broken)
        runner.fail_next = RunnerBroken("the device is lost")
        loop.submit(start(1, 4))
        assert isinstance(listener.fatal.get(timeout=WAIT_S), RunnerBroken)


def test_the_thread_is_prepared_before_its_first_step() -> None:
    config, listener, seen = make_config(), Listener(), []
    runner = FakeRunner(config.num_pages, config.page_size, config.vocab_size)
    core = EngineCore(config, runner, listener)
    loop = EngineLoop(core, listener, prepare=lambda: seen.append((threading.current_thread().name, len(runner.plans))))
    loop.submit(start(1, 4))
    loop.start()
    assert listener.last_outputs(1)[1].finish_reason
    assert loop.stop(WAIT_S)
    assert seen == [("engine-loop", 0)]


def test_a_runner_that_is_broken_ends_the_loop_and_answers_everything() -> None:
    with running() as (loop, listener, runner):
        runner.fail_next = RunnerBroken("the device is lost")
        loop.submit(start(1, 4))
        error = listener.last_outputs(1)[1].error
        assert isinstance(listener.fatal.get(timeout=WAIT_S), RunnerBroken)
    assert error is not None
    assert error.code is Code.UNAVAILABLE
