"""Server reflection in both of its versions: v1, which tools ask for first, and v1alpha, which older ones know.

grpcio-reflection has v1alpha alone. The two differ in nothing but their names.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

_OLD, _NEW = "v1alpha", "v1"
NAMES = (reflection.SERVICE_NAME, reflection.SERVICE_NAME.replace(_OLD, _NEW))


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Describes `services`, which stand in the default descriptor pool, and itself."""
    _describe_new()
    names = (*services, *NAMES)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(NAMES[-1], {"ServerReflectionInfo": handler}),)
    )


def _describe_new() -> None:
    """Puts v1 beside v1alpha into the pool: tools ask what every service is that is listed."""
    pool, old = descriptor_pool.Default(), descriptor_pb2.FileDescriptorProto()
    try:
        pool.FindFileContainingSymbol(NAMES[-1])
    except KeyError:
        reflection_pb2.DESCRIPTOR.CopyToProto(old)
        text = text_format.MessageToString(old).replace(_OLD, _NEW)
        pool.AddSerializedFile(text_format.Parse(text, descriptor_pb2.FileDescriptorProto()).SerializeToString())
