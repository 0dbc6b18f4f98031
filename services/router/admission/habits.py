"""How long answers are beside what was to be expected of them."""

from __future__ import annotations

from dataclasses import dataclass

_GAIN = 1 / 8  # of the newest answer in the running means
_FIRST_GUESS = 256.0  # tokens of an answer, until some have been seen
_MOST_TENANTS = 1024


@dataclass(slots=True)
class _Means:
    expected: float = _FIRST_GUESS
    had: float = _FIRST_GUESS

    def add(self, expected: float, had: float) -> None:
        self.expected += _GAIN * (expected - self.expected)
        self.had += _GAIN * (had - self.had)


class Habits:
    """Tokens that answers of a tenant have, over those that were expected; of a new one as of all."""

    def __init__(self) -> None:
        self._all = _Means()
        self._tenants: dict[str, _Means] = {}  # that had an answer last is last

    def __len__(self) -> int:
        return len(self._tenants)

    def ratio(self, tenant: str) -> float:
        """For a tenant's next answer."""
        means = self._tenants.get(tenant, self._all)
        return means.had / means.expected

    def add(self, tenant: str, expected: float, had: float) -> None:
        """An answer of the tenant, however it ended, had so many tokens; `expected`, without this, were above 0."""
        means = self._tenants.pop(tenant, None) or _Means(self._all.expected, self._all.had)
        for each in (means, self._all):
            each.add(expected, had)
        self._tenants[tenant] = means
        if len(self._tenants) > _MOST_TENANTS:
            del self._tenants[next(iter(self._tenants))]
