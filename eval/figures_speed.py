"""Figures about time: accuracy against seconds, and seconds by system, on log axes.

Functions of typed values: nothing is read from disk and no number enters by hand. None in the place
of a value means that it was not run, and the figure says so.
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eval.artefacts.model import NOT_RUN, Measured
from eval.figure_style import (
    INK,
    SMALL,
    Look,
    ends,
    frame,
    line_style,
    looks_of,
    new_figure,
    plain,
    row_name,
    short,
    sized,
    whisker_text,
)

Row = Mapping[str, Measured | None]


def pareto(
    points: Mapping[str, tuple[Measured | None, Measured | None]],
    title: str = "Accuracy against time per question",
    *,
    looks: Mapping[str, Look] | None = None,
    whiskers: str = "",
) -> Figure:
    """system -> (seconds, accuracy in percent), seconds on a log axis (Fig. 1c).

    The line is the frontier: no other system is both faster and more often right. Systems off it
    are hollow. Names and numbers stand in the legend, where they cannot cover each other.
    """
    style = looks_of(points, looks)
    done = {name: (s, a) for name, (s, a) in points.items() if s is not None and a is not None}
    best = frontier({name: (s.value, a.value) for name, (s, a) in done.items()})
    figure = new_figure()
    axis = figure.subplots()
    handles = []
    for name, look in style.items():
        hollow = {"markerfacecolor": "white", "markeredgecolor": look.color, "markeredgewidth": 1.4}
        changes = {"linestyle": "none", "markersize": 7} | ({} if name in best else hollow)
        if name not in done:
            handles.append(Line2D([], [], linestyle="none", label=f"{name}: {NOT_RUN}"))
            continue
        seconds, accuracy = done[name]
        label = f"{name}: {short(seconds.value)} s, {accuracy.value:.1f} %"
        (line,) = axis.plot(
            [seconds.value], [accuracy.value], zorder=4, label=label, **line_style(look) | changes
        )
        handles.append(line)
        axis.hlines(accuracy.value, *_positive(seconds), color=look.color, linewidth=1.1, zorder=3)
        axis.vlines(seconds.value, *ends(accuracy), color=look.color, linewidth=1.1, zorder=3)
    steps = [(done[name][0].value, done[name][1].value) for name in best]
    x, y = zip(*steps, strict=True) if steps else ((), ())
    (line,) = axis.plot(
        x, y, drawstyle="steps-post", color=INK, linewidth=1, dashes=(4, 2), label="frontier"
    )
    _seconds_axis(axis, [seconds for seconds, _ in done.values()])
    axis.set_ylabel("accuracy, %")
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.margins(y=0.12)
    plain(axis, "both")
    sized(axis)
    return frame(figure, 3.4, title, [*handles, line], whisker_text(whiskers))


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those of name -> (seconds, accuracy) that no other one beats in both, the fastest first."""
    kept: list[str] = []
    highest = -math.inf
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > highest:
            kept.append(name)
            highest = accuracy
    return kept


def latency(
    seconds: Row,
    title: str = "Time per question",
    *,
    ratios: Row | None = None,
    looks: Mapping[str, Look] | None = None,
    whiskers: str = "",
) -> Figure:
    """Seconds by system on a log axis (Fig. 7b), with their ratio to the first system.

    Args:
        ratios: system -> measured ratio, e.g. of pairs of questions, with its own interval; without
            it the ratio is that of the values of `seconds`.
    """
    style = looks_of(seconds, looks)
    names = list(seconds)
    figure = new_figure()
    axis = figure.subplots()
    done = [value for value in seconds.values() if value is not None]
    _seconds_axis(axis, done)
    for place, (name, value) in enumerate(seconds.items()):
        if value is None:
            axis.text(
                0.02, place, NOT_RUN, transform=axis.get_yaxis_transform(), style="italic",
                va="center_baseline", fontsize=SMALL, color=INK,
            )  # fmt: skip
            continue
        look = style[name]
        left = axis.get_xlim()[0]
        axis.hlines(
            place, left, value.value, color=look.color, linewidth=1.2, linestyle=(0, (1, 2))
        )
        axis.hlines(place, *_positive(value), color=look.color, linewidth=2.2)
        changes = {"linestyle": "none", "markersize": 7.5, "label": name}
        axis.plot([value.value], [place], **line_style(look) | changes)
        text = f"{short(value.value)} s{_ratio(name, seconds, ratios)}"
        axis.annotate(
            text, (1.02, place), xycoords=axis.get_yaxis_transform(), va="center_baseline",
            fontsize=SMALL, color=INK, linespacing=1.2,
        )  # fmt: skip
    plain(axis, "x")
    axis.set_yticks(range(len(names)), [row_name(name) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(names) - 0.4, -0.6)
    sized(axis)
    caption = [*whisker_text(whiskers), f"Factors (×) are relative to {names[0]}."]
    return frame(figure, 0.45 * len(names) + 0.55, title, [], caption)


def _ratio(name: str, seconds: Row, ratios: Row | None) -> str:
    """The ratio to the first system on a line of its own; nothing where it is not known."""
    value, first = seconds[name], next(iter(seconds.values()))
    if ratios is not None:
        ratio = ratios.get(name)
        if ratio is None:
            return ""
        low, high = ends(ratio)
        interval = f" ({short(low)} .. {short(high)})" if low < high else ""
        return f"\n× {short(ratio.value)}{interval}"
    return "" if value is None or first is None else f"\n× {short(value.value / first.value)}"


def _positive(value: Measured) -> tuple[float, float]:
    """Ends of a whisker for a log axis: one that reaches zero leaves the picture."""
    low, high = ends(value)
    return max(low, 1e-12), high


def _seconds_axis(axis: Axes, values: Sequence[Measured]) -> None:
    """A log axis for `values` with plain numbers as ticks."""
    lows = [max(ends(value)[0], value.value / 3) for value in values]
    left = min(lows, default=1.0) / 1.25
    right = max((ends(value)[1] for value in values), default=10.0) * 1.25
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    decades = math.log10(right / left)
    subs = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("seconds per question, log scale")
