"""Values to and from protobuf, shared by the servicers and the engine client.

Repeated numbers and strings are read as slices: iterating over the field itself takes two to four times as long.
"""

from __future__ import annotations

from array import array

from microserve.engine.v1 import engine_pb2
from microserve.types.v1 import sampling_pb2

from services.router.prompt_logprobs import PromptLogprobs
from services.router.values import Chunk, FinishReason, Guide, Leg, Logprobs, Sampling, TokenLogprob, Verb
from services.rpc.timing_messages import set_duration, set_timing, timing_of

_FINISH_FROM_WIRE = {
    sampling_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    sampling_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    sampling_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_FINISH_TO_WIRE = {reason: number for number, reason in _FINISH_FROM_WIRE.items()}
_VERB_TO_WIRE = {
    Verb.PREP_RECV: sampling_pb2.VERB_PREP_RECV,
    Verb.REMOTE_SEND: sampling_pb2.VERB_REMOTE_SEND,
    Verb.START_GENERATE: sampling_pb2.VERB_START_GENERATE,
}


def sampling_from_wire(message: sampling_pb2.SamplingParams, seed: int) -> Sampling:
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(message.logit_bias.items()) if message.logit_bias else (),
        seed=seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        stop_token_ids=tuple(message.stop_token_ids[:]),
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens,
        ignore_eos=message.ignore_eos,
        guide=_guide_from_wire(message.guide) if message.HasField("guide") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def _guide_from_wire(message: sampling_pb2.Guide) -> Guide | None:
    match message.WhichOneof("kind"):
        case None:
            return None
        case "choice":
            return Guide("choice", tuple(message.choice.texts))
        case kind:
            return Guide(kind, (getattr(message, kind),))


def _guide_to_wire(guide: Guide) -> sampling_pb2.Guide:
    match guide:
        case Guide("choice", texts):
            return sampling_pb2.Guide(choice=sampling_pb2.Choice(texts=texts))
        case Guide(kind, (text,)):
            message = sampling_pb2.Guide()
            setattr(message, kind, text)
            return message
    raise ValueError("a guide has one text")


def write_sampling(sampling: Sampling, message: sampling_pb2.SamplingParams) -> None:
    """Into an empty message, where it is: one that is given to another as a field is copied."""
    message.temperature = sampling.temperature
    message.top_p = sampling.top_p
    message.top_k = sampling.top_k
    message.min_p = sampling.min_p
    message.repetition_penalty = sampling.repetition_penalty
    message.presence_penalty = sampling.presence_penalty
    message.frequency_penalty = sampling.frequency_penalty
    if sampling.logit_bias:
        message.logit_bias.update(dict(sampling.logit_bias))
    message.seed = sampling.seed
    if sampling.logprobs is not None:
        message.logprobs = sampling.logprobs
    if sampling.stop_token_ids:
        message.stop_token_ids.extend(sampling.stop_token_ids)
    message.min_tokens = sampling.min_tokens
    message.max_tokens = sampling.max_tokens
    message.ignore_eos = sampling.ignore_eos
    if sampling.guide is not None:
        message.guide.CopyFrom(_guide_to_wire(sampling.guide))
    if sampling.prompt_logprobs is not None:
        message.prompt_logprobs = sampling.prompt_logprobs


def chunk_from_wire(message: engine_pb2.StartGenerateResponse) -> Chunk:
    return Chunk(
        token_ids=tuple(message.token_ids[:]),
        logprobs=tuple(map(_logprobs_from_wire, message.logprobs)) if message.logprobs else (),
        finish=_FINISH_FROM_WIRE.get(message.finish_reason) if message.finish_reason else None,
        timing=timing_of(message.timing) if message.HasField("timing") else None,
        prompt_logprobs=_prompt_from_wire(message.prompt_logprobs) if message.HasField("prompt_logprobs") else None,
    )


def _prompt_from_wire(message: sampling_pb2.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(
        array("f", message.logprobs),
        message.top_count,
        array("I", message.top_token_ids),
        array("f", message.top_logprobs),
    )


def prompt_to_wire(prompt: PromptLogprobs) -> sampling_pb2.PromptLogprobs:
    return sampling_pb2.PromptLogprobs(
        logprobs=prompt.logprobs,
        top_count=prompt.top_count,
        top_token_ids=prompt.top_ids,
        top_logprobs=prompt.top_logprobs,
    )


def _logprobs_from_wire(message: sampling_pb2.Logprobs) -> Logprobs:
    return Logprobs(
        TokenLogprob(message.chosen.token_id, message.chosen.logprob),
        tuple(TokenLogprob(each.token_id, each.logprob) for each in message.top),
    )


def logprobs_to_wire(logprobs: Logprobs) -> sampling_pb2.Logprobs:
    chosen, *top = (
        sampling_pb2.TokenLogprob(token_id=each.token_id, logprob=each.logprob)
        for each in (logprobs.chosen, *logprobs.top)
    )
    return sampling_pb2.Logprobs(chosen=chosen, top=top)


def finish_to_wire(finish: FinishReason) -> sampling_pb2.FinishReason.ValueType:
    return _FINISH_TO_WIRE[finish]


def leg_to_wire(leg: Leg) -> sampling_pb2.Leg:
    message = sampling_pb2.Leg(verb=_VERB_TO_WIRE[leg.verb], engine=leg.engine)
    # In place: a message that is passed to the making of another is copied, which takes longer than all the rest.
    message.range.begin, message.range.end = leg.range.begin, leg.range.end
    if leg.timing is not None:
        set_timing(message.timing, leg.timing)
    set_duration(message.elapsed, leg.elapsed_s)
    if leg.first_token_s is not None:
        set_duration(message.first_token, leg.first_token_s)
    return message
