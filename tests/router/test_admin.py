"""AdminService: engines, programs, traces; changing the program under load."""

from __future__ import annotations

import asyncio
import builtins
import logging
import sys
import threading
from pathlib import Path

import grpc
import pytest
from microserve.router.v1 import admin_pb2, admin_pb2_grpc

from services.router.metrics import ABANDONED_POLICIES
from services.router.programs.stack import MODULE_PREFIX
from services.rpc.status import from_rpc_error
from tests.fakes import PATIENCE_S, FakeBug, FakeEngine, Fault
from tests.router.harness import PROMPT, Running, failing, model, running

UPLOADED = '''"""Everything on the last engine."""


async def policy(request, fleet):
    async for chunk in fleet.engines[-1].start_generate(request):
        yield chunk
'''


async def use(suite: Running, name: str, source: str = "") -> admin_pb2.PolicyInfo:
    try:
        return (await suite.admin.SetPolicy(admin_pb2.SetPolicyRequest(name=name, source=source))).policy
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def test_engines_are_listed_as_the_router_sees_them() -> None:
    engines = [FakeEngine(model(), "a"), FakeEngine(model(), "b")]
    async with running(engines=engines) as suite:
        engines[0].kv.publish(PROMPT, "")
        await suite.cached(engines[0], 12)
        listed = (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())).engines
        assert [each.address for each in listed] == sorted(engine.address for engine in engines)
        status = {each.info.engine_name: each for each in listed}
        assert status["a"].healthy
        assert (status["a"].problem, status["a"].cached_block_count) == ("", 12)
        assert status["a"].info.model_digest == model().digest
        engines[1].drain()
        await suite.until(lambda: len(suite.router.registry.models()[0].members) == 1)
        listed = (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())).engines
        status = {each.info.engine_name: each for each in listed}
        assert (status["b"].healthy, status["b"].problem) == (False, "it is draining")
        assert status["b"].load.draining


async def test_an_engine_that_cannot_be_reached_says_why() -> None:
    engine = FakeEngine(model(), "a")
    async with running(engines=[engine]) as suite:
        [status] = (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())).engines
        assert status.HasField("load")
        await engine.stop()
        await suite.until(lambda: not suite.router.serving)
        [status] = (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())).engines
        assert not status.healthy
        assert status.problem
        assert status.info.engine_name == "a"
        assert not status.HasField("load")  # what it said last is true no more
        suite.engines.clear()


async def test_policies_are_listed_shown_and_set() -> None:
    async with running() as suite:
        listed = (await suite.admin.ListPolicies(admin_pb2.ListPoliciesRequest())).policies
        names = ["adaptive", "at_home", "balanced", "context_aware", "data_parallel", "disaggregated"]
        assert [each.name for each in listed] == names
        assert [each.name for each in listed if each.current] == ["data_parallel"]
        assert all(each.summary and each.file for each in listed)
        assert (await use(suite, "balanced:0.5")).name == "balanced:0.5"
        shown = await suite.admin.GetPolicy(admin_pb2.GetPolicyRequest())
        assert (shown.policy.name, shown.policy.current) == ("balanced:0.5", True)
        assert "params.ratio" in shown.source
        assert (await suite.generate()).policy == "balanced:0.5"
        for name, code, reason in (
            ("nope", "NOT_FOUND", "UNKNOWN_POLICY"),
            ("balanced:7", "INVALID_ARGUMENT", "BAD_POLICY"),
            ("", "INVALID_ARGUMENT", "BAD_POLICY"),
        ):
            with failing(code, reason):
                await use(suite, name)
        assert (await suite.generate()).policy == "balanced:0.5"


async def test_code_is_not_taken_by_default() -> None:
    async with running() as suite:
        with failing("PERMISSION_DENIED", "UPLOAD_DISABLED"):
            await use(suite, "mine", UPLOADED)


async def test_uploads_go_to_the_admin_address_only() -> None:
    async with running(takes_uploads=True) as suite:
        uploaded = await use(suite, "mine", UPLOADED)
        assert (uploaded.name, uploaded.summary, uploaded.current, uploaded.file) == (
            "mine",
            "Everything on the last engine.",
            True,
            "",
        )
        answer = await suite.generate()
        last = suite.router.registry.models()[0].members[-1].info
        assert last is not None
        assert (answer.policy, answer.legs[0].engine) == ("mine", last.name)
        on_main = admin_pb2_grpc.AdminServiceStub(suite.channels[0])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await on_main.SetPolicy(admin_pb2.SetPolicyRequest(name="yours", source=UPLOADED))
        assert from_rpc_error(caught.value).reason == "UPLOAD_DISABLED"
        assert (await on_main.SetPolicy(admin_pb2.SetPolicyRequest(name="disaggregated"))).policy.current


async def test_parameters_come_with_an_upload() -> None:
    with_params = (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Params:\n    index: int = 0\n"
        "async def policy(request, fleet, params):\n"
        "    async for chunk in fleet.engines[params.index].start_generate(request):\n        yield chunk\n"
    )
    async with running(takes_uploads=True) as suite:
        assert (await use(suite, "mine:index=1", with_params)).name == "mine:index=1"
        second = suite.router.registry.models()[0].members[1].info
        assert second is not None
        assert (await suite.generate()).legs[0].engine == second.name
        with failing("INVALID_ARGUMENT", "BAD_POLICY"):
            await use(suite, "mine:inde=0", with_params)
        assert (await suite.generate()).policy == "mine:index=1"


@pytest.mark.parametrize(
    ("name", "source", "sentence"),
    [
        ("mine", "def policy(request, fleet", "line 1"),
        ("mine", "raise RuntimeError('no')", "RuntimeError"),
        ("mine", "import sys; sys.exit()", "SystemExit"),
        ("mine", "x = 1", "no `async def policy"),
        ("mine", "async def policy(request, fleet): pass", "that yields"),
        ("mine", "async def policy(request): yield", "does not take"),
        ("mine", "Params = 3\nasync def policy(request, fleet, params): yield", "not a dataclass"),
        (
            "mine",
            "from dataclasses import dataclass\n@dataclass\nclass Params: x: int = 1\n"
            "async def policy(request, fleet, params): yield",
            "not frozen",
        ),
        (
            "mine",
            "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Params: x: list = None\n"
            "async def policy(request, fleet, params): yield",
            "neither bool",
        ),
        ("mine", "#" * 70_000, "longer"),
        ("balanced", UPLOADED, "built in"),
        ("../mine", UPLOADED, "no name"),
        ("mine:1", UPLOADED, "takes no parameters"),
    ],
)
async def test_programs_that_cannot_be_loaded_change_nothing(name: str, source: str, sentence: str) -> None:
    async with running(takes_uploads=True) as suite:
        with failing("INVALID_ARGUMENT", "BAD_POLICY") as caught:
            await use(suite, name, source)
        assert sentence in caught.value.message
        assert (await suite.generate()).policy == "data_parallel"


SPINS = "while True:\n    pass\n"
NEVER_LOADED = {
    "spins": SPINS,
    "tries_again": """
while True:
    try:
        while True:
            pass
    except Exception:
        pass
""",
    "catches_all_a_few_times": f"""
for _ in range(3):
    try:
        while True:
            pass
    except BaseException:
        pass
{SPINS}""",
    "spins_in_its_params": """
class Endless(type):
    @property
    def __dataclass_params__(self):
        while True:
            pass
class Params(metaclass=Endless):
    __dataclass_fields__ = {}
""",
}


async def none_loads() -> None:
    """Waits until no program is being loaded any more."""
    for thread in threading.enumerate():
        if thread.name.startswith("load policy "):
            await asyncio.to_thread(thread.join, PATIENCE_S)
            assert not thread.is_alive()


@pytest.mark.parametrize("name", NEVER_LOADED)
async def test_code_that_never_finishes_loading_is_refused_and_ended(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.programs.loader.LOAD_TIMEOUT_S", 0.1)
    async with running(takes_uploads=True) as suite:
        with failing("INVALID_ARGUMENT", "BAD_POLICY") as caught:
            await use(suite, name, NEVER_LOADED[name])
        assert "did not finish" in caught.value.message
        await none_loads()
        assert f"{MODULE_PREFIX}policy_{name}" not in sys.modules


async def test_code_that_nobody_waits_for_any_more_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    monkeypatch.setattr(builtins, "begun", begun, raising=False)
    async with running(takes_uploads=True) as suite:
        call = suite.admin.SetPolicy(admin_pb2.SetPolicyRequest(name="spins", source=f"begun.set()\n{SPINS}"))
        # Called only now, by one that waits.
        waiting = asyncio.ensure_future(call)
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        waiting.cancel()
        await none_loads()


async def test_code_that_cannot_be_interrupted_while_it_loads_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.router.programs.loader.LOAD_TIMEOUT_S", 0.1)
    monkeypatch.setattr("services.router.programs.loader.GIVE_UP_TIMEOUT_S", 0.1)
    go = threading.Event()
    monkeypatch.setattr(builtins, "go", go, raising=False)
    counter = ABANDONED_POLICIES.labels("stubborn")
    before = counter._value.get()
    given_up = asyncio.Event()
    monkeypatch.setattr(
        logging.getLogger("services.router.programs.loader"), "filters", [lambda _: given_up.set() is None]
    )
    source = "while not go.is_set():\n    try:\n        go.wait()\n    except BaseException:\n        pass\n"
    async with running(takes_uploads=True) as suite:
        with failing("INVALID_ARGUMENT", "BAD_POLICY"):
            await use(suite, "stubborn", source)
        async with asyncio.timeout(PATIENCE_S):
            await given_up.wait()
        assert counter._value.get() == before + 1
        go.set()
        await none_loads()


async def test_files_are_at_hand_by_their_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(UPLOADED)
    async with running(policy_file=(path,)) as suite:
        assert (await suite.generate()).policy == "data_parallel"
        assert (await suite.generate(policy="mine")).policy == "mine"


@pytest.mark.slow
async def test_a_swap_under_load_loses_no_request() -> None:
    """200 requests while the program changes after every few; each ends on the program that it began with."""
    rotation = ["data_parallel", "disaggregated", "context_aware", "balanced:0.5", "mine"]
    async with running(takes_uploads=True) as suite:
        await use(suite, "mine", UPLOADED)
        room = asyncio.Semaphore(16)
        served: list[str] = []

        async def one(number: int) -> None:
            async with room:
                if number % 7 == 0:
                    await use(suite, rotation[number // 7 % len(rotation)])
                prompt = tuple(range(5 + number % 40, 60))
                answer = await suite.generate(prompt)
                assert list(answer.token_ids) == model().generate(prompt, 8)
                served.append(answer.policy)

        await asyncio.gather(*(one(number) for number in range(200)))
        assert len(served) == 200
        assert set(served) == set(rotation)


async def test_a_request_ends_on_the_program_it_began_with() -> None:
    async with running(takes_uploads=True) as suite:
        await use(suite, "mine", UPLOADED)
        for engine in suite.engines:
            engine.gate.clear()
        call = suite.stream()
        await suite.engines[-1].until(lambda: any(engine.sequences for engine in suite.engines))
        await use(suite, "mine", "async def policy(request, fleet):\n    raise RuntimeError\n    yield\n")
        for engine in suite.engines:
            engine.gate.set()
        pieces = [piece async for piece in call]
        assert [token for piece in pieces for token in piece.token_ids] == model().generate(PROMPT, 8)
        with failing("ABORTED", "POLICY_FAILED"):
            await suite.generate()
        await use(suite, "data_parallel")


async def test_traces_of_good_and_bad_requests() -> None:
    async with running(policy="disaggregated", max_traces=2) as suite:
        await suite.generate(request_id="good")
        trace = await suite.admin.GetTrace(admin_pb2.GetTraceRequest(request_id="good"))
        assert (trace.policy, trace.code, len(trace.legs)) == ("disaggregated", "OK", 3)
        suite.first.faults["RemoteSend"] = Fault(FakeBug("no sending today"))
        with failing("INTERNAL", "INTERNAL"):
            await suite.generate(request_id="bad", cache_salt="x")
        trace = await suite.admin.GetTrace(admin_pb2.GetTraceRequest(request_id="bad"))
        assert (trace.code, len(trace.legs)) == ("INTERNAL", 2)
        suite.first.faults.clear()
        unnamed = await suite.generate()
        await suite.admin.GetTrace(admin_pb2.GetTraceRequest(request_id=unnamed.request_id))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await suite.admin.GetTrace(admin_pb2.GetTraceRequest(request_id="good"))
        assert from_rpc_error(caught.value).reason == "UNKNOWN_REQUEST"


async def test_secrets_and_text_stay_out_of_traces_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with running(policy="disaggregated") as suite:
        await suite.generate(text="a very private question", request_id="it")
        trace = await suite.admin.GetTrace(admin_pb2.GetTraceRequest(request_id="it"))
        [start] = suite.engines[1].called("Session")
        secret = start.reservation.secret
        assert secret not in trace.SerializeToString()
        assert secret.hex() not in caplog.text
        assert repr(secret) not in caplog.text
        assert "private" not in caplog.text
        [ended] = [record.fields for record in caplog.records if record.message == "request ended"]
        assert (ended["request"], ended["policy"], ended["code"], ended["output"]) == ("it", "disaggregated", "OK", 8)
        member = suite.router.registry.members[suite.first.address]
        assert "secret" not in repr(member.snapshot())
