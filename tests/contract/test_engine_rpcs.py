"""Every rpc of EngineService is there; what the engine says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import pytest
from microserve.engine.v1 import engine_pb2 as pb
from microserve.types.v1 import kv_pb2 as kv

from tests.contract.verbs import (
    MAX_CONTEXT,
    PAGE_SIZE,
    PAGES,
    SMALL_CONTEXT,
    SMALL_PAGES,
    VOCAB,
    prompt_of,
)
from tests.e2e.errors import failing, outcome
from tests.e2e.suite import (
    OWNER,
    Suite,
    idle,
    wait_for_load,
)
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow


RPCS = {
    "PrepRecv",
    "RemoteSend",
    "StartGenerate",
    "Session",
    "Complete",
    "Release",
    "Renew",
    "Abort",
    "GetInfo",
    "WatchLoad",
    "WatchKvEvents",
    "ListReservations",
    "GetTokenizer",
}


async def test_the_service_has_exactly_these_rpcs(suite: Suite) -> None:
    service = pb.DESCRIPTOR.services_by_name["EngineService"]
    assert {method.name for method in service.methods} == RPCS
    for name in sorted(RPCS):
        path = f"/{service.full_name}/{name}"
        # A stream both ways carries any rpc; the empty request must reach the engine's own rules, not "unimplemented".
        call = suite.channels[0].stream_stream(path)(iter([b""]), timeout=5)
        code = await outcome(call.read())
        assert code not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL), name
        call.cancel()
    await wait_for_load(suite.engines[0], idle)


async def test_get_info(suite: Suite) -> None:
    infos = [await at.stub.GetInfo(pb.GetInfoRequest()) for at in suite.engines]
    assert [info.engine_name for info in infos] == ["engine-0", "engine-1", "engine-2"]
    assert len({info.incarnation for info in infos}) == 3
    assert len({(info.model_digest, info.tokenizer_digest, info.model) for info in infos}) == 1
    assert [info.page_count for info in infos] == [PAGES, PAGES, SMALL_PAGES]
    assert [info.max_context_length for info in infos] == [MAX_CONTEXT, MAX_CONTEXT, SMALL_CONTEXT]
    assert [dict(info.labels) for info in infos] == [{"zone": "a"}, {"zone": "a"}, {}]
    for info in infos:
        assert len(info.incarnation) == 16
        assert info.model_digest
        assert info.tokenizer_digest
        assert info.model
        assert info.contract_version == "1.1"
        assert (info.vocab_size, info.device, list(info.eos_token_ids)) == (VOCAB, "cpu", [2])
        assert info.max_batch_size == 64
        assert info.kvtransfer_endpoint == suite.kvtransfer.address
        assert len(info.transports) > 0
        expected = kv.PageLayout(
            layer_count=4,
            kv_head_count=2,
            head_dim=16,
            page_size=PAGE_SIZE,
            dtype=kv.DTYPE_FLOAT32,
            order=kv.PAGE_ORDER_KV_HEAD_TOKEN_DIM,
        )
        assert info.layout == expected


async def test_get_tokenizer(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> None:
    at = suite.engines[0]
    files: dict[str, bytes] = {}
    async for piece in at.stub.GetTokenizer(pb.GetTokenizerRequest(known_digest=b"another")):
        assert len(piece.data) <= 1 << 20
        files[piece.file_name] = files.get(piece.file_name, b"") + piece.data
    assert set(files) == {"tokenizer.json", "special_tokens.json", "chat_template.jinja"}
    folder = make_tiny_llama(tmp_path_factory.mktemp("same"), vocab=VOCAB, max_context=MAX_CONTEXT)
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    current = (await at.stub.GetInfo(pb.GetInfoRequest())).tokenizer_digest
    assert [piece async for piece in at.stub.GetTokenizer(pb.GetTokenizerRequest(known_digest=current))] == []


async def test_watch_load_speaks_at_once_and_at_every_change(suite: Suite) -> None:
    at = suite.engines[0]
    request = pb.WatchLoadRequest()
    request.min_interval.FromMilliseconds(10)
    call = at.stub.WatchLoad(request, timeout=120)
    first = await asyncio.wait_for(call.read(), 60)
    assert first.pages.total == PAGES
    assert not first.draining
    seen = [first]

    async def until(condition: Callable[[pb.WatchLoadResponse], bool]) -> None:
        while not condition(seen[-1]):
            seen.append(await call.read())
            assert seen[-1] != seen[-2], "one message for each change"

    start = pb.StartGenerateRequest(owner_id=OWNER, request_id="watched", prompt_token_ids=prompt_of(40, 1))
    start.sampling.max_tokens, start.sampling.ignore_eos = 1900, True
    generating = asyncio.ensure_future(at.stub.Complete(pb.CompleteRequest(start=start), timeout=120))
    await until(lambda report: report.running_sequence_count == 1 and report.context_token_count > 40)
    await generating
    await until(lambda report: idle(report) and report.step_count >= first.step_count + 1900)
    assert [report.step_count for report in seen] == sorted(report.step_count for report in seen)
    call.cancel()
    request.min_interval.FromMilliseconds(9)
    with failing(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST"):
        await at.stub.WatchLoad(request).read()


# --- prefix cache events ----------------------------------------------------------------------------------------
