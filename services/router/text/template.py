"""Chat templates: the model's own Jinja program that turns a conversation into a prompt.

The template comes with the model, which an operator chose. It runs in a sandbox, where products, powers and what it
prints are bounded; its time is not, nor what it puts together without printing it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.router.errors import BadTokenizer, ChatTemplateFailed

MAX_TEMPLATE_CHARACTERS = 1 << 20
# Templates add a few words to a message; whatever prints far more than it was given is broken.
MAX_PROMPT_CHARACTERS = 1 << 24
_MAX_PRODUCT = 1 << 20


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products and powers that would fill the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or max(_size(left), _size(right)) > _MAX_PRODUCT:
            raise SecurityError(f"operands of {operator} are too large")
        return super().call_binop(context, operator, left, right)


def _size(operand: Any) -> int:
    return abs(int(operand)) if isinstance(operand, (int, float)) else len(operand)


class ChatTemplate:
    """A compiled template. `special_tokens` are its variables, for instance bos_token."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """BadTokenizer if it is too long or no valid template."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise BadTokenizer(f"the chat template is longer than {MAX_TEMPLATE_CHARACTERS} characters")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BadTokenizer(f"the chat template is not valid: {error}") from None
        self._variables = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt that asks for the next turn. ChatTemplateFailed if the template refuses the conversation."""
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=[asdict(message) for message in messages], add_generation_prompt=True, **self._variables
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_PROMPT_CHARACTERS:
                    raise SecurityError("the prompt is too long")
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ChatTemplateFailed(f"the model's chat template failed: {str(error)[:200]}") from None
        return "".join(pieces)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # Jinja's own filter escapes HTML, which no model has seen in its prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: object) -> str:
    return datetime.now().strftime(str(form))
