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


def draw(
    path: Path,
    latencies: Mapping[str, Mapping[str, Any]],
    rates: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Draw the distributions of latencies, and rates by concurrency, into a PNG file.

    `latencies` has the figures of each side for `one` writer and for `many`.
    """
    figure, (lone, crowd, rate) = plt.subplots(1, 3, figsize=(18, 5.5), layout="constrained")
    _distributions(lone, "one append at a time", latencies["one"])
    _distributions(crowd, "128 writers at once", latencies["many"])
    for name, points in rates.items():
        rate.plot(*zip(*points, strict=True), marker="o", label=name, **_look(name))
    rate.set(xscale="log", xlabel="writers at once", ylabel="appends a second")
    rate.set_xticks([count for count, _ in rates[OURS]], [str(count) for count, _ in rates[OURS]])
    rate.set_title("rate")
    rate.set_ylim(bottom=0)
    rate.grid(alpha=0.3)
    rate.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _distributions(axes: Any, title: str, figures: Mapping[str, Any]) -> None:
    for name, measured in figures.items():
        ordered = sorted(measured.latencies)
        ordered = ordered[: max(1, int(0.995 * len(ordered)))]
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        axes.plot(ordered, shares, label=name, **_look(name))
    axes.set(xscale="log", xlabel="µs from call to answer", ylabel="share of appends")
    axes.set_title(title)
    axes.grid(alpha=0.3)


def _look(name: str) -> dict[str, Any]:
    return {"linewidth": 3.0, "color": "black"} if name == OURS else {"linewidth": 1.2}
