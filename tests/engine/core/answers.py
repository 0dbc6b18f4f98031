"""Time, and what comes back from an engine, in the test's hands."""

from __future__ import annotations

from typing import Generic, TypeVar

from services.engine.core import api
from services.protocol.errors import ServiceError
from services.protocol.timing import Timing

T = TypeVar("T")


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Answer(Generic[T]):
    """Where one reply goes; a second one is an error."""

    def __init__(self) -> None:
        self.values: list[T | ServiceError] = []

    def __call__(self, value: T | ServiceError) -> None:
        assert not self.values, f"answered twice: {self.values[0]!r}, then {value!r}"
        self.values.append(value)

    @property
    def is_open(self) -> bool:
        return not self.values

    @property
    def value(self) -> T:
        """The answer, which must not be an error."""
        (value,) = self.values
        assert not isinstance(value, ServiceError), repr(value)
        return value

    @property
    def error(self) -> ServiceError:
        """The answer, which must be an error."""
        (value,) = self.values
        assert isinstance(value, ServiceError), repr(value)
        return value


class Stream:
    """Everything that came out of one StartGenerate."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[api.TokenLogprobs] = []
        self.prompt_logprobs: list[float] = []
        self.prompt_tops: list[list[tuple[int, float]]] = []
        self.finish_reason: str | None = None
        self.error: ServiceError | None = None
        self.timing: Timing | None = None

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def account(self) -> Timing:
        """The account of a stream that has ended."""
        assert self.timing is not None
        return self.timing

    @property
    def failure(self) -> ServiceError:
        """The error that it ended with."""
        assert self.error is not None
        return self.error

    def add(self, output: api.SequenceOutput) -> None:
        assert not self.has_ended, f"output after the end: {output}"
        self.tokens += output.token_ids
        self.logprobs += output.logprobs
        if (prompt := output.prompt_logprobs) is not None:
            assert len(self.tokens) == len(output.token_ids), "the prompt comes before the second token"
            self.prompt_logprobs += prompt.logprobs.tolist()
            rows = zip(prompt.top_ids.tolist(), prompt.top_logprobs.tolist(), strict=True)
            self.prompt_tops += [list(zip(ids, values, strict=True)) for ids, values in rows]
        self.finish_reason, self.error, self.timing = output.finish_reason, output.error, output.timing
