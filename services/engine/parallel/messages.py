"""What rank 0 tells the others. Pickled over a socket pair that only these processes of one user ever held."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.config import EngineConfig
from services.engine.core.plan import PageCopy, Segment


@dataclass(frozen=True, slots=True)
class RankTask:
    """What a rank is started with: the engine's own options, its place, and the descriptor where the ranks meet."""

    config: EngineConfig
    rank: int
    meeting_place: int


@dataclass(frozen=True, slots=True)
class PoolShape:
    """The pool of the whole model, (layers, pages, 2, kv_heads, page_size, head_dim). `shared`: its memory follows as a
    file descriptor; otherwise each rank has memory of its own for its heads."""

    shape: tuple[int, ...]
    shared: bool


@dataclass(frozen=True, slots=True)
class Compute:
    """One step: copies first, then the segments as one batch."""

    copies: tuple[PageCopy, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class CopyPages:
    """Copies whole pages. Answered by Done, when all that was told before is done, too."""

    copies: tuple[PageCopy, ...]


@dataclass(frozen=True, slots=True)
class Poison:
    """Fills pages with NaN. Answered by Done."""

    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """A rank's answer: loaded, attached, copied or poisoned."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank cannot start; `why` is a sentence for people."""

    why: str
