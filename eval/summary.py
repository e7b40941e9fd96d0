"""The quickstart's table: result files in, summary.json, summary.md and summary.png out.

    python -m eval.summary --results_dir results/quickstart --checkpoint_dir checkpoints/quickstart

Nothing is computed here but differences: every number is read from the files that
`eval.kl_diagnostic` and `eval.run` wrote, and names the file and the command it came from. How the
two students were trained is read from their checkpoints.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.interleaved import columns
from eval.quickstart_figure import quickstart_figure
from eval.session import markdown_table
from eval.statistics import OVERALL
from train.config import UsageError
from train.records import read_records, run_info, write_atomic
from train.session import exit_on_user_error

ARMS = ("opsd", "noise")
ACCURACY = {  # folder under accuracy/ -> column
    "base": "base, text-only",
    "opsd": "OPSD, text-only",
    "noise": "noise control, text-only",
    "base_vt": "base with VTs",
    "base_noise_vt": "base with noise VTs",
}
ACCURACY_VALUES = (
    "n", "accuracy", "low", "high", "unparsed_rate", "unusable_rows", "seconds_per_sample",
)  # fmt: skip
CONTROL_MEASURES = {  # measure of the diagnostic -> column
    "noise_vt": "noise",
    "shuffled_vt": "another problem's",
    "blank_vt": "blank",
    "problem_vt": "the problem again",
    "crop_vt": "a crop of it",
    "prompts_only": "none",
}
DIAGNOSTICS = {"gap_dataset": "data set texts", "gap_sample": "the base's own samples"}


def collect(folder: Path) -> dict[str, Any]:
    """All numbers of the table, per task and overall, and the origin of each file.

    Raises:
        UsageError: a result file is missing.
    """
    tasks: dict[str, dict[str, Any]] = {}
    origins: dict[str, dict[str, Any]] = {}
    for name in DIAGNOSTICS:
        for record in _read(folder / name / "summary.json", origins, folder):
            values = record["values"]
            row = tasks.setdefault(record["task"], {"accuracy": {}})
            row[name] = {
                "n": values["n"],
                "unusable_rows": values["unusable_rows"],
                "k_base": values["pre"],
                "k_controls": {control: values[control] for control in CONTROL_MEASURES},
                "k_after": {arm: values[f"post:{arm}"] for arm in ARMS},
                "gap_closed": {arm: values["gap_closed"][arm] for arm in ARMS},
            }
    for name in ACCURACY:
        for record in _read(folder / "accuracy" / name / "scores.json", origins, folder):
            tasks[record["task"]]["accuracy"][name] = {
                key: record["values"][key] for key in ACCURACY_VALUES
            }
    pictures = _read(folder / "interleaved" / "table.json", origins, folder)
    systems = {record["id"]: record["values"] for record in pictures}
    return {"tasks": tasks, "interleaved": systems, "files": origins}


def _read(file: Path, origins: dict[str, dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise UsageError(f"{file} is missing: run scripts/quickstart.sh to the end")
    records = read_records(file)
    keys = ("command", "commit", "seed", "step", "created", "hardware")
    origins[str(file.relative_to(folder))] = {key: records[0][key] for key in keys}
    return records


def training_origins(folder: Path) -> dict[str, dict[str, Any]]:
    """run.json of the last checkpoint of each arm, under its path.

    Raises:
        UsageError: an arm has no checkpoint.
    """
    origins = {}
    for arm in ARMS:
        file = folder / arm / "latest" / "run.json"
        if not file.is_file():
            raise UsageError(f"{file} is missing: run scripts/quickstart.sh to the end")
        origins[str(file)] = json.loads(file.read_text())
    return origins


def effect(tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Points of accuracy that OPSD is above the untrained base and above the noise control."""
    gains = {}
    for task, row in tasks.items():
        points = {name: 100 * value["accuracy"] for name, value in row["accuracy"].items()}
        gains[task] = {
            f"above_{other}": points["opsd"] - points[other] for other in ("base", "noise")
        }
    return gains


def markdown(summary: dict[str, Any]) -> str:
    """The tables, what they mean, and where their numbers come from."""
    tasks, files = summary["tasks"], summary["files"]
    overall = tasks[OVERALL]
    n = min(row["accuracy"]["opsd"]["n"] for row in tasks.values())
    texts = min(row["gap_dataset"]["n"] for row in tasks.values())
    own = overall["gap_sample"]["gap_closed"]
    gains = summary["effect"][OVERALL]
    commits = ", ".join(dict.fromkeys(origin["commit"] for origin in files.values()))
    unusable = sum(row["unusable_rows"] for row in _counted(overall))
    text = [
        "# Quickstart: what distillation did to the miniature",
        "",
        f"Accuracy in %, with 95 % intervals: greedy decoding of {n} test items per task.",
        "",
        *markdown_table(
            ["task", *ACCURACY.values()], {t: _accuracies(row) for t, row in tasks.items()}
        ),
        "",
        f"K_gen, the KL between the base with and without VTs, in nats per token on {texts} data "
        "set texts per task, and the share of it that training closed, with 95 % intervals.",
        "",
        *markdown_table(
            ["task", "K_gen of the base", "gap closed, OPSD", "gap closed, noise control"],
            {task: _gaps(row["gap_dataset"]) for task, row in tasks.items()},
        ),
        "",
        "The same KL with something else in the place of the visual thoughts, mean nats per token: "
        "what any picture does, a wrong one, and the prompts around them alone.",
        "",
        *markdown_table(
            ["task", "true VTs", *CONTROL_MEASURES.values()],
            {task: _controls(row["gap_dataset"]) for task, row in tasks.items()},
        ),
        "",
        f"OPSD is {gains['above_base']:+.1f} points above the untrained base and "
        f"{gains['above_noise']:+.1f} above the noise control. On the base's own samples OPSD "
        f"closed {_share(own['opsd']['value'])} of the gap, noise {_share(own['noise']['value'])}. "
        "The noise control is expected to end near the base's accuracy with noise VTs. "
        "Overall is the mean over tasks. One seed; the spread over seeds is not in these tables.",
        *([f"\n{unusable} unusable rows were passed over, see summary.json."] if unusable else []),
        "",
        "Thinking in pictures against text alone, single samples (median of paired runs):",
        "",
        *markdown_table(*columns(summary["interleaved"])),
        "",
        f"Seed {summary['seed']}, commit {commits}. Files and what wrote them:",
        "",
        *(f"- `{file}`: `{origin['command']}`" for file, origin in files.items()),
    ]
    return "\n".join(text) + "\n"


def _controls(row: dict[str, Any]) -> list[str]:
    return [f"{k['value']:.3f}" for k in (row["k_base"], *row["k_controls"].values())]


def _counted(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a task that say how many rows were unusable."""
    return [*(row[name] for name in DIAGNOSTICS), *row["accuracy"].values()]


def _accuracies(row: dict[str, Any]) -> list[str]:
    return [
        f"{100 * value['accuracy']:.1f} ({100 * value['low']:.0f} .. {100 * value['high']:.0f})"
        for value in (row["accuracy"][name] for name in ACCURACY)
    ]


def _gaps(gap: dict[str, Any]) -> list[str]:
    k = gap["k_base"]
    closed = [gap["gap_closed"][arm] for arm in ARMS]
    return [
        f"{k['value']:.3f} ({k['low']:.3f} .. {k['high']:.3f})",
        *(f"{_share(c['value'])} ({100 * c['low']:.0f} .. {100 * c['high']:.0f})" for c in closed),
    ]


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def write_summary(folder: Path, checkpoints: Path, seed: int) -> dict[str, Any]:
    """Write the three files next to the results they summarise."""
    training = training_origins(checkpoints)
    summary = {"seed": seed, **run_info(), **collect(folder)}
    summary["files"] = training | summary["files"]
    for file, origin in summary["files"].items():
        if origin["seed"] != seed:
            raise UsageError(
                f"{file} is of seed {origin['seed']}, --seed says {seed}: name that one"
            )
    summary["effect"] = effect(summary["tasks"])
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / "summary.md", markdown(summary))
    figure = quickstart_figure(
        summary,
        ACCURACY,
        title=f"Visual-OPSD on the miniature, seed {seed}",
        whiskers="95 % intervals over items and texts, not over seeds",
    )
    figure.savefig(folder / "summary.png", dpi=150)
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.summary", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--results_dir", default="results/quickstart", help="what a run wrote")
    parser.add_argument(
        "--checkpoint_dir", default="checkpoints/quickstart", help="of its two students"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    args = parser.parse_args(argv)
    folder = Path(args.results_dir)
    with exit_on_user_error():
        print(markdown(write_summary(folder, Path(args.checkpoint_dir), args.seed)))
        print(f"saved {folder}/summary.json, summary.md and summary.png")


if __name__ == "__main__":
    main()
