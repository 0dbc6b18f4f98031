"""How a layer weighs its context: scale, sliding window, soft cap."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """softmax(cap(scale * q k^T)) v over the context, or over its end; the default is what most models compute."""

    scale: float | None = None  # None: 1 / sqrt(head_dim)
    window: int | None = None  # a row sees this many tokens at most, itself included; None: all before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap); None: they stay as they are

    def scale_for(self, head_dim: int) -> float:
        """What a product of query and key is multiplied by."""
        return head_dim**-0.5 if self.scale is None else self.scale

    @property
    def window_left(self) -> int:
        """How many tokens before its own a row sees, -1 for all: as FlashAttention and its kin count."""
        return -1 if self.window is None else self.window - 1

    def first_visible(self, limit: int) -> int:
        """The first token that a row sees whose last one is limit - 1."""
        return 0 if self.window is None else max(0, limit - self.window)


PLAIN = AttentionForm()
