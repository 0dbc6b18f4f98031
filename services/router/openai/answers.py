"""All choices of one call, as far as they have come."""

from __future__ import annotations

from services.router.answer import Answer
from services.router.errors import EngineLost
from services.router.openai.calls import Call
from services.router.openai.shapes import Choice
from services.router.openai.told import Told
from services.router.service import GenerationService
from services.router.values import FinishReason


class Answers:
    """What the pieces add up to but for texts and logprobs, which are whose who shows them."""

    def __init__(self, call: Call, service: GenerationService) -> None:
        self._call = call
        self._service = service
        self.choices = [Choice() for _ in range(len(call.asks) * call.n)]
        self._begun: set[int] = set()
        self._told: dict[int, Told] = {}  # by ask, which tell of their prompt with choice 0

    def has_begun(self, index: int) -> bool:
        """Whether a piece of the choice has come."""
        return index in self._begun

    def take(self, index: int, answer: Answer) -> str:
        """Notes how far the choice is; returns its new text, a wished-for echo included."""
        if answer.finish is FinishReason.CANCELLED:
            raise EngineLost("an engine cancelled the request before it ended")
        choice = self.choices[index]
        choice.finish, choice.usage = answer.finish, answer.usage
        return answer.text if index in self._begun else self._begin(index, answer)

    def _begin(self, index: int, answer: Answer) -> str:
        self._begun.add(index)
        ask, is_other = divmod(index, self._call.n)
        if self._call.asks[ask].sampling.prompt_logprobs is not None:
            if not is_other:
                self._told[ask] = Told(answer.prompt_ids, answer.prompt_logprobs)
            self.choices[index].told = self._told[ask]
        if self._call.echo:
            return self._service.echo(self._call.asks[ask], answer.prompt_ids) + answer.text
        return answer.text
