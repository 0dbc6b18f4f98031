"""Messages of types.v1 to the engine's own data and back. What a message cannot mean is refused here."""

from __future__ import annotations

import math
from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from microserve.types.v1 import kv_pb2, sampling_pb2

from services.engine.core.api import TokenLogprobs
from services.engine.errors import BadRequest, BadSampling
from services.engine.sampling.guide import Guide, GuideKind
from services.engine.sampling.params import MAX_LOGIT_BIASES, SamplingParams
from services.engine.sampling.prompt_logprobs import PromptLogprobs
from services.protocol.address import KvAddress, KvShard
from services.protocol.layout import Dtype, PageLayout, PageOrder
from services.protocol.ranges import RangeSet, TokenRange
from services.rpc.timing_messages import seconds_of

MAX_DURATION_S = 24 * 3600.0
_DTYPES = {kv_pb2.Dtype.Value(f"DTYPE_{dtype.value}"): dtype for dtype in Dtype}
_ORDERS = {kv_pb2.PageOrder.Value(f"PAGE_ORDER_{order.value}"): order for order in PageOrder}


def from_duration(message: Duration, field: str, *, clip: bool = False) -> float:
    """Seconds. BadRequest, naming `field`, unless it is between zero and a day; with `clip` a day stands for more."""
    seconds = seconds_of(message)
    if clip:
        seconds = min(seconds, MAX_DURATION_S)
    if not 0 <= seconds <= MAX_DURATION_S:
        raise BadRequest(f"{field} must be between 0 and {MAX_DURATION_S:.0f} seconds, not {seconds:g}.")
    return seconds


def from_range(message: kv_pb2.TokenRange) -> TokenRange:
    """A range. Raises InvalidRange unless begin <= end."""
    return TokenRange(message.begin, message.end)


def from_ranges(messages: Iterable[kv_pb2.TokenRange]) -> RangeSet:
    """The union of the ranges."""
    return RangeSet.of(from_range(message) for message in messages)


def from_layout(message: kv_pb2.PageLayout) -> PageLayout:
    """A layout. Raises BadRequest for a dtype or order that is unknown, LayoutMismatch for an impossible shape."""
    dtype, order = _DTYPES.get(message.dtype), _ORDERS.get(message.order)
    if dtype is None or order is None:
        raise BadRequest("The layout names no known dtype or page order.")
    return PageLayout(message.layer_count, message.kv_head_count, message.head_dim, message.page_size, dtype, order)


def from_address(message: kv_pb2.KvAddress) -> KvAddress:
    """An address as it stands; whether its parts make sense together is for the caller to check."""
    return KvAddress(
        reservation_id=message.reservation_id,
        endpoint=message.endpoint,
        epoch=message.epoch,
        secret=message.secret,
        window=from_range(message.window),
        shards=tuple(_from_shard(shard) for shard in message.shards),
        layout=from_layout(message.layout),
        model_digest=message.model_digest,
        prompt_digest=message.prompt_digest,
    )


def from_sampling(message: sampling_pb2.SamplingParams) -> SamplingParams:
    """Sampling values, with zero read as the contract says; their bounds are not checked here.

    Raises BadSampling for more biases than may be: to convert them takes longer than to receive them.
    """
    if len(message.logit_bias) > MAX_LOGIT_BIASES:
        raise BadSampling(f"logit_bias may name at most {MAX_LOGIT_BIASES} tokens.")
    return SamplingParams(
        temperature=_decimal(message.temperature),
        top_p=_decimal(message.top_p) or 1.0,
        top_k=message.top_k,
        min_p=_decimal(message.min_p),
        repetition_penalty=_decimal(message.repetition_penalty) or 1.0,
        presence_penalty=_decimal(message.presence_penalty),
        frequency_penalty=_decimal(message.frequency_penalty),
        logit_bias=SamplingParams.bias_pairs({t: _decimal(b) for t, b in message.logit_bias.items()}),
        seed=message.seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens or None,
        ignore_eos=message.ignore_eos,
        guide=_from_guide(message.guide) if message.HasField("guide") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def _from_guide(message: sampling_pb2.Guide) -> Guide:
    """A guide. Raises BadSampling for one that says nothing."""
    field = message.WhichOneof("kind")
    if field is None:
        raise BadSampling("guide says nothing.")
    texts = tuple(message.choice.texts) if field == "choice" else (getattr(message, field),)
    return Guide(GuideKind(field), texts)


def to_logprobs(logprobs: TokenLogprobs) -> sampling_pb2.Logprobs:
    """The log-probabilities of one generated token."""
    return sampling_pb2.Logprobs(
        chosen=_to_token_logprob(logprobs.chosen), top=[_to_token_logprob(pair) for pair in logprobs.top]
    )


def to_prompt_logprobs(prompt: PromptLogprobs) -> sampling_pb2.PromptLogprobs:
    """The log-probabilities of consecutive tokens of a prompt."""
    return sampling_pb2.PromptLogprobs(
        logprobs=prompt.logprobs.tolist(),
        top_count=prompt.num_top,
        top_token_ids=prompt.top_ids.ravel().tolist(),
        top_logprobs=prompt.top_logprobs.ravel().tolist(),
    )


def _to_token_logprob(pair: tuple[int, float]) -> sampling_pb2.TokenLogprob:
    return sampling_pb2.TokenLogprob(token_id=pair[0], logprob=pair[1])


def _decimal(value: float) -> float:
    """The shortest decimal that a float32 of the wire stands for: 0.1, not 0.10000000149."""
    return float(f"{value:.7g}") if value and math.isfinite(value) else value


def _from_shard(message: kv_pb2.KvShard) -> KvShard:
    return KvShard(
        pool_id=message.pool_id,
        layers=(message.layer_begin, message.layer_end),
        kv_heads=(message.kv_head_begin, message.kv_head_end),
        page_ids=tuple(message.page_ids),
    )
