"""Figures from summaries of result files; no number enters here by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.figure_style import BLUE, FAINT, GREEN, GREY, INK, ORANGE, VERMILLION
from eval.statistics import OVERALL

# One colour per arm, in both panels. Filled bars answer from text alone, hollow ones have visual
# thoughts in their context.
STYLES = {
    "base": {"color": GREY},
    "opsd": {"color": BLUE},
    "noise": {"color": ORANGE},
    "base_vt": {"facecolor": "none", "edgecolor": GREEN, "linewidth": 1.5},
    "base_noise_vt": {
        "facecolor": "none",
        "edgecolor": VERMILLION,
        "linewidth": 1.5,
        "hatch": "///",
    },
}
GROUP = 0.86  # width of a group of bars; the next one begins at 1
APART = 0.25  # further distance of the last group, "overall"

Bar = tuple[float, float, float]  # value, lower and upper end of its interval


def quickstart_figure(
    summary: Mapping[str, Any], arms: Mapping[str, str], title: str, whiskers: str
) -> Figure:
    """Accuracy per task and arm above; below, the KL to the base with visual thoughts.

    Args:
        summary: what `eval.summary` writes as summary.json, or `eval.seeds` as seeds.json.
        arms: arm -> title, in the order of the bars.
        whiskers: what they show, from the `low` to the `high` of each number.
    """
    tasks = summary["tasks"]
    rows = [row for name, row in tasks.items() if name != OVERALL]
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    accuracy, gap = figure.subplots(2, 1, height_ratios=(3, 2))

    bars = {arm: [_percent(row["accuracy"][arm]) for row in tasks.values()] for arm in arms}
    _groups(accuracy, bars, arms, "{:.0f}")
    n = min(row["accuracy"]["opsd"]["n"] for row in rows)
    _head(accuracy, f"Accuracy on {n} test items per task")
    accuracy.set_ylabel("accuracy, %")
    accuracy.set(ylim=(0, 108), yticks=range(0, 101, 20))
    _name_groups(accuracy, [_title(task) for task in tasks])

    after = {"opsd": "after OPSD", "noise": "after the noise control"}
    k = {"base": [_estimate(row["gap_dataset"]["k_base"]) for row in tasks.values()]}
    for arm in after:
        k[arm] = [_estimate(row["gap_dataset"]["k_after"][arm]) for row in tasks.values()]
    _groups(gap, k, {"base": "before: K_gen of the base"} | after, "{:.3f}")
    n = min(row["gap_dataset"]["n"] for row in rows)
    _head(gap, f"KL from the base with visual thoughts to the student, on {n} test texts per task")
    gap.set_ylabel("KL, nats per token")
    gap.set_ylim(0, 1.1 * max(high for values in k.values() for _, _, high in values))
    _name_groups(gap, [f"{_title(task)}\n{_closed(row)}" for task, row in tasks.items()])

    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    figure.supxlabel(
        f"Whiskers: {whiskers}. "
        "Closed: share of K_gen that is gone after training; below zero it has grown.",
        fontsize=8, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _percent(row: Mapping[str, float]) -> Bar:
    return 100 * row["accuracy"], 100 * row["low"], 100 * row["high"]


def _estimate(row: Mapping[str, float]) -> Bar:
    return row["value"], row["low"], row["high"]


def _title(task: str) -> str:
    return task.replace("_", " ")


def _closed(row: Mapping[str, Any]) -> str:
    """The gap closed by both arms, under the name of a task."""
    closed = {arm: value["value"] for arm, value in row["gap_dataset"]["gap_closed"].items()}
    return f"OPSD closed {100 * closed['opsd']:.0f} %\nnoise closed {100 * closed['noise']:.0f} %"


def _groups(
    axis: Axes, bars: Mapping[str, Sequence[Bar]], titles: Mapping[str, str], number: str
) -> None:
    """One group per task, one bar per arm, with its whisker and its value above."""
    width = GROUP / len(bars)
    for place, (arm, values) in enumerate(bars.items()):
        shift = (place - (len(bars) - 1) / 2) * width
        x = [centre + shift for centre in _centres(len(values))]
        heights = [value for value, _, _ in values]
        axis.bar(x, heights, width * 0.88, label=titles[arm], **STYLES[arm])
        ends = [[v - low for v, low, _ in values], [high - v for v, _, high in values]]
        # rounding can put a value outside an interval that ends there, and lengths have no sign
        whiskers = [[max(length, 0.0) for length in side] for side in ends]
        axis.errorbar(x, heights, whiskers, fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.5)
        for at, (value, _, high) in zip(x, values, strict=True):
            axis.annotate(
                number.format(value), (at, max(value, high)), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=7, color=INK,
            )  # fmt: skip


def _centres(groups: int) -> list[float]:
    return [*range(groups - 1), groups - 1 + APART]


def _name_groups(axis: Axes, names: Sequence[str]) -> None:
    centres = _centres(len(names))
    axis.set_xticks(centres, names, linespacing=1.4)
    axis.tick_params(axis="x", length=0, labelsize=9)
    axis.set_xlim(-0.55, centres[-1] + 0.55)
    axis.axvline((centres[-2] + centres[-1]) / 2, color=FAINT, linewidth=1)


def _head(axis: Axes, title: str) -> None:
    """Title and, below it, the legend in one row; both above the bars."""
    axis.set_title(title, loc="left", fontsize=11, pad=24)
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, ncols=5, frameon=False,
        fontsize=8.5, handlelength=1.3, columnspacing=1.6,
    )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
