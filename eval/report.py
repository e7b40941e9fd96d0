"""The quickstart's table: result files in, summary.json, summary.md and summary.png out.

    python -m eval.report --results_dir results/quickstart --checkpoint_dir checkpoints/quickstart

Nothing is computed here but differences: every number is read from the files that
`eval.kl_diagnostic` and `eval.run` wrote, and names the file and the command it came from. How the
two students were trained is read from their checkpoints.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.figures import quickstart_figure
from eval.statistics import OVERALL
from train.config import UsageError
from train.records import read_records, run_info, write_atomic
from train.session import exit_on_user_error

ARMS = ("opsd", "noise")
ACCURACY = {  # folder under accuracy/ -> column
    "base": "untrained base, text-only",
    "noise": "noise control, text-only",
    "opsd": "OPSD student, text-only",
    "base_vt": "base with VT in context",
    "base_noise_vt": "base with noise VT",
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
                "k_base": values["pre"],
                "k_noise_vt": values["noise_vt"],
                "k_prompts_only": values["prompts_only"],
                "k_after": {arm: values[f"post:{arm}"] for arm in ARMS},
                "gap_closed": {arm: values["gap_closed"][arm] for arm in ARMS},
            }
    for name in ACCURACY:
        for record in _read(folder / "accuracy" / name / "scores.json", origins, folder):
            tasks[record["task"]]["accuracy"][name] = {
                key: record["values"][key]
                for key in ("n", "accuracy", "low", "high", "unparsed_rate", "seconds_per_sample")
            }
    return {"tasks": tasks, "files": origins}


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
    """The table, what it means, and where its numbers come from."""
    tasks = summary["tasks"]
    header = ["task", "K_gen of the base", "gap closed, OPSD", "gap closed, noise"]
    header += [f"{title}" for title in ACCURACY.values()]
    lines = [_line(header), _line(["---"] * len(header))]
    for task, row in tasks.items():
        gap = row["gap_dataset"]
        cells = [task if task != OVERALL else "**overall**", f"{gap['k_base']['value']:.3f}"]
        cells += [f"{100 * gap['gap_closed'][arm]['value']:.0f} %" for arm in ARMS]
        cells += [f"{100 * row['accuracy'][name]['accuracy']:.1f}" for name in ACCURACY]
        lines.append(_line(cells))
    n = {task: row["accuracy"]["opsd"]["n"] for task, row in tasks.items() if task != OVERALL}
    own = tasks[OVERALL]["gap_sample"]["gap_closed"]
    gains = summary["effect"][OVERALL]
    text = [
        "# Quickstart: what distillation did to the miniature",
        "",
        *lines,
        "",
        f"Accuracy in %, greedy decoding, {min(n.values())} test items per task; K_gen in nats per "
        f"token on {tasks[OVERALL]['gap_dataset']['n']} data set texts of the test split. "
        "Overall is the mean over tasks.",
        "",
        f"OPSD is {gains['above_base']:+.1f} points above the untrained base and "
        f"{gains['above_noise']:+.1f} above the noise control. On the base's own samples OPSD "
        f"closed {100 * own['opsd']['value']:.0f} % of the gap, noise "
        f"{100 * own['noise']['value']:.0f} %. "
        "The noise control is expected to end near the base's accuracy with a noise VT. "
        "One seed; the spread over seeds is not in this table.",
        "",
        f"Seed {summary['seed']}, commit {summary['commit']}. Files and what wrote them:",
        "",
        *(f"- `{file}`: `{origin['command']}`" for file, origin in summary["files"].items()),
    ]
    return "\n".join(text) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_summary(folder: Path, checkpoints: Path, seed: int) -> dict[str, Any]:
    """Write the three files next to the results they summarise."""
    training = training_origins(checkpoints)
    summary = {"seed": seed, **run_info(), **collect(folder)}
    summary["files"] = training | summary["files"]
    summary["effect"] = effect(summary["tasks"])
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / "summary.md", markdown(summary))
    quickstart_figure(summary, ACCURACY, folder / "summary.png")
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--results_dir", default="results/quickstart", help="what a run wrote")
    parser.add_argument(
        "--checkpoint_dir", default="checkpoints/quickstart", help="of its two students"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the run, for the record")
    args = parser.parse_args(argv)
    folder = Path(args.results_dir)
    with exit_on_user_error():
        print(markdown(write_summary(folder, Path(args.checkpoint_dir), args.seed)))
        print(f"saved {folder}/summary.json, summary.md and summary.png")


if __name__ == "__main__":
    main()
