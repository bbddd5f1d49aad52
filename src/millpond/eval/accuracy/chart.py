"""The table as a picture: accuracy against bytes, one line per policy. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millpond.errors import MillpondError


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a PNG: all questions on the left, those about the past on the right, bars of 95 %.

    Raises:
        MillpondError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MillpondError("drawing needs matplotlib: pip install 'millpond[plots]'") from None
    shown = [row for row in rows if row["streams"]]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, name in ((left, "all", "all questions"), (right, "past", "questions about the past")):
        capped: dict[str, list[dict[str, Any]]] = {}
        for row in shown:
            recent = f", {row['recent_frames']} recent frames" if row["recent_frames"] else ""
            label = f"{row['policy']}, {row['positions']}{recent}"
            if row["budget_bytes"] is None:
                style = "-" if row["policy"] == "full" else "--"
                axes.axhline(100 * row[key]["share"], color="grey", linestyle=style, linewidth=1, label=label)
            else:
                capped.setdefault(label, []).append(row)
        for index, (label, line) in enumerate(capped.items()):
            line = sorted(line, key=lambda row: row["budget_bytes"])
            shares = [100 * row[key]["share"] for row in line]
            spread = [
                [share - 100 * row[key]["low"] for share, row in zip(shares, line, strict=True)],
                [100 * row[key]["high"] - share for share, row in zip(shares, line, strict=True)],
            ]
            kib = [row["budget_bytes"] / 1024 for row in line]
            # Ten colours; the next ten lines take them again, dashed and with other markers.
            lap, colour = divmod(index, 10)
            look: dict[str, Any] = {"color": f"C{colour}", "marker": "os^vDP*X<>"[(index + 3 * lap) % 10]}
            look["linestyle"] = ["-", "--"][lap % 2]
            axes.errorbar(kib, shares, yerr=spread, capsize=2, linewidth=1.2, label=label, **look)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("budget, KiB")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    left.set_ylabel("right answers, %")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
