"""Reflection as tools use it, in the version that they ask for first and in the older one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2
from microserve.engine.v1 import engine_pb2_grpc

from services.rpc.server import Server, ServerConfig
from tests.rpc.conftest import SERVICE, Serve

BIN = Path(sys.executable).parent
V1, V1ALPHA = (f"grpc.reflection.{version}.ServerReflection" for version in ("v1", "v1alpha"))
LISTED = {SERVICE, "grpc.health.v1.Health", V1, V1ALPHA}


async def asked(
    channel: grpc.aio.Channel, service: str, *requests: reflection_pb2.ServerReflectionRequest
) -> list[reflection_pb2.ServerReflectionResponse]:
    call = channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return [reply async for reply in call(iter(requests))]


@pytest.mark.parametrize("version", [V1, V1ALPHA])
async def test_it_lists_all_services_and_describes_each(serve: Serve, version: str) -> None:
    channel = (await serve()).channel
    [names] = await asked(channel, version, reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = [service.name for service in names.list_services_response.service]
    assert set(listed) == LISTED
    requests = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in listed]
    for name, reply in zip(listed, await asked(channel, version, *requests), strict=True):
        files = map(descriptor_pb2.FileDescriptorProto.FromString, reply.file_descriptor_response.file_descriptor_proto)
        assert name in {f"{each.package}.{service.name}" for each in files for service in each.service}


async def test_what_is_not_there_is_said_to_be_missing(serve: Serve) -> None:
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Service")
    [reply] = await asked((await serve()).channel, V1, request)
    assert reply.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


class _Recorder(grpc.aio.ServerInterceptor):
    """Which methods were called."""

    def __init__(self) -> None:
        self.methods: set[str] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        self.methods.add(handler_call_details.method)
        return await continuation(handler_call_details)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "version"),
    [
        ((BIN / "grpcurl", "-plaintext", "{address}", "describe"), V1ALPHA),  # which is older than v1
        ((BIN / "buf", "curl", "--protocol", "grpc", "--list-services", "http://{address}"), V1),
        ((BIN / "buf", "curl", "--protocol", "grpc", "--list-methods", "http://{address}"), V1),
    ],
    ids=["grpcurl", "buf-services", "buf-methods"],
)
async def test_tools_find_the_version_that_they_ask_for_first(command: tuple[str | Path, ...], version: str) -> None:
    recorder = _Recorder()
    server = Server(ServerConfig(metrics_port=None), "engine", interceptors=[recorder])
    engine_pb2_grpc.add_EngineServiceServicer_to_server(engine_pb2_grpc.EngineServiceServicer(), server.grpc)
    address = await server.start()
    try:
        words = [str(word).format(address=address) for word in command]
        printed = await asyncio.to_thread(
            subprocess.run, words, check=True, stdout=subprocess.PIPE, text=True, timeout=60
        )
        assert all(name in printed.stdout for name in LISTED)
        assert recorder.methods == {f"/{version}/ServerReflectionInfo"}
    finally:
        await server.stop(0)
