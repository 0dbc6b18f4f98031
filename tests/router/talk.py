"""The client's end of RouterService.Session."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from microserve.router.v1 import router_pb2, router_pb2_grpc

from services.rpc.status import remote_errors
from tests.router.harness import request


class Talk:
    """One session. Calls that never end are cancelled with the channel."""

    def __init__(
        self,
        stub: router_pb2_grpc.RouterServiceAsyncStub,
        metadata: Sequence[tuple[str, str]] = (),
        timeout_s: float | None = None,
    ) -> None:
        self.call = stub.Session(metadata=metadata, timeout=timeout_s)
        self._come: deque[router_pb2.SessionOutput] = deque()

    async def ask(self, call_id: int, message: router_pb2.GenerateRequest | None = None, **terms: Any) -> None:
        call = router_pb2.GenerateCall(call_id=call_id, request=message or request(), **terms)
        await self.call.write(router_pb2.SessionRequest(generate=call))

    async def cancel(self, call_id: int) -> None:
        await self.call.write(router_pb2.SessionRequest(cancel=router_pb2.CancelCall(call_id=call_id)))

    async def next(self) -> router_pb2.SessionOutput:
        """RemoteError how the stream ended, EOFError if it ended well."""
        while not self._come:
            with remote_errors():
                frame = await self.call.read()
            if frame is grpc.aio.EOF:
                raise EOFError
            self._come.extend(frame.outputs)
        return self._come.popleft()

    async def answers(self, *call_ids: int) -> list[list[router_pb2.SessionOutput]]:
        """All outputs of these requests, to the last of each; others must not come."""
        found: dict[int, list[router_pb2.SessionOutput]] = {call_id: [] for call_id in call_ids}
        while not all(outputs and outputs[-1].last for outputs in found.values()):
            output = await self.next()
            assert not any(before.last for before in found[output.call_id])
            found[output.call_id].append(output)
        return list(found.values())

    async def answer(self, call_id: int) -> list[router_pb2.SessionOutput]:
        (outputs,) = await self.answers(call_id)
        return outputs

    async def error(self, call_id: int) -> tuple[str, str]:
        """Code and reason of a request that fails without a token."""
        (output,) = await self.answer(call_id)
        assert len(output.error.message) > 10
        return _name_of(output.error.code), output.error.reason


def _name_of(code: int) -> str:
    return next(each.name for each in grpc.StatusCode if each.value[0] == code)


def tokens(outputs: Sequence[router_pb2.SessionOutput], choice: int = 0) -> list[int]:
    return [t for each in outputs if each.response.choice == choice for t in each.response.token_ids]
