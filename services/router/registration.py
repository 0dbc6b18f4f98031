"""RegistrationService on the wire."""

from __future__ import annotations

import hmac
from typing import Any

import grpc.aio
from microserve.router.v1 import registration_pb2, registration_pb2_grpc

from services.router.errors import NotAuthenticated, RegistrationDisabled
from services.router.fleet.membership import checked_address
from services.router.fleet.registration import Registrations
from services.rpc.timing_messages import duration_message

Context = grpc.aio.ServicerContext[Any, Any]
_SCHEME = "Bearer "


class RegistrationServicer(registration_pb2_grpc.RegistrationServiceServicer):
    """Who may register shows a token, or a certificate where these are trusted; without either it is off."""

    def __init__(self, registrations: Registrations, token: str | None, *, trust_certificates: bool) -> None:
        self._registrations = registrations
        self._token = token
        self._trust_certificates = trust_certificates

    async def Register(
        self, request: registration_pb2.RegisterRequest, context: Context
    ) -> registration_pb2.RegisterResponse:
        self._check(context)
        self._registrations.register(checked_address(request.address))
        return registration_pb2.RegisterResponse(lease=duration_message(self._registrations.lease_s))

    async def Deregister(
        self, request: registration_pb2.DeregisterRequest, context: Context
    ) -> registration_pb2.DeregisterResponse:
        self._check(context)
        self._registrations.deregister(request.address)
        return registration_pb2.DeregisterResponse()

    def _check(self, context: Context) -> None:
        """RegistrationDisabled, NotAuthenticated."""
        if self._token is None and not self._trust_certificates:
            raise RegistrationDisabled("this router takes no registrations: see --register-token")
        if self._trust_certificates and context.peer_identities():
            return
        shown = dict(context.invocation_metadata() or ()).get("authorization", "")
        expected = _SCHEME + self._token if self._token is not None else ""
        if not expected or not hmac.compare_digest(str(shown).encode(), expected.encode()):
            raise NotAuthenticated("show the router's token or a certificate that it trusts")
