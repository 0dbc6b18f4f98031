"""What a verb's success or failure says of its engine."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from services.protocol.errors import ServiceError
from services.router.fleet.breaker import BreakerCall
from services.router.fleet.member import Member
from services.router.fleet.recovery import Remedy, remedy
from services.router.fleet.scope import RequestScope


class Watched(BreakerCall):
    """Around every verb: an engine that fails is not chosen again for this request. What its beginning gives is to be
    called where success shows before the verb's end."""

    __slots__ = ("_member", "_scope")

    def __init__(self, member: Member, scope: RequestScope) -> None:
        super().__init__(member.breaker)
        self._member, self._scope = member, scope

    def __enter__(self) -> Callable[[], None]:
        self._scope.use(self._member)
        try:
            return super().__enter__()
        except ServiceError as error:
            self._avoid(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is not None:
            self._avoid(error)

    def _avoid(self, error: BaseException) -> None:
        if isinstance(error, ServiceError) and remedy(error) is Remedy.ELSEWHERE:
            self._scope.avoided.add(self._member.address)
