"""From the tokens of a policy to the pieces of an answer: text, tokens and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.router.text.detokenizer import Detokenizer
from services.router.text.stops import StopMatcher
from services.router.values import Chunk, FinishReason, Logprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens, and the text that has become certain with them (it may lag behind)."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()


class TextOutput:
    """The answer of one request. Tokens count up to and including the one that completes a stop string."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops, include_stop=include_stop) if stops else None
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been completed. What follows it is not part of the answer."""
        return self._matcher is not None and self._matcher.stopped

    def reason(self, finish: FinishReason | None) -> FinishReason | None:
        """Why the answer ends, when its sequence did for that reason or a stop string was completed."""
        return FinishReason.STOP if self.stopped else finish

    def feed(self, chunk: Chunk) -> Piece:
        """Takes the chunk's tokens, or those up to a stop string."""
        if self._matcher is None:
            self.num_tokens += len(chunk.token_ids)
            return Piece(self._detokenizer.feed(chunk.token_ids), chunk.token_ids, chunk.logprobs)
        text, taken = "", 0
        while taken < len(chunk.token_ids) and not self.stopped:
            text += self._matcher.feed(self._detokenizer.feed(chunk.token_ids[taken : taken + 1]))
            taken += 1
        self.num_tokens += taken
        return Piece(text, chunk.token_ids[:taken], chunk.logprobs[:taken])

    def finish(self) -> str:
        """Text still held back when the tokens have ended."""
        rest = self._detokenizer.finish()
        if self._matcher is None:
            return rest
        return self._matcher.feed(rest) + self._matcher.finish()


class NoOutput:
    """The answer of a request that wants nothing but its prompt told: empty, whatever the sequence says."""

    num_tokens = 0
    stopped = False

    def reason(self, finish: FinishReason | None) -> FinishReason | None:
        """Its end is the limit of no token, not what a token happens to be."""
        return FinishReason.LENGTH if finish is FinishReason.STOP else finish

    def feed(self, chunk: Chunk) -> Piece:
        """Nothing."""
        return Piece()

    def finish(self) -> str:
        """Nothing."""
        return ""
