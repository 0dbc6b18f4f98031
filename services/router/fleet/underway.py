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


class Underway:
    """Belongs to one member of the fleet, which goes on changing it; policies only read it."""

    __slots__ = ("_changed", "_prompts", "_turn_s", "answers", "asked_tokens", "prompt_tokens")

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called after each change."""
        self._changed = changed
        self.answers: set[Answer] = set()
        self.prompt_tokens = 0
        self.asked_tokens = 0  # of these, the ones that it has been asked for; the others are pledged
        self._prompts: dict[Computing, None] = {}  # in the order of asking, in which an engine takes them
        self._turn_s = 0.0  # when the last one was done

    @property
    def head(self) -> tuple[int, float]:
        """(tokens of the prompt that is being computed, seconds that it probably has been); zeros if none is."""
        head = next(iter(self._prompts), None)
        return (0, 0.0) if head is None else (head.tokens, now() - max(head.asked_s, self._turn_s))


class Answering:
    """Counts a sequence for as long as the block runs: from its reservation on, so that others see it coming while its
    KV is on the way."""

    __slots__ = ("_answer", "_underway")

    def __init__(self, underway: Underway, answer: Answer) -> None:
        self._underway, self._answer = underway, answer

    def __enter__(self) -> None:
        self._underway.answers.add(self._answer)
        self._underway._changed()

    def __exit__(self, *_: object) -> None:
        self._underway.answers.discard(self._answer)
        self._underway._changed()


class Computing:
    """Counts tokens of a prompt that are to be computed for a send or a sequence, until the block ends or what its
    beginning gives is called."""

    __slots__ = ("_underway", "asked_s", "tokens")

    def __init__(self, underway: Underway, tokens: int) -> None:
        self._underway, self.tokens = underway, tokens

    def __enter__(self) -> Callable[[], None]:
        underway = self._underway
        self.asked_s = now()
        underway._prompts[self] = None
        underway.asked_tokens += self.tokens
        underway.prompt_tokens += self.tokens
        underway._changed()
        return self._end

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        """Computed, or given up. Only the first call counts."""
        underway = self._underway
        if self in underway._prompts:
            if next(iter(underway._prompts)) is self:
                underway._turn_s = now()
            del underway._prompts[self]
            underway.asked_tokens -= self.tokens
            underway.prompt_tokens -= self.tokens
            underway._changed()


class Pledge:
    """Counts tokens of a prompt that an engine is about to be asked for, from now until it is over: who chooses next
    is to see them, but the engine does not compute them yet."""

    __slots__ = ("_tokens", "_underway")

    def __init__(self, underway: Underway, tokens: int) -> None:
        self._underway, self._tokens = underway, tokens
        self._count(tokens)

    def over(self) -> None:
        """To be called once."""
        self._count(-self._tokens)

    def _count(self, tokens: int) -> None:
        self._underway.prompt_tokens += tokens
        self._underway._changed()
