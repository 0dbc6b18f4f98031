"""Compiles guides on threads of its own, so that no grammar holds up the loop thread."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from services.engine.core.api import GuideReady
from services.engine.core.guides import GuideState
from services.engine.errors import GuidesUnavailable, QueueFull
from services.engine.sampling.guide import Guide
from services.protocol.errors import ServiceError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from services.engine.guide.matcher import GuideMatcher

_log = logging.getLogger(__name__)

NUM_THREADS = 2
MAX_PENDING = 32
MAX_KEPT = 64  # compiled guides, so that many requests with one schema compile it once
RETRY_S = 1.0


class GuideCompiler:
    """See GuidePort. `answer` takes GuideReady on any thread. The vocabulary is read at the first guide."""

    def __init__(
        self,
        tokenizer_json: bytes,
        vocab_size: int,
        eos_token_ids: Collection[int],
        answer: Callable[[GuideReady], None],
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._answer = answer
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="guides")
        self._lock = threading.Lock()
        self._pending: dict[int, Future[None]] = {}  # by the sequence's number
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[Guide, GuideMatcher] = OrderedDict()  # as used last

    def compile(self, number: int, guide: Guide, produced: tuple[int, ...]) -> None:
        """See GuidePort."""
        with self._lock:
            if len(self._pending) >= MAX_PENDING:
                raise QueueFull(f"{MAX_PENDING} guides wait to be compiled already.", retry_delay_s=RETRY_S)
            self._pending[number] = self._threads.submit(self._run, number, guide, produced)

    def cancel(self, number: int) -> None:
        """See GuidePort."""
        with self._lock:
            if (waiting := self._pending.get(number)) is not None and waiting.cancel():
                del self._pending[number]

    def close(self) -> None:
        """See GuidePort. What is under way ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, number: int, guide: Guide, produced: tuple[int, ...]) -> None:
        outcome: GuideState | ServiceError
        try:
            outcome = self._compiled(guide).copy_after(produced)
        except ServiceError as error:
            outcome = error
        except BaseException as error:  # a panic of the native library is no Exception
            _log.exception("a guide could not be compiled")
            outcome = GuidesUnavailable(f"This engine cannot follow guides: {type(error).__name__}.")
        with self._lock:
            del self._pending[number]
        self._answer(GuideReady(number, outcome))

    def _compiled(self, guide: Guide) -> GuideMatcher:
        from services.engine.guide.matcher import make_matcher

        with self._lock:
            if (known := self._kept.get(guide)) is not None:
                self._kept.move_to_end(guide)
                return known
        made = make_matcher(self._tokenizer(), guide, self._vocab_size)
        with self._lock:
            self._kept[guide] = made
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return made

    def _tokenizer(self) -> LLTokenizer:
        from services.engine.guide.matcher import make_tokenizer

        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = make_tokenizer(self._tokenizer_json, self._vocab_size, self._eos_token_ids)
            return self._vocabulary
