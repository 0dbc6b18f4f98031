"""When a peer counts as lost, and when to show it that we are not."""

from __future__ import annotations

from collections.abc import Callable

# Across hosts nothing tells of a death but silence.
BEAT_INTERVAL_S = 1.0
SILENCE_LIMIT_S = 5.0


class Heartbeat:
    """One side's view of one connection. `now` gives seconds that never go back."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._introduced = False
        self._heard_s = self._said_s = self._looked_s = now()

    def look(self) -> None:
        """We listen. Nobody waits longer than an interval between two looks: for the rest of the time since the last
        one we stood still ourselves, perhaps with the whole machine and the peer, and that was no silence."""
        now = self._now()
        stood_still_s = max(0.0, now - self._looked_s - BEAT_INTERVAL_S)
        self._heard_s = min(now, self._heard_s + stood_still_s)
        self._looked_s = now

    def heard(self) -> None:
        """Something came, whatever it was. Of a stranger it does not count."""
        if self._introduced:
            self._heard_s = self._now()

    def introduced(self) -> None:
        """The peer has said who it is."""
        self._introduced = True
        self.heard()

    def said(self) -> None:
        """Something was sent, whatever it was."""
        self._said_s = self._now()

    @property
    def lost(self) -> bool:
        """Whether the peer was silent, or a stranger, for too long."""
        return self._now() - self._heard_s >= SILENCE_LIMIT_S

    @property
    def due(self) -> bool:
        """Whether the peer should hear from us."""
        return self._now() - self._said_s >= BEAT_INTERVAL_S

    @property
    def wait_s(self) -> float:
        """Seconds until one of the two may become true; while a beat is due but cannot be sent, until the loss."""
        now = self._now()
        until_lost = self._heard_s + SILENCE_LIMIT_S - now
        until_due = self._said_s + BEAT_INTERVAL_S - now
        return max(0.0, min(until_lost, until_due if until_due > 0 else BEAT_INTERVAL_S))
