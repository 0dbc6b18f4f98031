"""The report as a table, as JSON and as pictures."""

from __future__ import annotations

import json
import statistics
from importlib.util import find_spec
from pathlib import Path

from rich.table import Table

from services.cli.kvbench.values import Overlap, Report


def table(report: Report) -> Table:
    """One row a ratio: what was measured, against what, and what was aimed at."""
    found = Table(box=None, title="moving KV", title_justify="left")
    for name in ("", "measured", "against"):
        found.add_column(name, no_wrap=True)
    for name in ("measured ms", "against ms", "GB/s", "ratio", "aim"):
        found.add_column(name, justify="right", no_wrap=True)
    for comparison in report.comparisons.values():
        measured, against = (statistics.median(s) for s in (comparison.measured_s, comparison.against_s))
        found.add_row(
            comparison.name,
            comparison.measured,
            comparison.against,
            f"{measured * 1e3:.2f}",
            f"{against * 1e3:.2f}",
            f"{comparison.num_bytes / measured / 1e9:.1f}" if comparison.num_bytes else "",
            f"{comparison.ratio:.2f}",
            f"{'>=' if comparison.higher_is_better else '<='} {comparison.limit:g}",
            style="" if comparison.reached else "yellow",
        )
    if (overlap := report.overlap) is not None:
        exposed, total = (statistics.median(s) for s in (overlap.exposed_s, overlap.total_s))
        found.add_row(
            f"overlap, {overlap.layers} layers",
            "exposed",
            "sum of puts",
            f"{exposed * 1e3:.2f}",
            f"{total * 1e3:.2f}",
            "",
            f"{overlap.exposed_over_total:.3f}",
            f"<= {overlap.limit:.3f}",
            style="" if overlap.exposed_over_total <= overlap.limit else "yellow",
        )
    return found


def write(report: Report, folder: Path) -> list[Path]:
    """kv.json, and kv.png where matplotlib is installed. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "kv.json"]
    written[0].write_text(json.dumps(report.flat(), indent=1) + "\n")
    if find_spec("matplotlib") is None:
        report.left_out["picture"] = "matplotlib is not installed (extra bench)"
    else:
        written.append(folder / "kv.png")
        _draw(report, written[-1])
    return written


def _draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    overlap = report.overlap
    figure = Figure(figsize=(9, 7 if overlap else 4), layout="constrained")
    axes = figure.subplots(2 if overlap else 1, 1, squeeze=False)[:, 0]
    _draw_ratios(axes[0], report)
    if overlap is not None:
        _draw_timeline(axes[1], overlap)
    figure.savefig(path, dpi=120)


def _draw_ratios(axes: object, report: Report) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for row, comparison in enumerate(report.comparisons.values()):
        color = "tab:green" if comparison.reached else "tab:orange"
        axes.barh(row, comparison.ratio, color=color, height=0.6)
        axes.plot([comparison.limit] * 2, [row - 0.4, row + 0.4], color="black")
        sign = "≥" if comparison.higher_is_better else "≤"
        text = f"{comparison.ratio:.2f}  (aim {sign} {comparison.limit:g})"
        axes.text(max(comparison.ratio, comparison.limit) + 0.03, row, text, va="center", fontsize=8)
    names = [f"{c.name}: {c.measured} / {c.against}" for c in report.comparisons.values()]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_title("ratios; the black mark is the aim", fontsize=10)


def _draw_timeline(axes: object, overlap: Overlap) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    line = overlap.timeline
    axes.axvspan(line.compute_begin_s * 1e3, line.compute_end_s * 1e3, color="tab:blue", alpha=0.2, label="computing")
    axes.plot([at * 1e3 for at, _ in line.landed], [share for _, share in line.landed], label="KV in place")
    landed_s = next((at for at, share in line.landed if share >= 1), line.landed[-1][0])
    label = "last layer ready to last byte in place"
    axes.axvspan((landed_s - line.exposed_s) * 1e3, landed_s * 1e3, color="tab:red", alpha=0.4, label=label)
    axes.set_xlabel("ms from the call", fontsize=9)
    axes.set_ylabel("share of the bytes", fontsize=9)
    axes.set_xlim(left=0)
    axes.set_title(f"one send while it is computed: {overlap.layers} layers over {overlap.link}", fontsize=10)
    axes.legend(fontsize=8, loc="upper left")
