"""A model without weights: the next token is a hash of some tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from microserve.types.v1 import sampling_pb2


@dataclass(frozen=True)
class FakeModel:
    """Weights in a manner of speaking. With a script the output is that, and its end the model's end token."""

    tokenizer_files: dict[str, bytes]
    name: str = "fake"
    version: str = "1"
    vocab_size: int = 341
    first_token: int = 3  # lower ones are special
    max_context: int = 4096
    script: tuple[int, ...] = ()

    @property
    def digest(self) -> bytes:
        return blake2b(f"{self.name} {self.version}".encode(), digest_size=16).digest()

    @property
    def tokenizer_digest(self) -> bytes:
        return blake2b(repr(sorted(self.tokenizer_files.items())).encode(), digest_size=16).digest()

    def next_token(self, tokens: Sequence[int], num_prompt: int, sampling: sampling_pb2.SamplingParams) -> int | None:
        """The token after `tokens`; None at the end of the script."""
        if self.script:
            position = len(tokens) - num_prompt
            return self.script[position] if position < len(self.script) else None
        seed = sampling.seed if sampling.temperature else 0
        context = (tokens[:4], tokens[-4:], len(tokens), seed)
        digest = blake2b(repr(context).encode(), digest_size=4).digest()
        return self.first_token + int.from_bytes(digest, "little") % (self.vocab_size - self.first_token)

    def rate(self, tokens: Sequence[int], position: int) -> float:
        """The log-probability of the token there after those before it; float32 holds it."""
        digest = blake2b(repr(tuple(tokens[: position + 1])).encode(), digest_size=2).digest()
        return -int.from_bytes(digest, "little") / 256

    def rate_prompt(self, prompt: Sequence[int]) -> list[float]:
        """Of all tokens but the first."""
        return [self.rate(prompt, position) for position in range(1, len(prompt))]

    def generate(self, prompt: Sequence[int], num_tokens: int, seed: int | None = None) -> list[int]:
        """What any policy must give."""
        sampling = sampling_pb2.SamplingParams(seed=seed or 0, temperature=0 if seed is None else 1)
        tokens = list(prompt)
        while len(tokens) < len(prompt) + num_tokens:
            token = self.next_token(tokens, len(prompt), sampling)
            if token is None:
                break
            tokens.append(token)
        return tokens[len(prompt) :]
