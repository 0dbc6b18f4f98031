"""Programs that misbehave: the request gets a typed error, nothing leaks, the router goes on."""

from __future__ import annotations

import asyncio
import gc
import re
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent, indent

import pytest

from services.protocol.errors import OutsideWindow, ReservationGone, ServiceError, UnknownReservation
from services.router.config import RouterConfig
from services.router.errors import BadPolicy
from services.router.fleet.scope import RequestScope
from services.router.metrics import ABANDONED_POLICIES
from services.router.programs.loader import load_source
from services.router.programs.program import POLICY, Program
from services.router.programs.runner import PolicyRun, RunLimits
from services.router.request import PolicyRequest
from services.router.values import Sampling
from tests.fakes import PATIENCE_S, FakeBug, FakeError, Fault
from tests.router.harness import PROMPT, Running, failing, model, running, verbs

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


def write(folder: Path, name: str, body: str) -> Path:
    path = folder / f"{name}.py"
    header = "import asyncio\nleaked = []\nstop = asyncio.Event()\n\nasync def policy(request, fleet):\n"
    path.write_text(header + body + "\n")
    return path


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


async def test_a_program_may_use_task_groups_and_keeps_the_engines_error(tmp_path: Path) -> None:
    body = dedent("""
        prefill, decode = fleet.pair(request)
        async with decode.prep_recv(request, end=50) as kv, asyncio.TaskGroup() as group:
            group.create_task(prefill.remote_send(request, kv))
            async for chunk in decode.start_generate(request, begin=50, kv=kv):
                yield chunk
    """).replace("\n", "\n    ")
    path = write(tmp_path, "overlapping", body)
    async with running(policy=str(path)) as suite:
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert [verb for verb, *_ in verbs(answer)] == ["prep_recv", "start_generate", "remote_send"]
        suite.first.faults["RemoteSend"] = Fault(FakeBug("no sending today"))
        with failing("INTERNAL", "INTERNAL"):
            await suite.generate(cache_salt="other")


async def test_a_failed_send_can_be_tried_again_with_the_next_attempt(tmp_path: Path) -> None:
    body = dedent("""
        prefill, decode = fleet.pair(request)
        async with decode.prep_recv(request, end=50) as kv:
            try:
                await prefill.remote_send(request, kv)
            except Exception:
                prefill.info.labels["repair"]()
                await prefill.remote_send(request, kv)
            async for chunk in decode.start_generate(request, begin=50, kv=kv):
                yield chunk
    """).replace("\n", "\n    ")
    path = write(tmp_path, "retrying", body)
    async with running(policy=str(path)) as suite:
        sender = suite.first
        sender.faults["RemoteSend"] = Fault(FakeError("not the first time"))
        suite.router.registry.members[sender.address].info.labels["repair"] = sender.faults.clear
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        assert [sent.attempt for sent in sender.called("RemoteSend")] == [1, 2]


MISUSE = {
    "a_negative_end": "    async with decode.prep_recv(request, end=-1):\n        yield",
    "the_reservation_of_another_engine": (
        "    async with decode.prep_recv(request, end=50) as kv:\n        await prefill.remote_send(request, kv)\n"
        "        yield prefill.start_generate(request, begin=50, kv=kv)"
    ),
    "a_range_in_a_task": (
        "    from services.router.policies import TokenRange\n"
        "    async with decode.prep_recv(request, end=40) as kv:\n"
        "        async with asyncio.TaskGroup() as group:\n"
        "            group.create_task(prefill.remote_send(request, kv, TokenRange(0, 50)))\n"
        "        yield decode.start_generate(request, begin=40, kv=kv)"
    ),
    "a_reservation_that_was_released": (
        "    async with decode.prep_recv(request, end=50) as kv:\n        await prefill.remote_send(request, kv)\n"
        "    yield decode.start_generate(request, begin=50, kv=kv)"
    ),
}


@pytest.mark.parametrize("name", MISUSE)
async def test_what_a_program_gives_a_verb_is_not_the_clients_fault(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, "    prefill, decode = fleet.pair(request)\n" + MISUSE[name])
    async with running(policy=str(path)) as suite:
        with failing(*FAILED) as caught:
            await suite.generate()
        assert re.match(
            rf"policy {name} called a verb at line \d+ that was refused: .+ \([A-Z_]+\)", caught.value.message
        )


async def test_of_a_group_the_line_is_told_that_its_error_came_through(tmp_path: Path) -> None:
    body = """\
        from services.router.policies import TokenRange
        async def other():
            raise ValueError
        async def send(kv):
            await prefill.remote_send(request, kv, TokenRange(0, 50))
        prefill, decode = fleet.pair(request)
        async with decode.prep_recv(request, end=40) as kv:
            try:
                await send(kv)
            except Exception as error:
                raise ExceptionGroup("both", [await asyncio.gather(other(), return_exceptions=True)][0] + [error])
            yield
    """
    path = write(tmp_path, "group", indent(dedent(body), "    "))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "TokenRange(0, 50)" in text)
    async with running(policy=str(path)) as suite:
        with failing(*FAILED) as caught:
            await suite.generate()
        assert f"called a verb at line {line} that was refused" in caught.value.message


async def test_a_range_that_the_program_made_wrong_is_no_verbs_refusal(tmp_path: Path) -> None:
    path = write(
        tmp_path, "wrong", "    from services.router.policies import TokenRange\n    TokenRange(5, 3)\n    yield"
    )
    async with running(policy=str(path)) as suite:
        with failing(*FAILED) as caught:
            await suite.generate()
        assert re.fullmatch(r"policy wrong raised InvalidRange at line \d+", caught.value.message)


@pytest.mark.parametrize("error", [ReservationGone("the lease ran out"), UnknownReservation("none of that id")])
async def test_a_reservation_that_is_lost_is_no_fault_of_the_program(error: ServiceError, tmp_path: Path) -> None:
    path = write(tmp_path, "good", (ROOT / "docs/examples/hello_policy.py").read_text().partition("fleet):")[2])
    async with running(policy=str(path)) as suite:
        for engine in suite.engines:
            engine.faults["RemoteSend"] = Fault(error)
        with failing(error.code.name, error.reason):
            await suite.generate()


async def test_a_built_in_program_is_never_blamed() -> None:
    async with running(policy="disaggregated") as suite:
        for engine in suite.engines:
            engine.faults["RemoteSend"] = Fault(OutsideWindow("not in the window"))
        with failing("OUT_OF_RANGE", "OUTSIDE_WINDOW"):
            await suite.generate()


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
