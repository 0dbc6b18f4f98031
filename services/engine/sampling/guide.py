"""What a request wants its output to be: the limits are those of types.v1.Guide. Pure; guide/ compiles it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# What a hostile guide of this size costs to compile was measured: seconds of one thread, not minutes.
MAX_GUIDE_BYTES = 32 * 1024
MAX_CHOICES = 1024


class GuideKind(Enum):
    """The language that a guide is written in; the values are the fields of types.v1.Guide."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Guide:
    """The output must be in this language; `texts` is one text, or the choices."""

    kind: GuideKind
    texts: tuple[str, ...]

    def problem(self) -> str | None:
        """What is wrong with its size, as a sentence."""
        if self.kind is GuideKind.CHOICE and not 1 <= len(self.texts) <= MAX_CHOICES:
            return f"guide.choice must have 1 to {MAX_CHOICES} texts, not {len(self.texts)}."
        size = sum(len(text.encode()) for text in self.texts)
        if size > MAX_GUIDE_BYTES:
            return f"guide must have at most {MAX_GUIDE_BYTES} bytes, not {size}."
        return None
