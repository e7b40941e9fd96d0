"""Figures with lines: radar, attention by layer, curves over training.

Functions of typed values: nothing is read from disk and no number enters by hand. None in the place
of a value means that it was not run, and the figure says so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from eval.artefacts.model import NOT_RUN, Measured
from eval.figure_style import (
    BODY,
    FAINT,
    INK,
    SMALL,
    Look,
    common_keys,
    ends,
    frame,
    line_style,
    looks_of,
    new_figure,
    plain,
    row_name,
    sized,
    stroke,
    whisker_text,
)

Row = Mapping[str, Measured | None]
Layers = Sequence[Measured]
Points = Sequence[tuple[float, Measured | None]]
NAN = float("nan")
DASHES = ((0, (1, 1)), (0, (4, 1)), (0, (6, 1, 1, 1)), (0, (1, 4)))  # of reference lines
RING = {
    "marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": INK,
    "markeredgewidth": 1.4, "linestyle": "none",
}  # fmt: skip


def radar(
    accuracy: Mapping[str, Row],
    title: str = "Accuracy by task, %",
    *,
    looks: Mapping[str, Look] | None = None,
    whiskers: str = "",
) -> Figure:
    """Accuracy in percent: system -> task -> value (Fig. 1a); the centre is 0, the rim 100.

    Systems stand a little beside each other on a spoke, so that their whiskers can be told apart.
    What was not run leaves its line open; its number stands under the task, its name below.

    Raises:
        ValueError: fewer than three tasks, or systems with different tasks.
    """
    tasks = common_keys(accuracy)
    if len(tasks) < 3:
        raise ValueError(f"a radar needs at least 3 tasks, got {tasks}")
    style = looks_of(accuracy, looks)
    figure = new_figure()
    axis = figure.subplots(subplot_kw={"projection": "polar"})
    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    spokes = [2 * math.pi * place / len(tasks) for place in range(len(tasks))]
    apart = min(0.06, 0.3 * spokes[1] / len(accuracy))
    for place, (name, row) in enumerate(accuracy.items()):
        shift = (place - (len(accuracy) - 1) / 2) * apart
        angles = [angle + shift for angle in spokes]
        heights = _heights(row[task] for task in tasks)
        closed = [*angles, angles[0] + 2 * math.pi], [*heights, heights[0]]
        axis.plot(*closed, label=name, clip_on=False, **line_style(style[name]))
        pairs = zip(angles, (row[task] for task in tasks), strict=True)
        _upright(axis, pairs, style[name].color, floor=0)  # no way through the centre
    absent = {task: [name for name in accuracy if accuracy[name][task] is None] for task in tasks}
    _name_spokes(axis, spokes, [_spoke(task, absent[task]) for task in tasks])
    handles = [stroke(name, look) for name, look in style.items()]
    gaps = [f"{task}: {', '.join(names)}" for task, names in absent.items() if names]
    caption = [f"Not run on {'; on '.join(gaps)}."] if gaps else []
    return frame(figure, 4.3, title, handles, [*whisker_text(whiskers), *caption])


def _name_spokes(axis: Axes, spokes: Sequence[float], names: Sequence[str]) -> None:
    """Names around the circle, numbers on its rings."""
    axis.set_ylim(0, 100)
    axis.set_yticks(range(20, 101, 20))
    axis.set_rlabel_position(math.degrees(spokes[1]) / 2)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.spines["polar"].set_color(FAINT)
    axis.set_xticks(spokes, names)
    sized(axis)
    for label in axis.get_yticklabels():
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
    for label, angle in zip(axis.get_xticklabels(), spokes, strict=True):
        side = math.sin(angle)
        flat = abs(side) < 0.1  # a label above or below the circle
        label.set_horizontalalignment("center" if flat else "left" if side > 0 else "right")
        height = math.cos(angle)
        label.set_verticalalignment("center" if not flat else "bottom" if height > 0 else "top")


def _spoke(task: str, absent: Sequence[str]) -> str:
    """Name of a task and how many systems were not run on it."""
    return f"{row_name(task)}\n{len(absent)} {NOT_RUN}" if absent else row_name(task)


def _heights(values: Iterable[Measured | None]) -> list[float]:
    """Numbers for a line; not-a-number, which leaves it open, where nothing was run."""
    return [NAN if value is None else value.value for value in values]


def _upright(
    axis: Axes,
    points: Iterable[tuple[float, Measured | None]],
    color: str,
    floor: float = -math.inf,
) -> None:
    """Whiskers along the second axis. floor: where they end at the latest."""
    known = [(x, *ends(value)) for x, value in points if value is not None]
    if spans := [(x, max(low, floor), high) for x, low, high in known if low < high]:
        axis.vlines(*zip(*spans, strict=True), color=color, linewidth=1, alpha=0.7)


def attention_by_layer(
    curves: Mapping[str, Mapping[str, Layers | None]],
    title: str = "Attention by source and layer",
    *,
    uniform: Mapping[str, Mapping[str, Measured]] | None = None,
    looks: Mapping[str, Look] | None = None,
    whiskers: str = "",
) -> Figure:
    """condition -> source -> share of the attention (0 to 1) per layer (Fig. 3b).

    One panel per condition, all from 0 to 1. None for a source, or a condition without sources:
    not run.

    Args:
        uniform: condition -> source -> share if all keys were attended alike; a dotted line.
    """
    sources = list(dict.fromkeys(source for panel in curves.values() for source in panel))
    style = looks_of(sources, looks)
    given = [layers for panel in curves.values() for layers in panel.values()]
    longest = max((len(layers) for layers in given if layers is not None), default=1)
    figure = new_figure()
    panels = figure.subplots(len(curves), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (condition, panel) in zip(panels, curves.items(), strict=True):
        done = {source: layers for source, layers in panel.items() if layers is not None}
        for source, layers in done.items():
            _layers(axis, source, layers, style[source])
        for source, share in (uniform or {}).get(condition, {}).items():
            _level(axis, source, share, style[source])
        absent = [source for source in sources if source not in done]
        if not done:
            _middle(axis, NOT_RUN)
        note = f" ({NOT_RUN}: {', '.join(absent)})" if done and absent else ""
        axis.set_title(condition + note, loc="left", fontsize=BODY, weight="bold", color=INK, pad=4)
        axis.set(ylim=(0, 1), ylabel="share")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        plain(axis, "y")
        sized(axis)
    panels[-1].set_xlim(0.5, longest + 0.5)
    panels[-1].set_xlabel("layer, counted from 1")
    handles = [stroke(source, look) for source, look in style.items()]
    if uniform:
        dotted = Line2D([], [], color=INK, linestyle=":", label="if all positions counted alike")
        handles.append(dotted)
    caption = ["Share of the attention from 0 to 1.", *whisker_text(whiskers)]
    return frame(figure, 1.75 * len(curves) + 0.35, title, handles, caption)


def _layers(axis: Axes, source: str, layers: Layers, look: Look) -> None:
    x = range(1, len(layers) + 1)
    every = max(1, len(layers) // 8)
    heights = [value.value for value in layers]
    axis.plot(x, heights, label=source, markevery=every, clip_on=False, **line_style(look))
    _upright(axis, zip(x, layers, strict=True), look.color)


def _level(axis: Axes, source: str, share: Measured, look: Look) -> None:
    """A dotted line with the marker of its source at the right end."""
    axis.axhline(
        share.value, color=look.color, linestyle=":", linewidth=1.3, marker=look.marker,
        markersize=4, markevery=(1, 2), clip_on=False, label=f"uniform {source}",
    )  # fmt: skip


def _middle(axis: Axes, text: str) -> None:
    axis.text(
        0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=SMALL,
        style="italic", color=INK, zorder=5,
        bbox={"facecolor": "white", "edgecolor": FAINT, "boxstyle": "round,pad=0.3"},
    )  # fmt: skip


def curves(
    series: Mapping[str, Points | None],
    title: str,
    ylabel: str,
    *,
    xlabel: str = "optimizer steps",
    references: Row | None = None,
    best: Mapping[str, float] | None = None,
    limits: tuple[float, float] | None = None,
    looks: Mapping[str, Look] | None = None,
    whiskers: str = "",
) -> Figure:
    """Values over training: name -> (step, value) in the order of steps.

    Args:
        references: name -> value of what is not trained here, as a horizontal line.
        best: name -> step of the best checkpoint, marked by a ring.
        limits: of the vertical axis; default: what the values need.

    Raises:
        ValueError: `best` names a step that its series lacks, or there are too many references.
    """
    style = looks_of(series, looks)
    figure = new_figure()
    axis = figure.subplots()
    handles = []
    for name, points in series.items():
        points = points or ()
        steps = [step for step, _ in points]
        # all markers where the line has gaps: a point between two gaps has nothing else
        every = 1 if None in [value for _, value in points] else max(1, len(points) // 12)
        heights = _heights(value for _, value in points)
        axis.plot(steps, heights, label=name, markevery=every, **line_style(style[name]))
        _upright(axis, points, style[name].color)
        handles.append(stroke(_with_gaps(name, points), style[name]))
    handles += _references(axis, references or {})
    if best:
        _ring(axis, series, best)
        handles.append(Line2D([], [], label="best on validation data", **RING))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if limits is not None:
        axis.set_ylim(*limits)
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    plain(axis, "y")
    sized(axis)
    return frame(figure, 3.3, title, handles, whisker_text(whiskers))


def _references(axis: Axes, references: Row) -> list[Line2D]:
    """Horizontal lines; their legend entries."""
    if len(references) > len(DASHES):
        raise ValueError(f"{len(references)} references, {len(DASHES)} can be told apart")
    handles = []
    for dash, (name, value) in zip(DASHES, references.items(), strict=False):
        style = {"color": INK, "linewidth": 1, "linestyle": dash}
        if value is not None:
            axis.axhline(value.value, label=name, **style)
        label = f"{name} ({NOT_RUN})" if value is None else name
        handles.append(Line2D([], [], label=label, **style))
    return handles


def _ring(axis: Axes, series: Mapping[str, Points | None], best: Mapping[str, float]) -> None:
    """A ring around the point of each series that was chosen."""
    for name, step in best.items():
        known = {at: value for at, value in series.get(name) or () if value is not None}
        if step not in known:
            raise ValueError(f"best step {step} of {name!r} is not among {list(known)}")
        axis.plot([step], [known[step].value], label=f"best {name}", zorder=5, **RING)


def _with_gaps(name: str, points: Points) -> str:
    """The name of a series and what it lacks."""
    absent = [f"{step:g}" for step, value in points if value is None]
    if len(absent) == len(points):
        return f"{name} ({NOT_RUN})"
    return f"{name} ({NOT_RUN} at {', '.join(absent)})" if absent else name
