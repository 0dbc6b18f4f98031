"""Linear models that are fitted while observations come.

Recursive least squares (Plackett, "Some theorems in least squares", Biometrika 1950) with a prior, forgetting, and
Huber's weights against outliers (Huber, "Robust estimation of a location parameter", 1964).
"""

from __future__ import annotations

from collections.abc import Sequence

FORGETTING = 0.98  # an observation counts half after 34 others
RELATIVE_NOISE = 0.1  # times on a busy machine repeat within about a tenth
OUTLIER = 3.0  # typical deviations beyond which an observation counts less and less
CHANGED_AFTER = 6  # outliers in a row on the same side
TRUSTED_AFTER = 4  # observations; before that there is no telling what is an outlier


class LeastSquares:
    """y = sum(coefficient * x), coefficients never negative: more work never takes less time."""

    def __init__(self, prior: Sequence[float], spread: Sequence[float]) -> None:
        """`prior`: coefficients before the first observation; `spread`: how far off they may be."""
        self.coefficients = list(prior)
        self.num_observations = 0
        self._limits = [each * each for each in spread]
        self._deviation = 1.0  # typical |error| in units of the assumed noise
        self._begin()

    def _begin(self) -> None:
        """The coefficients are a guess."""
        size = len(self._limits)
        self._covariance = [[self._limits[i] if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._num_trusted = 0
        self._run = 0  # outliers in a row on the same side, negative below

    def predict(self, x: Sequence[float]) -> float:
        """y of that x."""
        return sum(coefficient * value for coefficient, value in zip(self.coefficients, x, strict=True))

    def observe(self, x: Sequence[float], y: float) -> None:
        """Takes in one observation, `y` positive."""
        error = y - self.predict(x)
        noise = RELATIVE_NOISE * y
        if self._num_trusted >= TRUSTED_AFTER:
            noise *= self._doubt(error, y)
        self.num_observations += 1
        self._num_trusted += 1
        covariance = self._covariance
        projected = [sum(row[j] * x[j] for j in range(len(x))) for row in covariance]
        total = FORGETTING * noise * noise + sum(value * each for value, each in zip(x, projected, strict=True))
        gains = [each / total for each in projected]
        for i, gain in enumerate(gains):
            self.coefficients[i] = max(0.0, self.coefficients[i] + gain * error)
            for j in range(len(x)):
                covariance[i][j] = (covariance[i][j] - gain * projected[j]) / FORGETTING
        self._bound()

    def _doubt(self, error: float, y: float) -> float:
        """By what factor an observation is less certain than usual. Many outliers on one side are no outliers: the
        engine has changed, and the fit begins anew."""
        deviation = abs(error) / (RELATIVE_NOISE * max(min(y, y - error), y * 1e-3))
        limit = OUTLIER * self._deviation
        self._deviation = max(0.5, self._deviation + 0.1 * (min(deviation, limit) - self._deviation))
        if deviation <= limit:
            self._run = 0
            return 1.0
        side = 1 if error > 0 else -1
        self._run = self._run + side if self._run * side >= 0 else side
        if abs(self._run) >= CHANGED_AFTER:
            self._begin()
            return 1.0
        return deviation / limit

    def _bound(self) -> None:
        """What is not observed must not become ever less certain through forgetting alone."""
        for i, limit in enumerate(self._limits):
            if self._covariance[i][i] > limit:
                scale = (limit / self._covariance[i][i]) ** 0.5
                for j in range(len(self._limits)):
                    self._covariance[i][j] *= scale
                    self._covariance[j][i] *= scale
