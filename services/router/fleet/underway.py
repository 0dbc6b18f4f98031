"""What this router has asked of an engine and not got yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.router.clock import now


@dataclass(slots=True, eq=False)
class Answer:
    """A sequence, from its reservation on."""

    expected: float  # tokens that it will probably generate
    generated: int = 0

    @property
    def left(self) -> float:
        """Tokens that it will probably still generate, at least one. Of one that has outlived what was expected nobody
        knows: as many again."""
        left = self.expected - self.generated
        return max(1.0, left if left > 0 else self.generated)


@dataclass(slots=True, eq=False)
class Prompt:
    """Tokens that are to be computed for a send or a sequence, and when that was asked for."""

    tokens: int
    asked_s: float


class Underway:
    """Belongs to one member of the fleet, which goes on changing it; policies only read it."""

    __slots__ = ("_changed", "_prompts", "_turn_s", "answers", "prompt_tokens")

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called after each change."""
        self._changed = changed
        self.answers: set[Answer] = set()
        self.prompt_tokens = 0
        self._prompts: dict[Prompt, None] = {}  # in the order of asking, in which an engine takes them
        self._turn_s = 0.0  # when the last one was done

    def begin_answer(self, answer: Answer) -> None:
        """The engine is asked for it, or will be."""
        self.answers.add(answer)
        self._changed()

    def end_answer(self, answer: Answer) -> None:
        """It has ended, or was given up."""
        self.answers.discard(answer)
        self._changed()

    def begin_prompt(self, tokens: int) -> Prompt:
        """The engine is asked to compute it."""
        prompt = Prompt(tokens, now())
        self._prompts[prompt] = None
        self.prompt_tokens += tokens
        self._changed()
        return prompt

    def end_prompt(self, prompt: Prompt) -> bool:
        """It has been computed, or given up. False if it had been before."""
        if prompt not in self._prompts:
            return False
        del self._prompts[prompt]
        self.prompt_tokens -= prompt.tokens
        self._turn_s = now()
        self._changed()
        return True

    @property
    def head(self) -> tuple[int, float]:
        """(tokens of the prompt that is being computed, seconds that it probably has been); zeros if none is."""
        head = next(iter(self._prompts), None)
        return (0, 0.0) if head is None else (head.tokens, now() - max(head.asked_s, self._turn_s))


class Answering:
    """Counts a sequence for as long as the block runs."""

    __slots__ = ("_answer", "_underway")

    def __init__(self, underway: Underway, answer: Answer) -> None:
        self._underway, self._answer = underway, answer

    def __enter__(self) -> None:
        self._underway.begin_answer(self._answer)

    def __exit__(self, *_: object) -> None:
        self._underway.end_answer(self._answer)


class Computing:
    """Counts tokens of a prompt until the block ends or what its beginning gives is called."""

    __slots__ = ("_prompt", "_tokens", "_underway")

    def __init__(self, underway: Underway, tokens: int) -> None:
        self._underway, self._tokens = underway, tokens

    def __enter__(self) -> Callable[[], None]:
        self._prompt = self._underway.begin_prompt(self._tokens)
        return self._end

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self._underway.end_prompt(self._prompt)
