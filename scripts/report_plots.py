"""The plots of a report as inline SVG: no fonts, dates or links inside, colours of text and grid from the page around them.

Text stays text, set in the page's font. Equal studies give equal bytes.
"""
from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from arms import Arm, Study, curves

INK, RULE = "#010203", "#030201"        # stand-ins: the page gives both their colour, light or dark
COLOURS = ("#3d7fc1", "#cf7a1f", "#3f9457", "#cc5a55", "#8d6fc0", "#23949a", "#bf5f9b", "#85851d")   # on white and on black
DASHES = ("-", "--", ":", "-.")
WIDTH_IN = 6.4
POINTS = 160            # of a loss curve; longer ones are averaged in so many stretches
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False, "axes.axisbelow": True,
    "legend.frameon": False, "lines.linewidth": 1.4, "grid.linewidth": 0.6, "grid.color": RULE,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


@dataclass(frozen=True)
class Plot:
    """A figure of the page; `alt` says in words what it shows."""
    name: str
    title: str
    caption: str
    alt: str
    svg: str


def plots(study: Study) -> list[Plot]:
    """Those that the study has data for, in reading order."""
    makers: Sequence[Callable[[Study], Plot | None]] = (differences, frontier, losses, gaps, parts)
    return [plot for make in makers if (plot := make(study)) is not None]


def drawing(name: str, height_in: float, draw: Callable[[Figure], None]) -> str:
    """The SVG element of one figure."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)        # of groups nobody refers to: not unique on a page of several
    svg = re.sub(r' d="([^"]*)"', lambda path: f' d="{shorter(path[1])}"', svg)
    return svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")


def shorter(path: str) -> str:
    """A path with hundredths of a point."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), " ".join(path.split()))


def clipped(text: str, width: int) -> str:
    """Its two ends where it is too long: names of one sweep often begin alike."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:width - 1 - half]}…{text[len(text) - half:]}"


def colour(study: Study, arm: Arm) -> str:
    """Its own on all plots."""
    return COLOURS[study.arms.index(arm) % len(COLOURS)]


def dash(study: Study, arm: Arm) -> str:
    return DASHES[study.arms.index(arm) // len(COLOURS) % len(DASHES)]


def rows_of_arms(axes: Any, arms: Sequence[Arm]) -> None:
    """One line an arm, the first on top."""
    axes.set_yticks(range(len(arms)), [clipped(arm.name, 30) for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(True, axis="x")


def row_height(arms: Sequence[Arm]) -> float:
    return 0.9 + 0.3 * max(len(arms), 2)


def legend_below(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)


def legend_height(count: int) -> float:
    return 0.2 * ((count + 2) // 3)


def listed(texts: Iterable[str]) -> str:
    return "; ".join(texts) + "."


# ----------------------------------------------------------------------------------------------------------------------
# The figures.
# ----------------------------------------------------------------------------------------------------------------------


def differences(study: Study) -> Plot | None:
    """A forest plot; intervals of two seeds can be vast, so the frame follows the differences."""
    shown = [(arm, study.comparisons[arm.name]) for arm in study.arms
             if arm.name in study.comparisons and study.comparisons[arm.name].difference is not None]
    if not shown or study.control is None:
        return None
    least, control = study.smallest_effect, study.control.name
    ends = [abs(end) for _, found in shown for end in (found.difference, found.low, found.high) if end is not None]
    reach = min(1.1 * max(*ends, 2 * least), 6 * max(least, *(abs(found.difference or 0) for _, found in shown)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvspan(-least, least, color="#888888", alpha=0.2, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        for row, (arm, found) in enumerate(shown):
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [row, row], color=colour(study, arm), linewidth=2.2)
            axes.plot([found.difference or 0.0], [row], "o", color=colour(study, arm),
                      markerfacecolor="none" if found.low is None else colour(study, arm))
        rows_of_arms(axes, [arm for arm, _ in shown])
        axes.set(xlim=(-reach, reach), xlabel=f"val_bpb - {clipped(control, 30)}, paired by seed (left is better)")

    alt = listed(f"{arm.name} {found.difference:+.5f} ({found.verdict})" for arm, found in shown)
    return Plot("differences", "Paired differences to the control",
                f"Mean and 95 % interval; grey: below the smallest effect that matters, {least:g} bpb. Hollow: one pair, no"
                " interval. Intervals that leave the frame go on.", f"Difference of val_bpb to {control}: {alt}",
                drawing("differences", row_height([arm for arm, _ in shown]), draw))


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bytes, bpb), those with no other as small and as good, by bytes."""
    front: list[tuple[float, float]] = []
    for nbytes, bpb in sorted(points):
        if not front or bpb < front[-1][1]:
            front.append((nbytes, bpb))
    return front


def cap_lines(study: Study, largest_bytes: float) -> list[int]:
    """Caps that lie near the data; far above it they would flatten it."""
    found = {entry.cap_bytes for arm in study.arms for entry in arm.scored}
    return sorted(cap for cap in found if 0 < cap < 2 * largest_bytes)


def frontier(study: Study) -> Plot | None:
    means = [(arm, arm.of_summary("total_bytes")[0], arm.mean) for arm in study.arms]
    shown = [(arm, nbytes, bpb) for arm, nbytes, bpb in means if nbytes is not None and bpb is not None]
    if not shown:
        return None
    front = pareto((nbytes, bpb) for arm, nbytes, bpb in shown if not any(entry.over_cap for entry in arm.scored))
    caps = cap_lines(study, max(nbytes for _, nbytes, _ in shown))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(True)
        if front:
            axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=0.9, alpha=0.7)
        for cap in caps:
            axes.axvline(cap, color=INK, linestyle="--", linewidth=1)
            axes.annotate(f"cap {cap:,}", (cap, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
        for arm, nbytes, bpb in shown:
            mark = "x" if any(entry.over_cap for entry in arm.scored) else "o"
            seeds = [(entry.summary["total_bytes"], entry.val_bpb) for entry in arm.scored]
            axes.plot(*zip(*seeds, strict=True), ".", color=colour(study, arm), alpha=0.55, markersize=4)
            axes.plot([nbytes], [bpb], mark, color=colour(study, arm), markersize=8, label=clipped(arm.name, 28))
        axes.set(xlabel="total bytes: artifact and packed code", ylabel="val_bpb")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(5))        # numbers of eight digits must not touch
        legend_below(figure, axes)

    alt = listed(f"{arm.name} {nbytes:,.0f} bytes, {bpb:.5f}" for arm, nbytes, bpb in shown)
    return Plot("frontier", "val_bpb against total bytes",
                "Arms (large) and their runs (small). The line is the Pareto front of the arms under the cap; a cross is"
                " over its cap; the dashed line is the cap, where it is near.", f"val_bpb and total bytes: {alt}",
                drawing("frontier", 3.6 + legend_height(len(shown)), draw))


Curve = list[tuple[float, float, float, float]]         # step, mean, least, largest


def thinned(curve: Sequence[tuple[int, float, float, float]]) -> Curve:
    """At most POINTS, each the mean of a stretch of equally many."""
    stretch = -(-len(curve) // POINTS)
    groups = [curve[i:i + stretch] for i in range(0, len(curve), stretch or 1)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]  # type: ignore[misc]


def draw_curves(axes: Any, study: Study, held: Sequence[tuple[Arm, Curve]], label: str) -> None:
    """The frame holds what follows the first quarter of the steps: the start would flatten all that differs."""
    settled = 0.25 * max((curve[-1][0] for _, curve in held), default=0)
    for arm, curve in held:
        step, mean, least, largest = zip(*curve, strict=True)
        axes.fill_between(step, least, largest, color=colour(study, arm), alpha=0.2, linewidth=0)
        axes.plot(step, mean, dash(study, arm), color=colour(study, arm), label=clipped(arm.name, 28),
                  marker="o" if len(curve) < 12 else "", markersize=3)
    seen = [value for _, curve in held for step, *values in curve if step >= settled for value in values[1:]]
    if seen and max(seen) > min(seen):
        margin = 0.05 * (max(seen) - min(seen))
        axes.set_ylim(min(seen) - margin, max(seen) + margin)
    axes.grid(True)
    axes.set(xlabel="step", ylabel=label)


def losses(study: Study) -> Plot | None:
    panels = []
    for kind, label in (("val", "val_bpb, float weights"), ("train", "train loss, nats a token")):
        held = [(arm, thinned(curves(arm, kind))) for arm in study.arms]
        panels += [(label, [(arm, curve) for arm, curve in held if curve])]
    panels = [(label, held) for label, held in panels if held]
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (label, held) in zip(grid, panels, strict=True):
            draw_curves(axes, study, held, label)
        legend_below(figure, max(grid, key=lambda axes: len(axes.lines)))

    ends = listed(f"{label}: {', '.join(f'{arm.name} {curve[-1][1]:.4f}' for arm, curve in held)}" for label, held in panels)
    return Plot("losses", "Loss curves",
                "Mean over the seeds, shaded from the least to the largest, at the steps that all seeds logged;"
                f" longer curves than {POINTS} points are means of stretches. The frame is that of the last three quarters.",
                f"At the last step, {ends}", drawing("losses", 3.2 + legend_height(len(panels[0][1])), draw))


def gaps(study: Study) -> Plot | None:
    held = [(arm, arm.per_seed(lambda entry: entry.gap_bpb)) for arm in study.arms]
    held = [(arm, by_seed) for arm, by_seed in held if by_seed]
    if not held:
        return None
    means = [sum(by_seed.values()) / len(by_seed) for _, by_seed in held]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, ((arm, by_seed), mean) in enumerate(zip(held, means, strict=True)):
            axes.barh(row, mean, height=0.6, color=colour(study, arm), alpha=0.45)
            axes.plot(list(by_seed.values()), [row] * len(by_seed), "o", color=colour(study, arm), markersize=4)
        axes.axvline(0, color=INK, linewidth=0.8)
        rows_of_arms(axes, [arm for arm, _ in held])
        axes.set(xlabel="val_bpb of the artifact - val_bpb of the float weights")

    alt = listed(f"{arm.name} {mean:+.5f}" for (arm, _), mean in zip(held, means, strict=True))
    return Plot("gaps", "What the round trip costs", "Bars are means, dots are seeds. Runs whose two evaluations read"
                " different tokens are left out.", f"val_bpb after minus before the round trip: {alt}",
                drawing("gaps", row_height([arm for arm, _ in held]), draw))


def parts(study: Study) -> Plot | None:
    held = [(arm, arm.parts()) for arm in study.arms if arm.scored]
    if not held:
        return None
    totals = {name: sum(found.get(name, 0) for _, found in held) for name in dict.fromkeys(n for _, f in held for n in f)}
    names = sorted((name for name, total in totals.items() if total), key=lambda name: (name == "code", -totals[name]))
    caps = cap_lines(study, max(sum(found.values()) for _, found in held))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = [0.0] * len(held)
        for i, name in enumerate(names):
            widths = [found.get(name, 0.0) for _, found in held]
            axes.barh(range(len(held)), widths, left=left, height=0.6, color=COLOURS[i % len(COLOURS)],
                      hatch="///" if i >= len(COLOURS) else "", edgecolor=INK, linewidth=0.3, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for cap in caps:
            axes.axvline(cap, color=INK, linestyle="--", linewidth=1)
        rows_of_arms(axes, [arm for arm, _ in held])
        axes.set(xlabel="bytes, mean over the runs")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        legend_below(figure, axes)

    alt = listed(f"{arm.name} " + ", ".join(f"{name} {found[name]:,.0f}" for name in names if found.get(name))
                 for arm, found in held)
    return Plot("parts", "Where the bytes are", "Parts of the artifact as the file has them (codes of all tensors together),"
                " its metadata, and the packed code: together the total.", f"Bytes by part: {alt}",
                drawing("parts", row_height([arm for arm, _ in held]) + legend_height(len(names)), draw))
