"""The picture of a run: how long appends took, and how many there were with more writers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("agg")  # no screen
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

OURS = "asyncstore"

Look = dict[str, Any]


def draw(
    path: Path,
    latencies: Mapping[str, Mapping[str, Any]],
    rates: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Draw the distributions of latencies, and rates by concurrency, into a PNG file.

    `latencies` has the figures of each side for `one` writer and for `many`.
    """
    looks = {name: _look(name, place) for place, name in enumerate(sorted(rates))}
    figure, (lone, crowd, rate) = plt.subplots(1, 3, figsize=(18, 5.5), layout="constrained")
    _distributions(lone, "one append at a time", latencies["one"], looks)
    _distributions(crowd, "128 writers at once", latencies["many"], looks)
    for name, look in looks.items():
        rate.plot(*zip(*rates[name], strict=True), marker="o", label=name, **look)
    rate.set(xscale="log", xlabel="writers at once", ylabel="appends a second")
    rate.set_xticks([count for count, _ in rates[OURS]], [str(count) for count, _ in rates[OURS]])
    rate.set_title("rate")
    rate.set_ylim(bottom=0)
    rate.grid(alpha=0.3)
    rate.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _distributions(
    axes: Any, title: str, figures: Mapping[str, Any], looks: Mapping[str, Look]
) -> None:
    for name, look in looks.items():
        ordered = sorted(figures[name].latencies)
        ordered = ordered[: max(1, int(0.995 * len(ordered)))]
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        axes.plot(ordered, shares, label=name, **look)
    axes.set(xscale="log", xlabel="µs from call to answer", ylabel="share of appends")
    axes.set_title(title)
    axes.grid(alpha=0.3)


def _look(name: str, place: int) -> Look:
    """Return a line that is the same in all panels."""
    if name == OURS:
        return {"linewidth": 3.0, "color": "black"}
    return {"linewidth": 1.2, "color": f"C{place}"}
