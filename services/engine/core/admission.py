"""What a request must satisfy before the engine takes it. Each check raises one sentence.

The gRPC side holds requests to what needs no state of the core, so that a bad one costs the loop thread nothing; the
core takes nobody's word for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.engine.core.api import PrepRecv, RemoteSend, StartGenerate
from services.engine.core.config import CoreConfig
from services.engine.errors import BadRequest, BadSampling, EmptyPrompt, PromptTooLong, TokenOutOfRange
from services.engine.sampling.params import InvalidSampling
from services.protocol.address import KvAddress
from services.protocol.errors import InvalidRange, LayoutMismatch, ModelMismatch, OutsideWindow, PromptMismatch
from services.protocol.hashes import prompt_digest
from services.protocol.layout import Dtype, PageLayout


class Bounds(Protocol):
    """What a model and its pool bound; CoreConfig has it, and the gRPC side's Limits."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def context_limit(self) -> int:
        """Most tokens a sequence can have."""


def check_prompt(tokens: Sequence[int], bounds: Bounds, *, room_for: int = 0) -> None:
    """Raises EmptyPrompt, TokenOutOfRange, or PromptTooLong if `room_for` more tokens do not fit behind it."""
    if not tokens:
        raise EmptyPrompt("The prompt holds no token.")
    if len(tokens) + room_for > bounds.context_limit:
        raise PromptTooLong(
            f"A prompt of {len(tokens)} tokens and {room_for} to generate exceed the {bounds.context_limit} tokens "
            "that this engine can hold for one sequence."
        )
    check_tokens(tokens, bounds)


def check_tokens(tokens: Sequence[int], bounds: Bounds) -> None:
    """Raises TokenOutOfRange, naming it, for a token that the model does not have."""
    for token in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token < bounds.vocab_size:
            raise TokenOutOfRange(f"Token {token} is not among the {bounds.vocab_size} of the model.")


def check_prep_recv(command: PrepRecv, config: CoreConfig) -> None:
    """Raises what is wrong with a PrepRecv, PromptTooLong too if its pages could never be reserved."""
    check_prompt(command.prompt, config)
    check_position("end", command.end, len(command.prompt))
    if config.num_pages_for(command.end) > config.max_reserved_pages:
        raise PromptTooLong(
            f"{command.end} tokens cannot be reserved: of {config.num_pages} pages, those of one longest prompt stay "
            f"free of reservations, which leaves {config.max_reserved_pages}."
        )
    check_lease(command.lease_s)
    if command.max_wait_s is not None and not command.max_wait_s >= 0:
        raise BadRequest("max_wait must not be negative.")


def check_lease(lease_s: float | None) -> None:
    """Raises BadRequest for a lease that is not longer than nothing."""
    if lease_s is not None and not lease_s > 0:
        raise BadRequest("A lease must be longer than zero.")


def check_remote_send(command: RemoteSend, config: CoreConfig) -> None:
    """Raises what is wrong with a RemoteSend: mismatches between sender and receiver before anything else moves."""
    check_prompt(command.prompt, config)
    check_position("range.end", command.range.end, len(command.prompt))
    if command.attempt < 1:
        raise BadRequest("attempt counts from 1.")
    check_address(command.address, command, config)
    if not command.address.window.contains(command.range):
        raise OutsideWindow(f"{command.range} is not inside the window {command.address.window}.")


def check_address(address: KvAddress, command: RemoteSend, config: CoreConfig) -> None:
    """Raises ModelMismatch, LayoutMismatch or PromptMismatch if what would be sent is not what is expected there."""
    if address.model_digest != config.model_digest:
        raise ModelMismatch("The receiver holds other weights, another dtype of model or KV, or other rope parameters.")
    if _values(address.layout) != _values(config.layout):
        raise LayoutMismatch("The receiver's KV has other layers, heads or number formats.")
    head = command.prompt[: address.window.end]
    same_length = len(head) == address.window.end
    if not same_length or prompt_digest(head, command.cache_salt) != address.prompt_digest:
        raise PromptMismatch("The receiver was given another prompt or cache salt.")


def _values(layout: PageLayout) -> tuple[int, int, int, Dtype]:
    """What must be equal on both sides; page size and order are converted by the transfer service."""
    return layout.layer_count, layout.kv_head_count, layout.head_dim, layout.dtype


def check_start_generate(command: StartGenerate, bounds: Bounds) -> None:
    """Raises what is wrong with a StartGenerate, its reservation apart."""
    num_given = len(command.prompt)
    check_prompt(command.prompt, bounds, room_for=max(1, len(command.forced)))
    check_tokens(command.forced, bounds)
    check_position("begin", command.begin, num_given)
    check_position("prompt_token_count", command.prompt_token_count, num_given)
    check_position("prompt_logprobs_begin", command.prompt_logprobs_begin, command.prompt_token_count or num_given)
    if command.reservation is None and command.begin:
        raise InvalidRange("begin must be 0 without a reservation.")
    try:
        command.sampling.validate(bounds.vocab_size)
    except InvalidSampling as error:
        raise BadSampling(error.sentence) from None
    if command.forced and command.sampling.guide is not None:
        raise BadSampling("forced_token_ids and a guide exclude each other.")


def check_position(field: str, value: int, length: int) -> None:
    """Raises InvalidRange for a position that is not within a prompt of `length` tokens, or at its end."""
    if not 0 <= value <= length:
        raise InvalidRange(f"{field} is {value}, not within the prompt of {length} tokens.")
