"""Figures with bars: gains, interventions, controls, wins and losses, sweeps.

All bars lie, so that names and numbers can be read on a narrow screen. Functions of typed values:
nothing is read from disk and no number enters by hand. None in the place of a value means that it
was not run, and the figure says so.
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from eval.artefacts.model import NOT_RUN, Measured
from eval.figure_style import (
    BLUE,
    BODY,
    FAINT,
    INK,
    LOOKS,
    ORANGE,
    SMALL,
    VERMILLION,
    Look,
    bars,
    common_keys,
    cut,
    frame,
    leave_room,
    looks_of,
    name_rows,
    new_figure,
    plain,
    sized,
    swatch,
    whisker_text,
)

Row = Mapping[str, Measured | None]
Counts = tuple[int, int, int, int]
Setting = tuple[str, Measured | None, Measured | None]

ROW = 0.165  # inches per bar
AXIS = 0.55  # inches of ticks and the label below the bars
FLOOR = -100.0  # % of a gap: what has doubled it and more would flatten all other bars
BETWEEN = 0.9  # bars that would fit between two groups
GAIN, LOSS = LOOKS[0], Look(VERMILLION, "///", "s", "-")
DEFAULT, VARIED = LOOKS[0], Look("#a9a9a9", "///", "o", "-")


def gains(
    deltas: Row,
    title: str,
    *,
    xlabel: str = "difference in accuracy, percentage points",
    number: str = "{:+.1f}",
    ordered: bool = True,
    whiskers: str = "",
) -> Figure:
    """Differences by task (Figs. 1b and 7a): bars to both sides of zero.

    Args:
        deltas: task -> difference, in the unit of `xlabel`.
        ordered: the largest first, what was not run last; otherwise in the order of `deltas`.
        whiskers: what they show, for the caption.
    """
    if not deltas:
        raise ValueError("nothing to draw: pass at least one task")
    rows = list(deltas.items())
    if ordered:
        rows.sort(key=lambda row: float("inf") if row[1] is None else -row[1].value)
    figure = new_figure()
    axis = figure.subplots()
    places = [(1.3 * place, value) for place, (_, value) in enumerate(rows)]
    up = [(place, value) for place, value in places if value is None or value.value >= 0]
    down = [(place, value) for place, value in places if value is not None and value.value < 0]
    bars(axis, up, GAIN, number, "gain")
    bars(axis, down, LOSS, number, "loss")
    plain(axis, "x")
    leave_room(axis, deltas.values(), 3.8)
    bottom = places[-1][0] + 0.65
    name_rows(axis, [place for place, _ in places], [name for name, _ in rows], bottom)
    axis.set_xlabel(xlabel)
    sized(axis)
    return frame(figure, (bottom + 0.65) * 1.2 * ROW + AXIS, title, [], whisker_text(whiskers))


def interventions(
    accuracy: Mapping[str, Row],
    title: str = "Accuracy when visual thoughts are removed or replaced",
    *,
    looks: Mapping[str, Look] | None = None,
    whiskers: str = "",
) -> Figure:
    """Accuracy in percent: condition -> task -> value (Fig. 3a), a group of bars per task."""
    return _grouped(accuracy, title, "accuracy, %", "{:.1f}", looks, whiskers, top=100)


def controls(
    kl: Mapping[str, Row],
    title: str = "KL to the student's context, by what stands in the place of the visual thought",
    *,
    xlabel: str = "K_gen, nats per token",
    number: str = "{:.3f}",
    looks: Mapping[str, Look] | None = None,
    whiskers: str = "",
) -> Figure:
    """K_gen: task -> control (real, shuffled, crop, ...) -> value, a group of bars per task."""
    names = common_keys(kl)
    by_control = {name: {task: row[name] for task, row in kl.items()} for name in names}
    return _grouped(by_control, title, xlabel, number, looks, whiskers)


def _grouped(
    table: Mapping[str, Row],
    title: str,
    xlabel: str,
    number: str,
    looks: Mapping[str, Look] | None,
    whiskers: str,
    top: float = 0.0,
) -> Figure:
    """series -> group -> value; the horizontal axis reaches from zero to `top` or further."""
    groups = common_keys(table)
    style = looks_of(table, looks)
    figure = new_figure()
    axis = figure.subplots()
    pitch = len(table) + BETWEEN
    for place, (name, row) in enumerate(table.items()):
        places = [(place + pitch * group, row[key]) for group, key in enumerate(groups)]
        bars(axis, places, style[name], number, name)
    plain(axis, "x")
    leave_room(axis, [value for row in table.values() for value in row.values()], 3.8, top)
    for group in range(1, len(groups)):
        axis.axhline(pitch * group - (1 + BETWEEN) / 2, color=FAINT, linewidth=0.8)
    bottom = pitch * len(groups) - BETWEEN - 0.35
    centres = [pitch * group + (len(table) - 1) / 2 for group in range(len(groups))]
    name_rows(axis, centres, groups, bottom)
    axis.set_xlabel(xlabel)
    sized(axis)
    handles = [swatch(name, look) for name, look in style.items()]
    return frame(figure, (bottom + 0.65) * ROW + AXIS, title, handles, whisker_text(whiskers))


def wins_and_losses(
    counts: Mapping[str, Counts | None],
    first: str,
    second: str,
    *,
    p: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Who answers which questions (Fig. 5): stacked bars in percent of the questions of a task.

    Args:
        counts: task -> questions that both, only `first`, only `second` and neither got right.
        p: task -> p of McNemar's test, printed where given.

    Raises:
        ValueError: a task without questions, or a p for one that is not in `counts`.
    """
    if not counts:
        raise ValueError("nothing to draw: pass at least one task")
    if unknown := set(p or {}) - set(counts):
        raise ValueError(f"p of {sorted(unknown)[0]!r}, which has no counts")
    figure = new_figure()
    axis = figure.subplots()
    labels = ("both right", f"only {first}", f"only {second}", "neither")
    faces = ("#cfcfcf", BLUE, ORANGE, "white")
    styles = [
        {"facecolor": face, "edgecolor": INK, "linewidth": 0.6, "label": label}
        for face, label in zip(faces, labels, strict=True)
    ]
    for place, (task, row) in enumerate(counts.items()):
        if row is None:
            note = NOT_RUN
        else:
            _stack(axis, place, task, row, styles)
            note = f"n = {sum(row)}; {row[1]} wins, {row[2]} losses"
            note += f"; p = {(p or {})[task]:.2g}" if task in (p or {}) else ""
        axis.annotate(
            note, (0, place + 0.22), (0, -2), textcoords="offset points", va="top",
            fontsize=SMALL, color=INK, style="italic" if row is None else "normal",
        )  # fmt: skip
    name_rows(axis, range(len(counts)), list(counts), len(counts) - 0.3, top=-0.35)
    axis.set_xlim(0, 100)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("questions, %")
    sized(axis)
    caption = [f"Wins: only {first} is right. Losses: only {second} is."]
    caption += ["p: McNemar's exact test."] if p else []
    handles = [Patch(**style) for style in styles]
    title = title or f"Wins and losses of {first} against {second}, question by question"
    return frame(figure, (len(counts) + 0.05) * 2.7 * ROW + AXIS, title, handles, caption)


def _stack(axis: Axes, place: int, task: str, row: Counts, styles: Sequence[dict]) -> None:
    """One bar out of four parts; a part that is wide enough names its percentage."""
    if sum(row) == 0:
        raise ValueError(f"{task!r} has no questions: use None if it was not run")
    left = 0.0
    for count, style in zip(row, styles, strict=True):
        share = 100 * count / sum(row)
        axis.barh(place, share, 0.44, left=left, **style)
        if share >= 8:
            ink = "white" if style["facecolor"] == BLUE else "black"
            axis.text(
                left + share / 2, place, f"{share:.0f}", ha="center", va="center_baseline",
                fontsize=SMALL, color=ink,
            )  # fmt: skip
        left += share


def sweep(
    panels: Mapping[str, Sequence[Setting]],
    defaults: Mapping[str, str],
    title: str = "Accuracy and gap closed when one setting is changed",
    *,
    whiskers: str = "",
) -> Figure:
    """One setting changed at a time (Table 6): accuracy to the left, gap closed to the right.

    Args:
        panels: setting -> (its value, accuracy in percent, gap closed in percent).
        defaults: setting -> the value that the other panels have; drawn apart.

    Raises:
        ValueError: nothing to draw, or a default that is not among the values.
    """
    if not panels or not all(panels.values()):
        raise ValueError("nothing to draw: pass at least one setting with one value")
    figure = new_figure()
    sizes = [len(settings) + 1.6 for settings in panels.values()]
    axes = figure.subplots(
        len(panels), 2, sharex="col", height_ratios=sizes, width_ratios=(1, 1), squeeze=False
    )
    for (knob, settings), (left, right) in zip(panels.items(), axes, strict=True):
        default = defaults.get(knob)
        names = [name for name, _, _ in settings]
        if default is not None and default not in names:
            raise ValueError(f"default {default!r} of {knob!r} is not among {names}")
        _settings(left, [(name, value) for name, value, _ in settings], default)
        _settings(right, [(name, value) for name, _, value in settings], default, FLOOR)
        left.set_title(knob, loc="left", fontsize=BODY, weight="bold", color=INK, pad=3)
        right.tick_params(labelleft=False)
    every = [setting for settings in panels.values() for setting in settings]
    for left, right in axes:
        leave_room(left, [value for _, value, _ in every], 1.9, top=100)
        leave_room(right, [value and cut(value, FLOOR) for _, _, value in every], 1.9, top=1)
    axes[-1, 0].set_xlabel("accuracy, %")
    axes[-1, 1].set_xlabel("gap closed, %")
    for axis in axes.flat:
        sized(axis)
    handles = [swatch("default", DEFAULT), swatch("changed", VARIED)]
    return frame(figure, sum(sizes) * 1.35 * ROW + AXIS, title, handles, whisker_text(whiskers))


def _settings(
    axis: Axes,
    values: Sequence[tuple[str, Measured | None]],
    default: str | None,
    floor: float = -math.inf,
) -> None:
    """The bars of one setting and one quantity."""
    for place, (name, value) in enumerate(values):
        look = DEFAULT if name == default else VARIED
        bars(axis, [(place, value)], look, "{:.1f}", name, floor)
    plain(axis, "x")
    names = [f"{name} (default)" if name == default else name for name, _ in values]
    name_rows(axis, range(len(values)), names, len(values) - 0.35)
