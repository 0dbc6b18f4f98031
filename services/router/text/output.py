"""From the tokens of a policy to the pieces of an answer: text, tokens and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.answer import Answer
from services.router.text.detokenizer import Detokenizer
from services.router.text.stops import StopMatcher
from services.router.values import Chunk, FinishReason


class TextOutput:
    """The answer of one request. Tokens count up to and including the one that completes a stop string."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops, include_stop=include_stop) if stops else None
        self.num_tokens = 0
        self.stopped = False  # a stop string has been completed; what follows it is not part of the answer

    def reason(self, finish: FinishReason | None) -> FinishReason | None:
        """Why the answer ends, when its sequence did for that reason or a stop string was completed."""
        return FinishReason.STOP if self.stopped else finish

    def feed(self, chunk: Chunk) -> Answer:
        """The chunk's tokens, or those up to a stop string, and the text that has become certain with them (it may lag
        behind)."""
        if self._matcher is not None:
            return self._feed(chunk, self._matcher)
        self.num_tokens += len(chunk.token_ids)
        return Answer(self._detokenizer.feed(chunk.token_ids), chunk.token_ids, chunk.logprobs)

    def finish(self) -> str:
        """Text still held back when the tokens have ended."""
        rest = self._detokenizer.finish()
        if self._matcher is None:
            return rest
        text = self._matcher.feed(rest) + self._matcher.finish()
        self.stopped = self._matcher.stopped
        return text

    def _feed(self, chunk: Chunk, matcher: StopMatcher) -> Answer:
        text, taken = "", 0
        while taken < len(chunk.token_ids) and not matcher.stopped:
            text += matcher.feed(self._detokenizer.feed(chunk.token_ids[taken : taken + 1]))
            taken += 1
        self.num_tokens += taken
        self.stopped = matcher.stopped
        return Answer(text, chunk.token_ids[:taken], chunk.logprobs[:taken])


class NoOutput:
    """The answer of a request that wants nothing but its prompt told: empty, whatever the sequence says."""

    num_tokens = 0
    stopped = False

    def reason(self, finish: FinishReason | None) -> FinishReason | None:
        """Its end is the limit of no token, not what a token happens to be."""
        return FinishReason.LENGTH if finish is FinishReason.STOP else finish

    def feed(self, chunk: Chunk) -> Answer:
        """Nothing."""
        return Answer()

    def finish(self) -> str:
        """Nothing."""
        return ""
