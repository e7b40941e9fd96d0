"""What all figures share: colours, sizes, the frame around a picture, and bars with whiskers.

A figure is WIDTH inches wide. Its smallest text is still above 8 pixels high where a phone shows
the picture 358 pixels wide; what needs room grows in height.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from eval.artefacts.model import NOT_RUN, Measured

# Colours of Okabe and Ito, which stay apart for colour-blind eyes.
BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY = "#cc79a7", "#56b4e9", "#999999"
INK, FAINT = "#333333", "#dddddd"

WIDTH, DPI = 5.2, 200
SMALL, BODY, HEAD = 8.5, 9.0, 10.5  # points
LINE = 0.165  # inches from one line of small text to the next
MARGIN = 0.08  # inches of white around everything
MINUS = "\N{MINUS SIGN}"
NAME = 16  # characters of a row's name before it is wrapped


@dataclass(frozen=True)
class Look:
    """How one series is drawn. In grey, hatch (bars), marker and dash (lines) tell it apart."""

    color: str
    hatch: str
    marker: str
    dash: str | tuple[int, tuple[int, ...]]


_SOLID, _LONG, _SHORT, _MIXED = "-", (0, (6, 2)), (0, (2, 1)), (0, (6, 1, 1, 1))
LOOKS = (
    Look(BLUE, "", "o", _SOLID),
    Look(ORANGE, "///", "s", _LONG),
    Look(GREEN, "....", "^", _SHORT),
    Look(VERMILLION, "\\\\\\", "D", _MIXED),
    Look(PURPLE, "xxx", "v", _SOLID),
    Look(SKY, "++", "P", _LONG),
    Look(GREY, "---", "X", _SHORT),
    Look("#222222", "", "<", _MIXED),
    Look(BLUE, "|||", ">", _LONG),
    Look(ORANGE, "", "h", _SOLID),
    Look(GREEN, "\\\\", "p", _MIXED),
    Look(VERMILLION, "", "d", _SHORT),
)


def looks_of(names: Iterable[str], looks: Mapping[str, Look] | None = None) -> dict[str, Look]:
    """A look per name: those of `looks`, or else in the order of LOOKS.

    Raises:
        ValueError: no names, more than there are looks, or one that `looks` lacks.
    """
    names = list(names)
    if not names:
        raise ValueError("nothing to draw: pass at least one series")
    if looks is not None:
        if unknown := [name for name in names if name not in looks]:
            raise ValueError(f"no look for {unknown[0]!r}: add it to `looks`")
        return {name: looks[name] for name in names}
    if len(names) > len(LOOKS):
        raise ValueError(f"{len(names)} series, {len(LOOKS)} can be told apart: split the figure")
    return dict(zip(names, LOOKS, strict=False))


def common_keys(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The keys that all rows share, in the order of the first row.

    Raises:
        ValueError: no rows, no keys, or a row with other keys; what was not run is None instead.
    """
    keys = list(next(iter(table.values()), ()))
    if not keys:
        raise ValueError("nothing to draw: pass at least one row with one value")
    for name, row in table.items():
        if set(row) != set(keys):
            other = sorted(set(row) ^ set(keys))[0]
            raise ValueError(f"{name!r} and the first row differ in {other!r}: use None if not run")
    return keys


def ends(value: Measured) -> tuple[float, float]:
    """What a whisker spans: value ± sd over runs, or else the interval, or else nothing."""
    if value.sd is not None:
        return value.value - value.sd, value.value + value.sd
    if value.low is not None and value.high is not None:
        return value.low, value.high
    return value.value, value.value


def whisker_text(whiskers: str) -> list[str]:
    """The sentence of a caption that says what whiskers show; none for the empty text."""
    return [f"Whiskers: {whiskers}."] if whiskers else []


def swatch(name: str, look: Look) -> Patch:
    """Legend entry of bars."""
    return Patch(label=name, **fill(look))


def stroke(name: str, look: Look, **changes: Any) -> Line2D:
    """Legend entry of a line with markers."""
    return Line2D([], [], label=name, **(line_style(look) | changes))


def fill(look: Look) -> dict[str, Any]:
    return {"facecolor": look.color, "edgecolor": "white", "hatch": look.hatch, "linewidth": 0}


def line_style(look: Look) -> dict[str, Any]:
    return {
        "color": look.color, "linestyle": look.dash, "marker": look.marker, "linewidth": 1.4,
        "markersize": 4.5, "markeredgewidth": 0.5, "markeredgecolor": "white",
    }  # fmt: skip


def new_figure() -> Figure:
    """An empty figure; `frame` gives it its size."""
    return Figure(figsize=(WIDTH, WIDTH), dpi=DPI, layout="constrained")


def frame(
    figure: Figure, body: float, title: str, handles: Sequence[Artist], caption: Sequence[str]
) -> Figure:
    """Title and legend above the axes, caption below; the axes get `body` inches between them."""
    heading = _wrapped(title, HEAD)
    columns = _legend_columns([str(handle.get_label()) for handle in handles])
    rows = -(-len(handles) // columns)
    small_print = _wrapped(" ".join(caption), SMALL)
    above = 2 * MARGIN + len(heading) * LINE * HEAD / SMALL + (rows + 0.3) * LINE * bool(handles)
    below = MARGIN + len(small_print) * LINE
    height = above + body + below
    figure.set_size_inches(WIDTH, height)
    figure.get_layout_engine().set(
        w_pad=MARGIN, h_pad=0.06, hspace=0.02, wspace=0.02,
        rect=(0, below / height, 1, body / height),
    )  # fmt: skip
    left, top = MARGIN / WIDTH, 1 - MARGIN / height
    figure.text(
        left, top, "\n".join(heading), va="top", fontsize=HEAD, weight="bold", color=INK,
        linespacing=1.15,
    )  # fmt: skip
    if handles:
        figure.legend(
            handles=handles, loc="upper left", ncols=columns, frameon=False, fontsize=SMALL,
            bbox_to_anchor=(left, 1 - (1.5 * MARGIN + len(heading) * LINE * HEAD / SMALL) / height),
            borderaxespad=0, borderpad=0, labelspacing=0.35, handlelength=2.2, columnspacing=1.2,
            labelcolor=INK,
        )  # fmt: skip
    text = "\n".join(small_print)
    figure.text(left, MARGIN / height, text, va="bottom", fontsize=SMALL, color=INK)
    return figure


def _wrapped(text: str, size: float) -> list[str]:
    """Lines that fit the width; the mean width of a letter is below 0.62 (bold) or 0.57 em."""
    em = 0.62 if size == HEAD else 0.57
    return textwrap.wrap(text, int((WIDTH - 2 * MARGIN) * 72 / (em * size)))


def _legend_columns(labels: Sequence[str]) -> int:
    """As many columns as the longest label allows."""
    longest = max((len(label) for label in labels), default=0)
    return max(1, int((WIDTH - MARGIN) * 72 / (longest * 0.58 * SMALL + 42)))


def row_name(name: str) -> str:
    """A name beside a row, on several lines if it is long."""
    return "\n".join(textwrap.wrap(name, NAME, break_long_words=False))


def short(value: float) -> str:
    """Three digits that matter, never a power of ten."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def plain(axis: Axes, grid: str) -> None:
    """Faint grid lines behind, no box. grid: `x`, `y` or `both`."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)


def sized(axis: Axes) -> None:
    """Small tick labels, axis labels a little larger, all of them in ink."""
    axis.tick_params(labelsize=SMALL, labelcolor=INK)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(fontsize=BODY, color=INK)


def bars(
    axis: Axes,
    rows: Sequence[tuple[float, Measured | None]],
    look: Look,
    number: str,
    label: str,
    floor: float = -math.inf,
) -> None:
    """Horizontal bars with whiskers, the number at their far end; "not run" where None is.

    Args:
        rows: (place on the vertical axis, value); a bar is 0.86 high.
        number: format of the printed value.
        floor: bars end here at the latest; the number of one that goes on has an arrow.
    """
    done = [(place, cut(value, floor)) for place, value in rows if value is not None]
    printed = {place: value.value for place, value in rows if value is not None}
    places = [place for place, _ in done]
    axis.barh(places, [value.value for _, value in done], 0.86, label=label, **fill(look))
    whiskers(axis, done)
    for place, value in done:
        low, high = ends(value)
        negative = value.value < 0
        edge = min(value.value, low) if negative else max(value.value, high)
        text = number.format(printed[place]).replace("-", MINUS)
        text = f"◂ {text}" if printed[place] < floor else text
        _beside(axis, edge, place, text, -1 if negative else 1)
    for place, value in rows:
        if value is None:
            _beside(axis, 0, place, NOT_RUN, 1).set_style("italic")


def cut(value: Measured, floor: float) -> Measured:
    """A value and its ends, none of them below `floor`."""
    if value.value >= floor and min(ends(value)) >= floor:
        return value
    low, high = (max(end, floor) for end in ends(value))
    return replace(value, value=max(value.value, floor), low=low, high=high, sd=None)


def whiskers(axis: Axes, rows: Sequence[tuple[float, Measured]]) -> None:
    """A line from end to end for each value that has an interval."""
    spans = [(place, *ends(value)) for place, value in rows if ends(value) != (value.value,) * 2]
    if spans:
        places, lows, highs = zip(*spans, strict=True)
        axis.hlines(places, lows, highs, color="white", linewidth=2.6, zorder=2.5)
        axis.hlines(places, lows, highs, color="black", linewidth=1.1, zorder=3, label="whiskers")


def _beside(axis: Axes, x: float, y: float, text: str, side: int) -> Any:
    return axis.annotate(
        text, (x, y), (3 * side, 0), textcoords="offset points", va="center_baseline",
        ha="right" if side < 0 else "left", fontsize=SMALL, color=INK, zorder=4,
        annotation_clip=False,
    )  # fmt: skip


def extent(values: Iterable[Measured | None]) -> tuple[float, float]:
    """From the lowest to the highest end of bars and whiskers, zero included."""
    spans = [(*ends(value), value.value) for value in values if value is not None]
    numbers = [0.0, *(number for span in spans for number in span)]
    return min(numbers), max(numbers)


def leave_room(
    axis: Axes, values: Iterable[Measured | None], inches: float, top: float = 0.0
) -> None:
    """Horizontal limits for bars and their printed numbers, and a line at zero.

    Args:
        inches: expected width of the axis.
        top: what the axis reaches at least.
    """
    known = [value for value in values if value is not None]
    low, high = extent(known)
    high = max(high, top)
    high = high if high > low else low + 1
    left = any(value.value < 0 for value in known)  # numbers stand to the left of such bars
    room = 0.5 * (high - low) / (inches - 0.5 * (1 + left))
    axis.set_xlim(low - (room if left else 0.1 * room * (low < 0)), high + room)
    axis.axvline(0, color=INK, linewidth=1)
    axis.spines["left"].set_visible(False)


def name_rows(
    axis: Axes, centres: Sequence[float], names: Sequence[str], bottom: float, top: float = -0.65
) -> None:
    """Names beside rows, the first row on top. bottom, top: ends of the vertical axis."""
    axis.set_yticks(centres, [row_name(name) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(bottom, top)
