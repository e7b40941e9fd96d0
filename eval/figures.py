"""Figures from summaries of result files; no number enters here by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from eval.statistics import OVERALL

matplotlib.use("Agg")  # no screen needed

COLOURS = {  # one hue per arm, the same in all panels
    "base": "#9aa5b1",
    "noise": "#c9a227",
    "opsd": "#2a6fbb",
    "base_vt": "#3c8d5a",
    "base_noise_vt": "#b8b8b8",
}


def quickstart_figure(summary: Mapping[str, Any], arms: Mapping[str, str], file: Path) -> None:
    """Accuracy per task and arm (with intervals) above, K_gen before and after below."""
    tasks = summary["tasks"]
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    accuracy, gap = figure.subplots(2, 1, height_ratios=(3, 2))
    _grouped_bars(
        accuracy,
        tasks,
        {name: [_accuracy_bar(row["accuracy"][name]) for row in tasks.values()] for name in arms},
        arms,
    )
    accuracy.set_ylabel("accuracy, %")
    accuracy.set_ylim(0, 105)
    k = {
        "base": [_k_bar(row["gap_dataset"]["k_base"]) for row in tasks.values()],
        "noise": [_k_bar(row["gap_dataset"]["k_after"]["noise"]) for row in tasks.values()],
        "opsd": [_k_bar(row["gap_dataset"]["k_after"]["opsd"]) for row in tasks.values()],
    }
    titles = {"base": "before", "noise": "after the noise control", "opsd": "after OPSD"}
    _grouped_bars(gap, tasks, k, titles)
    gap.set_ylabel("KL to the base with VTs,\nnats per token")
    figure.suptitle(f"Visual-OPSD on the miniature, seed {summary['seed']}, test split")
    figure.savefig(file, dpi=150)


def _accuracy_bar(row: Mapping[str, float]) -> tuple[float, float, float]:
    return 100 * row["accuracy"], 100 * row["low"], 100 * row["high"]


def _k_bar(estimate: Mapping[str, float]) -> tuple[float, float, float]:
    return estimate["value"], estimate["low"], estimate["high"]


def _grouped_bars(
    axis: Any,
    tasks: Mapping[str, Any],
    bars: Mapping[str, list[tuple[float, float, float]]],
    titles: Mapping[str, str],
) -> None:
    """One group per task, one bar per arm: (value, low, high) each."""
    width = 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        places = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(tasks))]
        heights = [value for value, _, _ in values]
        errors = [
            [max(value - low, 0) for value, low, _ in values],
            [max(high - value, 0) for value, _, high in values],
        ]
        axis.bar(places, heights, width * 0.92, color=COLOURS[name], label=titles[name])
        axis.errorbar(places, heights, errors, fmt="none", ecolor="#333333", elinewidth=0.8)
    labels = [task.replace("_", " ") if task != OVERALL else "overall" for task in tasks]
    axis.set_xticks(range(len(tasks)), labels)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.18))
