"""The picture of a ladder of short runs, the law fitted to them, and the expected loss of the chosen run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmcore.report.curves import COLOURS, MARKERS, Points, drawing, finished, new_axes, tick


@dataclass(frozen=True, kw_only=True)
class Size:
    """One model size: the measured losses and those of the fit, both as (tokens, loss)."""

    name: str
    measured: Points
    fitted: Points


@drawing
def ladder_picture(
    sizes: Sequence[Size], *, chosen: str, tokens: float, expected: tuple[float, float, float]
) -> bytes:
    """A PNG: loss over tokens, both on logarithmic axes.

    Args:
        chosen: name of the chosen run, which the last point represents.
        expected: (low, middle, high) of its expected loss.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = new_axes("Validation loss over tokens", "tokens", "loss", (7.0, 4.4))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(
            tick
        )  # the default labels of a logarithmic axis are formulas, which are not rendered here
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8), numticks=12))
    for index, one in enumerate(sizes):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*one.fitted), color=colour, linewidth=1.0, alpha=0.7)
        if one.measured:
            axes.plot(
                *zip(*one.measured), MARKERS[index % len(MARKERS)], color=colour, label=one.name, markersize=5
            )
    low, middle, high = expected
    axes.errorbar(
        [tokens], [middle], [[middle - low], [high - middle]],
        fmt="*", color="#cf222e", markersize=11, capsize=3, label=f"{chosen}: {middle:.3f} expected",
    )  # fmt: skip
    axes.set_xmargin(0.05)
    return finished(figure, axes, format="png")
