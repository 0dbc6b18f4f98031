"""Bad input to an engine: the right code, a reason and a sentence, and the engine goes on serving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from microserve.engine.v1 import engine_pb2 as engine
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub
from microserve.types.v1 import kv_pb2 as kv
from microserve.types.v1 import sampling_pb2 as sampling

from tests.contract.verbs import MAX_CONTEXT
from tests.e2e.errors import failing
from tests.e2e.suite import OWNER, Suite, generate, idle, prep_recv, wait_for_load
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PROMPT = list(range(5, 45))
NAN = float("nan")


def start(**fields: object) -> engine.StartGenerateRequest:
    defaults = {"owner_id": OWNER, "request_id": "bad", "prompt_token_ids": PROMPT}
    return engine.StartGenerateRequest(**{**defaults, **fields})


def prep(**fields: object) -> engine.PrepRecvRequest:
    defaults = {"owner_id": OWNER, "request_id": "bad", "prompt_token_ids": PROMPT, "end": 30}
    return engine.PrepRecvRequest(**{**defaults, **fields})


def sampled(**params: object) -> engine.StartGenerateRequest:
    return start(sampling=sampling.SamplingParams(**params))


BAD: dict[str, tuple[Message, str]] = {
    "empty prompt": (start(prompt_token_ids=[]), "EMPTY_PROMPT"),
    "empty prompt to receive": (prep(prompt_token_ids=[], end=0), "EMPTY_PROMPT"),
    "token out of range": (start(prompt_token_ids=[5, 4_000_000]), "TOKEN_OUT_OF_RANGE"),
    "token out of range to receive": (prep(prompt_token_ids=[5, 2**32 - 1], end=1), "TOKEN_OUT_OF_RANGE"),
    "forced token out of range": (start(forced_token_ids=[4_000_000]), "TOKEN_OUT_OF_RANGE"),
    "longer than the context": (start(prompt_token_ids=[5] * (MAX_CONTEXT + 1)), "PROMPT_TOO_LONG"),
    "longer than the context to receive": (prep(prompt_token_ids=[5] * (MAX_CONTEXT + 1), end=1), "PROMPT_TOO_LONG"),
    "end beyond the prompt": (prep(end=41), "INVALID_RANGE"),
    "begin without a reservation": (start(begin=3), "INVALID_RANGE"),
    "more prompt than tokens": (start(prompt_token_count=41), "INVALID_RANGE"),
    "no owner": (start(owner_id=""), "BAD_REQUEST"),
    "no request id": (prep(request_id=""), "BAD_REQUEST"),
    "an endless request id": (start(request_id="x" * 129), "BAD_REQUEST"),
    "an endless salt": (start(cache_salt="x" * 129), "BAD_REQUEST"),
    "temperature not a number": (sampled(temperature=NAN), "INVALID_SAMPLING"),
    "temperature negative": (sampled(temperature=-1), "INVALID_SAMPLING"),
    "temperature infinite": (sampled(temperature=float("inf")), "INVALID_SAMPLING"),
    "top_p above one": (sampled(temperature=1, top_p=1.5), "INVALID_SAMPLING"),
    "min_p negative": (sampled(temperature=1, min_p=-0.5), "INVALID_SAMPLING"),
    "repetition penalty negative": (sampled(repetition_penalty=-2), "INVALID_SAMPLING"),
    "presence penalty too strong": (sampled(presence_penalty=99), "INVALID_SAMPLING"),
    "frequency penalty not a number": (sampled(frequency_penalty=NAN), "INVALID_SAMPLING"),
    "too many log-probabilities": (sampled(logprobs=5000), "INVALID_SAMPLING"),
    "bias on no token": (sampled(logit_bias={4_000_000: 1.0}), "INVALID_SAMPLING"),
    "bias not a number": (sampled(logit_bias={5: NAN}), "INVALID_SAMPLING"),
    "stop token out of range": (sampled(stop_token_ids=[4_000_000]), "INVALID_SAMPLING"),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_makes_no_sense_is_refused(suite: Suite, name: str) -> None:
    at = suite.engines[0]
    request, reason = BAD[name]
    with failing(INVALID, reason):
        if isinstance(request, engine.PrepRecvRequest):
            await at.stub.PrepRecv(request)
        else:
            await at.stub.StartGenerate(request).read()
    if isinstance(request, engine.StartGenerateRequest):
        with failing(INVALID, reason):
            await at.stub.Complete(engine.CompleteRequest(start=request))
    await goes_on(suite)


def unknown(secret: bytes = bytes(16)) -> engine.ReservationRef:
    return engine.ReservationRef(reservation_id="nobody", secret=secret)


async def test_unknown_reservations(suite: Suite) -> None:
    stub = suite.engines[0].stub
    for call in (
        stub.Renew(engine.RenewRequest(reservation=unknown())),
        stub.Release(engine.ReleaseRequest(reservation=unknown())),
        stub.StartGenerate(start(reservation=unknown(), begin=30)).read(),
    ):
        with failing(grpc.StatusCode.NOT_FOUND, "UNKNOWN_RESERVATION"):
            await call
    with failing(INVALID):
        await stub.Renew(engine.RenewRequest(reservation=unknown(secret=b"short")))
    await goes_on(suite)


def spoil(change: Callable[[kv.KvAddress], object]) -> Callable[[engine.RemoteSendRequest], object]:
    return lambda request: change(request.address)


SPOILED: dict[str, tuple[Callable[[engine.RemoteSendRequest], object], grpc.StatusCode, str]] = {
    "stale epoch": (
        spoil(lambda a: setattr(a, "epoch", bytes(16))), grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH"),
    "wrong secret": (
        spoil(lambda a: setattr(a, "secret", bytes(16))), grpc.StatusCode.PERMISSION_DENIED, "WRONG_SECRET"),
    "other model": (
        spoil(lambda a: setattr(a, "model_digest", bytes(16))), grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_MISMATCH"),
    "other layout": (
        spoil(lambda a: setattr(a.layout, "head_dim", 2)), grpc.StatusCode.FAILED_PRECONDITION, "LAYOUT_MISMATCH"),
    "other service": (
        spoil(lambda a: a.MergeFrom(kv.KvAddress(endpoint="127.0.0.1:1", epoch=bytes(16)))),
        grpc.StatusCode.UNAVAILABLE, "PEER_UNREACHABLE"),
    "begin after end": (lambda r: setattr(r.range, "begin", 31), INVALID, "INVALID_RANGE"),
    "beyond the window": (lambda r: setattr(r.range, "end", 40), grpc.StatusCode.OUT_OF_RANGE, "OUTSIDE_WINDOW"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
async def test_spoiled_addresses(suite: Suite, name: str) -> None:
    sender, receiver = suite.engines[:2]
    change, code, reason = SPOILED[name]
    prepared = await prep_recv(suite, receiver, PROMPT, 30, cache_salt=name)
    request = engine.RemoteSendRequest(
        owner_id=OWNER,
        request_id=suite.new_id(),
        prompt_token_ids=PROMPT,
        range=prepared.address.window,
        address=prepared.address,
        cache_salt=name,
    )
    change(request)
    with failing(code, reason):
        await sender.stub.RemoteSend(request, timeout=20)
    reference = engine.ReservationRef(reservation_id=prepared.address.reservation_id, secret=prepared.address.secret)
    await receiver.stub.Release(engine.ReleaseRequest(reservation=reference))
    await goes_on(suite)


async def test_no_address_at_all(suite: Suite) -> None:
    with failing(INVALID):
        await suite.engines[0].stub.RemoteSend(
            engine.RemoteSendRequest(owner_id=OWNER, request_id="none", prompt_token_ids=PROMPT)
        )
    await goes_on(suite)


async def test_ten_megabytes(suite: Suite) -> None:
    with failing(grpc.StatusCode.RESOURCE_EXHAUSTED):
        await suite.engines[0].stub.StartGenerate(start(prompt_token_ids=[400] * 5_000_000)).read()
    await goes_on(suite)


async def test_an_engine_without_a_transfer_service(suite: Suite, tmp_path: Path) -> None:
    process = suite.fleet.start_engine("alone", make_tiny_llama(tmp_path), None)
    stub = EngineServiceStub(suite.connect(process.address))
    with failing(grpc.StatusCode.FAILED_PRECONDITION, "NO_KVTRANSFER"):
        await stub.PrepRecv(prep())
    reply = await stub.Complete(engine.CompleteRequest(start=sampled(max_tokens=3, ignore_eos=True)))
    assert len(reply.output.token_ids) == 3
    process.terminate()
    assert process.wait(60) == 0


async def goes_on(suite: Suite) -> None:
    for at in suite.engines:
        assert len((await generate(suite, at, PROMPT, max_tokens=2)).token_ids) == 2
        await wait_for_load(at, idle)
