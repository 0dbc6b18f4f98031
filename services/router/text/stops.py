"""Stop strings: text is held back while it may still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts a text that arrives in pieces before (or after) the first stop string.

    The first is the one that is complete first, however the text is cut into pieces; of several complete at the same
    character, the longest.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self._longest = max(map(len, stops), default=0)
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Text that is certain to be shown. Nothing more comes once `stopped` is true."""
        if self.stopped or not piece:
            return ""
        text = self._held + piece
        found = [(begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if found:
            end, begin = min(found)
            self.stopped, self._held = True, ""
            return text[: end if self._include_stop else begin]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Where the longest tail begins that a stop string might begin with; the text's end if there is none."""
        for begin in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[begin:]
            if any(stop.startswith(tail) for stop in self._stops):
                return begin
        return len(text)
