"""Programs that misbehave: the request gets a typed error, nothing leaks, the router goes on."""

from __future__ import annotations

import asyncio
import gc
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from services.router.config import RouterConfig
from services.router.errors import BadPolicy
from services.router.fleet.scope import RequestScope
from services.router.metrics import ABANDONED_POLICIES
from services.router.programs.loader import load_source
from services.router.programs.program import POLICY, Program
from services.router.programs.runner import PolicyRun, RunLimits
from services.router.request import PolicyRequest
from services.router.values import Sampling
from tests.fakes import PATIENCE_S
from tests.router.harness import PROMPT, Running, failing, model, running
from tests.router.programs import write

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
    async for chunk in fleet.least_loaded(request).start_generate(request):
        yield chunk
"""
FAILED = ("ABORTED", "POLICY_FAILED")
TIMEOUT = ("DEADLINE_EXCEEDED", "POLICY_TIMEOUT")
BAD = {
    "raises": ("    raise RuntimeError('secret text')\n    yield", FAILED),
    "raises_later": (
        "    async for chunk in fleet.least_loaded(request).start_generate(request):\n"
        "        yield chunk\n        raise RuntimeError",
        FAILED,
    ),
    "raises_what_is_no_text": (
        "    from services.router.policies import ServiceError\n"
        "    raise ServiceError('no file named \\udcff')\n    yield",
        ("INTERNAL", "INTERNAL"),
    ),
    "exits": ("    import sys\n    sys.exit(3)\n    yield", FAILED),
    "yields_nothing": ("    if False:\n        yield", FAILED),
    "yields_nonsense": ("    yield 'text'", FAILED),
    **{
        f"yields_a_chunk_with_{name}": (
            "    from dataclasses import replace\n"
            "    async for chunk in fleet.least_loaded(request).start_generate(request):\n"
            f"        yield replace(chunk, {wrong})",
            FAILED,
        )
        for name, wrong in {
            "a_negative_token": "token_ids=(-5,)",
            "a_huge_token": "token_ids=(2**40,)",
            "a_text": "token_ids=('a',)",
            "a_list": "token_ids=[5]",
            "another_end": "finish='stop'",
            "other_logprobs": "logprobs=(0.5,)",
        }.items()
    },
    "ends_early": (
        "    async for chunk in fleet.least_loaded(request).start_generate(request):\n"
        "        yield chunk\n        return",
        FAILED,
    ),
    "waits_for_ever": ("    await asyncio.Event().wait()\n    yield", TIMEOUT),
    "waits_after_first": (
        "    async for chunk in fleet.least_loaded(request).start_generate(request):\n"
        "        yield chunk\n        await asyncio.Event().wait()",
        TIMEOUT,
    ),
    "ignores_cancel": (
        "    while True:\n        try:\n            await asyncio.Event().wait()\n"
        "        except asyncio.CancelledError:\n            if stop.is_set():\n                raise\n    yield",
        TIMEOUT,
    ),
    "leaks_reservation": (
        "    prefill, decode = fleet.pair(request)\n"
        "    kv = await decode.prep_recv(request, end=20).__aenter__()\n    leaked.append(kv)\n    raise RuntimeError\n"
        "    yield",
        FAILED,
    ),
    "leaks_stream": (
        "    chunks = fleet.least_loaded(request).start_generate(request)\n    leaked.append(chunks)\n"
        "    yield await anext(chunks)\n    raise RuntimeError",
        FAILED,
    ),
    "cancels_itself": ("    asyncio.current_task().cancel()\n    await asyncio.Event().wait()\n    yield", FAILED),
    "cancelled_inside": ("    raise asyncio.CancelledError\n    yield", FAILED),
}


# Less patience with programs that do not end.
QUICK = RunLimits(between_chunks_s=0.1, after_last_chunk_s=0.1, after_cancel_s=0.1)


async def let_go(suite: Running, name: str) -> None:
    """Ends what a program left behind; the garbage collector would complain of it otherwise."""
    suite.router.catalogue.get(name).function.__globals__["stop"].set()
    left = {task for task in asyncio.all_tasks() if task.get_name() == f"policy {name}"}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=60)


async def serves(suite: Running) -> None:
    answer = await suite.generate(policy="data_parallel")
    assert list(answer.token_ids) == model().generate(PROMPT, 8)


@pytest.mark.parametrize("name", BAD)
async def test_bad_programs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, (code, reason) = BAD[name]
    if (code, reason) == TIMEOUT:
        monkeypatch.setattr(RouterConfig, "run_limits", QUICK)
    path = write(tmp_path, name, body)
    async with running(policy=str(path)) as suite:
        with failing(code, reason) as caught:
            await suite.generate(max_tokens=100)
        assert "secret" not in caught.value.message
        await suite.idle()
        monkeypatch.setattr(suite.router._host, "_limits", RunLimits())  # a good program may take its time
        await serves(suite)
        await let_go(suite, name)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("    fleet.engines[7]\n    yield", "raised IndexError at line 6"),
        ("    engine = fleet.engines[0]\n    engine.prep_recv()\n    yield", "raised TypeError at line 7"),
        (
            "    async with asyncio.TaskGroup() as group:\n        group.create_task(fail())\n    yield\n\n"
            "async def fail():\n    return 1 / 0",
            "raised ExceptionGroup at line 11",
        ),
    ],
)
async def test_the_author_is_told_the_line(body: str, what: str, tmp_path: Path) -> None:
    async with running(policy=str(write(tmp_path, "mine", body))) as suite:
        with failing(*FAILED) as caught:
            await suite.generate()
        assert caught.value.message == f"policy mine {what}"


def test_programs_that_are_loaded_again_and_again_leave_nothing_behind() -> None:
    def load(number: int, body: str = GOOD) -> Program:
        fields = f"    x: int = {number}\n"
        header = "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Params:\n"
        return load_source("again", f"{header}{fields}async def policy(request, fleet, params):\n{body}", POLICY)

    load(0)
    for number in range(3):
        assert load(number).bind("").arguments[0].x == number
        for bad in ("    return 1 +", "    return 1"):
            with pytest.raises(BadPolicy):
                load(9, bad)
    [module] = [each for name, each in sys.modules.items() if name.endswith("_again")]
    assert module.Params().x == 2  # what is loaded, not what could not be


async def test_a_program_that_ignores_its_cancellation_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RouterConfig, "run_limits", QUICK)
    counter = ABANDONED_POLICIES.labels("ignores_cancel")
    before = counter._value.get()
    path = write(tmp_path, "ignores_cancel", BAD["ignores_cancel"][0])
    async with running(policy=str(path)) as suite:
        with failing(*TIMEOUT):
            await suite.generate()
        assert counter._value.get() == before + 1
        await let_go(suite, "ignores_cancel")


async def test_a_program_left_behind_can_begin_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouterConfig, "run_limits", QUICK)
    body = dedent("""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await stop.wait()
        try:
            async with fleet.pair(request)[1].prep_recv(request, end=20):
                leaked.append("reserved")
        except BaseException as error:
            leaked.append(error)
        yield
    """).replace("\n", "\n    ")
    path = write(tmp_path, "zombie", body)
    async with running(policy=str(path)) as suite:
        with failing(*TIMEOUT):
            await suite.generate()
        names = suite.router.catalogue.get("zombie").function.__globals__
        [zombie] = [task for task in asyncio.all_tasks() if task.get_name() == "policy zombie"]
        names["stop"].set()
        await asyncio.wait({zombie}, timeout=60)
        assert zombie.done()
        assert "the request is over" in str(names["leaked"][0])
        assert suite.engines[1].called("PrepRecv") == []


async def test_the_log_names_what_a_program_left_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = dedent("""
        prefill, decode = fleet.pair(request)
        leaked.append(decode.prep_recv(request, end=20))
        await leaked[-1].__aenter__()
        for _ in range(2):
            leaked.append(prefill.start_generate(request))
            await anext(leaked[-1])
        yield decode.start_generate(request)
    """).replace("\n", "\n    ")
    async with running(policy=str(write(tmp_path, "forgetful", body))) as suite:
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        await suite.idle()
    [left] = [record for record in caplog.records if record.message == "policy left something open"]
    assert left.fields["open"] == "prep_recv on b, 2 start_generate on a"  # type: ignore[attr-defined]


async def test_what_a_program_does_after_the_last_chunk_does_not_hurt_the_answer(tmp_path: Path) -> None:
    path = write(tmp_path, "careless", GOOD.strip("\n") + "\n    yield 3\n    raise RuntimeError")
    async with running(policy=str(path)) as suite:
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)


@pytest.mark.slow
async def test_a_client_that_leaves_after_its_last_chunk_ends_the_program_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever turn of the event loop it leaves in."""
    monkeypatch.setattr(RouterConfig, "run_limits", replace(QUICK, between_chunks_s=PATIENCE_S))
    path = write(tmp_path, "lingers", GOOD.strip("\n") + "\n    await asyncio.Event().wait()")
    async with running(policy=str(path)) as suite:
        program, [served] = suite.router.catalogue.resolve(""), suite.router.registry.models()
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        asked = PolicyRequest("r", served.key, PROMPT, Sampling(max_tokens=2), deadline=deadline)
        for num_turns in range(1, 4):
            run = suite.router._host.run(program, asked)
            await run.each(lambda chunk: chunk.finish is None)
            closing = asyncio.create_task(run.close())
            for _ in range(num_turns):
                await asyncio.sleep(0)
            closing.cancel()
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.wait({run._task})
        await suite.idle()


async def test_a_program_that_waits_for_ever_is_told_for_which_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RouterConfig, "run_limits", QUICK)
    body = dedent("""
        decode = fleet.pair(request)[1]
        async with decode.prep_recv(request, end=50) as kv:
            yield decode.start_generate(request, begin=50, kv=kv)
    """).replace("\n", "\n    ")
    async with running(policy=str(write(tmp_path, "unsent", body))) as suite:
        with failing(*TIMEOUT) as caught:
            await suite.generate()
        assert caught.value.message == "policy unsent yielded nothing for 0.1 s, with start_generate on b under way"


async def test_a_request_that_has_ended_leaves_no_garbage() -> None:
    """What only the collector frees grows between its rounds, and its rounds stop every request."""

    def runs() -> set[int]:
        # By their types: to ask an object for its class runs code of some libraries.
        return {id(each) for each in gc.get_objects() if type(each) in (PolicyRun, RequestScope)}

    async with running(policy="disaggregated") as suite:
        gc.collect()
        gc.disable()
        try:
            before = runs()
            for _ in range(20):
                await suite.generate()
            await suite.idle()
            assert runs() <= before
        finally:
            gc.enable()


async def test_a_timeout_names_few_of_many_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouterConfig, "run_limits", QUICK)
    body = """
    streams = [fleet.engines[0].start_generate(request) for _ in range(50)]
    await asyncio.gather(*map(anext, streams))
    yield
    """
    async with running(policy=str(write(tmp_path, "many", body))) as suite:
        suite.first.gate.clear()
        with failing(*TIMEOUT) as caught:
            await suite.generate()
        assert caught.value.message.endswith("start_generate on a, 42 more under way")
