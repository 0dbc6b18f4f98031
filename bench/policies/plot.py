"""The sweep as a picture: a column for each mix, a row for each figure, a line for each policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.policies.results import ADAPTIVE, Row

FIGURES = (
    ("ttft_mean", "TTFT mean, s"),
    ("ttft_p99", "TTFT P99, s"),
    ("tpot_mean", "TPOT mean, s"),
    ("jct_mean", "JCT mean, s"),
    ("jct_p99", "JCT P99, s"),
    ("goodput", "good requests/s"),
)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mixes = sorted({row.mix for row in rows})
    policies = sorted({row.policy for row in rows}, key=lambda policy: (policy != ADAPTIVE, policy))
    figure, axes = pyplot.subplots(
        len(FIGURES), len(mixes), figsize=(1 + 4.5 * len(mixes), 2.4 * len(FIGURES)), squeeze=False, sharex="col"
    )
    for column, mix in enumerate(mixes):
        for line, (name, title) in enumerate(FIGURES):
            axis = axes[line][column]
            for policy in policies:
                _draw(axis, [row for row in rows if (row.mix, row.policy) == (mix, policy)], name, policy)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(title)
        axes[0][column].set_title(mix)
        axes[-1][column].set_xlabel("offered load, share of capacity")
    _finish(figure, axes[0][0], path, 2 * len(mixes))


def plot_across(rows: Sequence[Row], path: Path, figures: Sequence[tuple[str, str]], x_label: str) -> None:
    """Writes a PNG file with a panel for each of `figures`, names of columns and titles, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies = sorted({row.policy for row in rows}, key=lambda policy: (policy != ADAPTIVE, policy))
    figure, axes = pyplot.subplots(1, len(figures), figsize=(4 * len(figures), 3.6), squeeze=False)
    for axis, (name, title) in zip(axes[0], figures, strict=True):
        for policy in policies:
            _draw(axis, [row for row in rows if row.policy == policy], name, policy)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_title(title)
        axis.set_xlabel(x_label)
    _finish(figure, axes[0][0], path, len(policies))


def _finish(figure, axis, path: Path, columns: int) -> None:  # type: ignore[no-untyped-def]
    from matplotlib import pyplot

    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95 if figure.get_figheight() > 5 else 0.9))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(axis, rows: Sequence[Row], name: str, policy: str) -> None:  # type: ignore[no-untyped-def]
    """The mean over repeats, and each repeat as a dot."""
    loads = sorted({row.load for row in rows})
    means = [fmean(getattr(row, name) for row in rows if row.load == load) for load in loads]
    style = {"linewidth": 2.5, "color": "black"} if policy == ADAPTIVE else {"linewidth": 1.2}
    [line] = axis.plot(loads, means, label=policy, **style)
    axis.scatter([row.load for row in rows], [getattr(row, name) for row in rows], s=8, color=line.get_color())
