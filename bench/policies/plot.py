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
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=2 * len(mixes), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
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
