"""Guide ports for tests: one that compiles at once, one that waits to be told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from services.engine.core import api
from services.engine.guide.matcher import make_matcher, make_tokenizer
from services.engine.sampling.guide import Guide, GuideKind
from services.protocol.errors import ServiceError

VOCAB = 512
END = 2  # of the tiny models


def json_schema(text: str) -> Guide:
    return Guide(GuideKind.JSON_SCHEMA, (text,))


def regex(text: str) -> Guide:
    return Guide(GuideKind.REGEX, (text,))


def choice(*texts: str) -> Guide:
    return Guide(GuideKind.CHOICE, texts)


def grammar(text: str) -> Guide:
    return Guide(GuideKind.GRAMMAR, (text,))


class InstantGuides:
    """Compiles on the spot; the answer comes with the next commands, as it would from a thread."""

    def __init__(self, folder: Path, answer: Callable[[api.Command], None]) -> None:
        self._tokenizer = make_tokenizer((folder / "tokenizer.json").read_bytes(), VOCAB, (END,))
        self._answer = answer

    def compile(self, number: int, guide: Guide, produced: tuple[int, ...]) -> None:
        try:
            outcome: api.GuideReady = api.GuideReady(
                number, make_matcher(self._tokenizer, guide, VOCAB).copy_after(produced)
            )
        except ServiceError as error:
            outcome = api.GuideReady(number, error)
        self._answer(outcome)

    def cancel(self, number: int) -> None:
        pass

    def close(self) -> None:
        pass


class HeldGuides(InstantGuides):
    """Keeps what it is asked until `compile_all`; what is cancelled comes all the same, too late."""

    def __init__(self, folder: Path, answer: Callable[[api.Command], None]) -> None:
        super().__init__(folder, answer)
        self.asked: list[tuple[int, Guide, tuple[int, ...]]] = []
        self.cancelled: list[int] = []

    def compile(self, number: int, guide: Guide, produced: tuple[int, ...]) -> None:
        self.asked.append((number, guide, produced))

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def compile_all(self) -> None:
        asked, self.asked = self.asked, []
        for each in asked:
            super().compile(*each)
