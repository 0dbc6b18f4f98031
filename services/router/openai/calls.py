"""From the bodies of /v1/completions and /v1/chat/completions to Asks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from services.router.asking import MAX_CHOICES, MAX_LOGPROBS, MAX_MESSAGES, Ask, Chat, Prompt, Text, Tokens, new_seed
from services.router.openai.errors import bad_value, unsupported
from services.router.openai.fields import Fields, object_of, text_of, tokens_of
from services.router.text.template import ChatMessage
from services.router.values import Guide, Sampling

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chats go on as long as there is room
# Zero is "off" in our contract, while OpenAI's top_p of 0 keeps the best token alone.
_LEAST_TOP_P = 1e-6
_WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
_ROLES = {"developer": "system"}  # OpenAI's newer name; no open model's template knows it


@dataclass(frozen=True, slots=True)
class Call:
    """One body, understood. Choice i*n + j is the j-th answer to ask i."""

    asks: tuple[Ask, ...]
    n: int
    stream: bool
    include_usage: bool
    echo: bool = False
    prompt_logprobs: int | None = None  # alternatives to show with each token of the prompt, apart from an echo


@dataclass(frozen=True, slots=True)
class Headers:
    """What a call says beside its body: the policy wanted, the caller's name for the request, its priority, its tenant,
    and the tenant whose key it shows; empty: none."""

    policy: str = ""
    request_id: str = ""
    priority: str = ""
    tenant: str = ""
    owner: str = ""


def completion(fields: Fields, headers: Headers) -> Call:
    """A body of /v1/completions. Refusal."""
    prompts = _prompts(fields.take("prompt"))
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    echo = fields.flag("echo")
    n = _choices(fields, len(prompts))
    fields.only("suffix", "")
    fields.only("best_of", n)
    return _call(fields, headers, prompts, n, logprobs, default_max_tokens=COMPLETION_TOKENS, echo=echo)


def chat(fields: Fields, headers: Headers) -> Call:
    """A body of /v1/chat/completions. Refusal."""
    prompt = Chat(_messages(fields.take("messages")))
    wanted, best = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if best is not None and not wanted:
        raise bad_value("top_logprobs", "needs logprobs to be true")
    for name, *neutral in (
        ("tools", []),
        ("functions", []),
        ("tool_choice", "none", "auto"),
        ("function_call", "none", "auto"),
        ("parallel_tool_calls", True, False),
        ("modalities", ["text"]),
        ("audio",),
        ("prediction",),
        ("web_search_options",),
    ):
        fields.only(name, *neutral)
    return _call(fields, headers, (prompt,), _choices(fields, 1), (best or 0) if wanted else None)


def _call(
    fields: Fields,
    headers: Headers,
    prompts: tuple[Prompt, ...],
    n: int,
    logprobs: int | None,
    *,
    default_max_tokens: int | None = None,
    echo: bool = False,
) -> Call:
    """What both kinds have in common; refuses what is left over."""
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    stream, prompt_logprobs = fields.flag("stream"), fields.integer("prompt_logprobs", 0, MAX_LOGPROBS)
    if stream and prompt_logprobs is not None:
        raise bad_value("prompt_logprobs", "needs stream to be false")
    rated = [each for each in (logprobs if echo else None, prompt_logprobs) if each is not None]
    max_tokens = _max_tokens(fields, default_max_tokens, least=0 if echo or rated else 1)
    sampling = _sampling(
        fields, logprobs, max(rated, default=None), new_seed() if seed is None else seed % 2**64, max_tokens or 0
    )
    options = fields.nested("stream_options")
    include_usage = False
    if options is not None:
        if not stream:
            raise bad_value("stream_options", "needs stream to be true")
        include_usage = options.flag("include_usage")
        options.only("include_obfuscation", False)
        options.end()
    stop, model = fields.texts("stop"), fields.text("model") or ""
    include_stop, salt = fields.flag("include_stop_str_in_output"), fields.text("cache_salt") or ""
    fields.ignore(_WITHOUT_EFFECT)
    fields.end()
    asks = tuple(
        Ask(
            prompt,
            sampling,
            stop,
            include_stop,
            model,
            salt,
            headers.request_id,
            headers.policy,
            priority=headers.priority,
            tenant=headers.tenant,
            owner=headers.owner,
            choice=number * n,
            prompt_only=max_tokens == 0,
        )
        for number, prompt in enumerate(prompts)
    )
    return Call(asks, n, stream, include_usage, echo, prompt_logprobs)


def _max_tokens(fields: Fields, default: int | None, least: int) -> int | None:
    """Under either of its names. None: as many as there is room for; 0, no token at all, where the prompt is told."""
    old, new = fields.integer("max_tokens", least), fields.integer("max_completion_tokens", least)
    return next((each for each in (new, old, default) if each is not None), None)


def _sampling(
    fields: Fields, logprobs: int | None, prompt_logprobs: int | None, seed: int, max_tokens: int
) -> Sampling:
    """OpenAI's sampling parameters, and those of ours that it lacks."""
    temperature, top_p = fields.number("temperature", 0, 2), fields.number("top_p", 0, 1)
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else max(top_p, _LEAST_TOP_P),
        top_k=max(0, fields.integer("top_k", -1) or 0),
        min_p=fields.number("min_p", 0, 1) or 0.0,
        repetition_penalty=fields.number("repetition_penalty", 0, 100) or 0.0,
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        logit_bias=fields.biases("logit_bias"),
        seed=seed,
        logprobs=logprobs,
        stop_token_ids=fields.tokens("stop_token_ids"),
        min_tokens=fields.integer("min_tokens", 0) or 0,
        max_tokens=max_tokens,
        ignore_eos=fields.flag("ignore_eos"),
        guide=_guide(fields),
        prompt_logprobs=prompt_logprobs,
    )


def _choices(fields: Fields, num_prompts: int) -> int:
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    if n * num_prompts > MAX_CHOICES:
        raise bad_value("n", f"prompts times n may be {MAX_CHOICES} at most")
    return n


def _prompts(value: object) -> tuple[Prompt, ...]:
    """A text, token ids, or an array of either."""
    if value is None:
        raise bad_value("prompt", "is missing")
    if isinstance(value, str):
        return (Text(text_of(value, "prompt")),)
    if not isinstance(value, list) or not value:
        raise bad_value("prompt", "must be a string, token ids, or an array of either that is not empty")
    if isinstance(value[0], int):
        return (Tokens(tokens_of(value, "prompt")),)
    if len(value) > MAX_CHOICES:
        raise bad_value("prompt", f"has {len(value)} prompts, more than {MAX_CHOICES}")
    return tuple(
        Text(text_of(each, "prompt")) if isinstance(each, str) else Tokens(tokens_of(each, "prompt")) for each in value
    )


def _messages(value: object) -> tuple[ChatMessage, ...]:
    if value is None:
        raise bad_value("messages", "is missing")
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        raise bad_value("messages", f"must be an array of {MAX_MESSAGES} messages at most")
    return tuple(_message(each, f"messages[{number}]") for number, each in enumerate(value))


def _message(value: object, path: str) -> ChatMessage:
    fields = object_of(value, path)
    role = fields.text("role") or ""
    content = _content(fields.take("content"), f"{path}.content", may_miss=role == "assistant")
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        fields.only(name, [])
    fields.ignore(("name", "refusal", "annotations"))
    fields.end()
    return ChatMessage(_ROLES.get(role, role), content)


def _content(value: object, path: str, *, may_miss: bool) -> str:
    """A string, or the texts of an array of parts put together."""
    if value is None and may_miss:
        return ""
    if value is None:
        raise bad_value(path, "is missing")
    if not isinstance(value, list):
        return text_of(value, path)
    texts = []
    for number, each in enumerate(value):
        part = object_of(each, f"{path}[{number}]")
        kind: Any = part.take("type")
        if kind != "text":
            raise unsupported(f"{path}[{number}]", "is not text, which is all that is supported")
        texts.append(part.text("text") or "")
        part.end()
    return "".join(texts)


def _guide(fields: Fields) -> Guide | None:
    """What response_format holds the output to; None: nothing."""
    wanted = fields.nested("response_format")
    if wanted is None:
        return None
    match wanted.take("type"):
        case "text":
            schema = None
        case "json_object":
            schema = '{"type": "object"}'
        case "json_schema":
            schema = _schema(wanted)
        case _:
            raise bad_value("response_format.type", "must be text, json_object or json_schema")
    wanted.end()
    return None if schema is None else Guide("json_schema", (schema,))


def _schema(response_format: Fields) -> str:
    """A response_format's JSON Schema as text. What engines cannot hold of it they refuse, so `strict` adds nothing."""
    named = response_format.nested("json_schema")
    if named is None:
        raise bad_value("response_format.json_schema", "is missing")
    named.ignore(("name", "description", "strict"))
    schema = named.take("schema")
    if not isinstance(schema, dict):
        raise bad_value("response_format.json_schema.schema", "must be an object")
    named.end()
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise bad_value("response_format.json_schema.schema", "has a number that is too large") from None
    except RecursionError:  # what could just be read may be too deep to be written
        raise bad_value("response_format.json_schema.schema", "is nested too deeply") from None
    return text_of(text, "response_format.json_schema.schema")
