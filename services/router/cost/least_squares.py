"""Linear models that are fitted while observations come.

Least squares with a prior, forgetting, and Huber's weights against outliers (Huber, "Robust estimation of a location
parameter", 1964). What is kept are the sums of the normal equations, to which observations only add: the recursive form
subtracts, and with features as different as a constant and thousands of tokens it soon subtracts too much.
"""

from __future__ import annotations

from collections.abc import Sequence

FORGETTING = 0.98  # an observation counts half after 34 others
RELATIVE_NOISE = 0.1  # times on a busy machine repeat within about a tenth
LEAST_EXPECTED = 0.1  # share of what came: that next to nothing was expected makes an observation no surer
OUTLIER = 3.0  # typical deviations beyond which an observation counts less and less
LEAST_MISFIT = 1e-6  # share of the squares, a thousandth of each time: less is the prior's, or rounding
UNLIKE = 4.0  # times the noise that a coefficient explains: by chance in fewer than one case of a hundred
CHANGED_AFTER = 6  # outliers in a row on the same side
TRUSTED_AFTER = 4  # observations; before that there is no telling what is an outlier
SOLVED_EVERY = 8  # observations, unless somebody asks; solving is most of the work


class LeastSquares:
    """y = sum(coefficient * x), coefficients never negative: more work never takes less time."""

    def __init__(self, prior: Sequence[float], spread: Sequence[float]) -> None:
        """`prior`: coefficients before the first observation; `spread`: how far off they may be."""
        self.num_observations = 0
        self._prior = list(prior)
        self._certainty = [1 / (each * each) for each in spread]
        self._coefficients = list(prior)
        self._deviation = 1.0  # typical |error| in units of the assumed noise
        self._compared, self._is_like = (0, 0), True  # observations of both when they were, and what came of it
        self._begin()

    def _begin(self) -> None:
        """Nothing is known but the prior."""
        size = len(self._prior)
        self._squares = [[0.0] * size for _ in range(size)]
        self._moments = [0.0] * size
        self._energy = self._mass = 0.0  # the squares of y, and how many observations are not forgotten
        self._num_trusted = self._num_unsolved = 0
        self._run = 0  # outliers in a row on the same side, negative below

    @property
    def coefficients(self) -> list[float]:
        """Those that fit best."""
        if self._num_unsolved:
            self._num_unsolved = 0
            self._coefficients = self._solve()
        return self._coefficients

    def predict(self, x: Sequence[float]) -> float:
        """y of that x."""
        return sum(coefficient * value for coefficient, value in zip(self.coefficients, x, strict=True))

    def is_like(self, other: LeastSquares) -> bool:
        """Whether `other` explains what was observed here, but for noise (Chow, "Tests of equality between sets of
        coefficients in two linear regressions", 1960). Looked at again when either has changed."""
        seen = self.num_observations, other.num_observations // SOLVED_EVERY
        if seen != self._compared:
            self._compared = seen
            size = len(self._prior)
            freedom = self._mass - size
            own, others = self._misfit(self.coefficients), self._misfit(other.coefficients)
            self._is_like = freedom <= 1 or (others - own) / size <= UNLIKE * own / freedom
        return self._is_like

    def _misfit(self, coefficients: Sequence[float]) -> float:
        """The sum of squared errors of those coefficients, never as little as nothing."""
        rows = zip(coefficients, self._squares, self._moments, strict=True)
        found = self._energy + sum(
            each * (sum(value * other for value, other in zip(row, coefficients, strict=True)) - 2 * moment)
            for each, row, moment in rows
        )
        return max(found, LEAST_MISFIT * self._energy)

    def observe(self, x: Sequence[float], y: float) -> None:
        """Takes in one observation, `y` positive."""
        noise = RELATIVE_NOISE * y
        if self._num_trusted >= TRUSTED_AFTER:
            predicted = sum(each * value for each, value in zip(self._coefficients, x, strict=True))
            # Of what was expected, not of what came: else what took longer would always count less.
            noise = RELATIVE_NOISE * max(predicted, LEAST_EXPECTED * y) * self._doubt(predicted, y)
        self.num_observations += 1
        self._num_trusted += 1
        self._num_unsolved += 1
        weight = 1 / (noise * noise)
        self._energy = FORGETTING * self._energy + weight * y * y
        self._mass = FORGETTING * self._mass + 1
        for i, value in enumerate(x):
            self._moments[i] = FORGETTING * self._moments[i] + weight * value * y
            for j, other in enumerate(x):
                self._squares[i][j] = FORGETTING * self._squares[i][j] + weight * value * other
        if self._num_unsolved >= SOLVED_EVERY or self._num_trusted <= SOLVED_EVERY:
            _ = self.coefficients

    def _doubt(self, predicted: float, y: float) -> float:
        """By what factor an observation is less certain than usual. Many outliers on one side are no outliers: the
        engine has changed, and the fit begins anew."""
        deviation = abs(y - predicted) / (RELATIVE_NOISE * max(min(y, predicted), y * 1e-3))
        limit = OUTLIER * self._deviation
        self._deviation = max(0.5, self._deviation + 0.1 * (min(deviation, limit) - self._deviation))
        if deviation <= limit:
            self._run = 0
            return 1.0
        side = 1 if y > predicted else -1
        self._run = self._run + side if self._run * side >= 0 else side
        if abs(self._run) >= CHANGED_AFTER:
            self._begin()
            return 1.0
        return deviation / limit

    def _solve(self) -> list[float]:
        """The minimum over coefficients that are not negative: those that would be are zero, the worst first."""
        size = len(self._prior)
        matrix = [
            [self._squares[i][j] + (self._certainty[i] if i == j else 0.0) for j in range(size)] for i in range(size)
        ]
        target = [self._moments[i] + self._certainty[i] * self._prior[i] for i in range(size)]
        free = list(range(size))
        while free:
            found = _solve_positive([[matrix[i][j] for j in free] for i in free], [target[i] for i in free])
            worst = min(range(len(free)), key=lambda place: found[place] * matrix[free[place]][free[place]] ** 0.5)
            if found[worst] >= 0:
                return [found[free.index(i)] if i in free else 0.0 for i in range(size)]
            free.pop(worst)
        return [0.0] * size


def _solve_positive(matrix: list[list[float]], target: list[float]) -> list[float]:
    """x of matrix x = target by elimination. The matrix is symmetric and positive definite; its diagonal is scaled to
    one first, since features differ by many orders of magnitude."""
    size = len(target)
    scale = [matrix[i][i] ** -0.5 for i in range(size)]
    rows = [[matrix[i][j] * scale[i] * scale[j] for j in range(size)] + [target[i] * scale[i]] for i in range(size)]
    for i in range(size):
        # What is left of a feature that others explain wholly is rounding; a little keeps it from being divided by.
        pivot = max(rows[i][i], 1e-12)
        for j in range(i + 1, size):
            factor = rows[j][i] / pivot
            for k in range(i, size + 1):
                rows[j][k] -= factor * rows[i][k]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = rows[i][size] - sum(rows[i][j] * found[j] for j in range(i + 1, size))
        found[i] = rest / max(rows[i][i], 1e-12)
    return [value * each for value, each in zip(found, scale, strict=True)]
