"""The quickstart over several seeds: their summaries in, one table with mean and spread out.

    python -m eval.seeds results/seeds/seed0 results/seeds/seed1 results/seeds/seed2

A seed varies data, base and run. Writes seeds.json, seeds.md and seeds.png next to the folders.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from eval.quickstart_figure import quickstart_figure
from eval.session import markdown_table
from eval.statistics import OVERALL
from eval.summary import ACCURACY, ARMS, DIAGNOSTICS
from train.config import UsageError
from train.records import run_info, write_atomic
from train.session import exit_on_user_error

Summary = dict[str, Any]


def load(folders: Sequence[Path]) -> list[Summary]:
    """The summaries of the folders.

    Raises:
        UsageError: fewer than two, one that is missing, seeds that repeat, or other tasks.
    """
    if len(folders) < 2:
        raise UsageError(f"a spread needs at least two folders, got {len(folders)}")
    summaries = []
    for folder in folders:
        file = folder / "summary.json"
        if not file.is_file():
            raise UsageError(f"{file} is missing: run scripts/quickstart.sh for it to the end")
        summaries.append(json.loads(file.read_text()))
    seeds = [summary["seed"] for summary in summaries]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"the folders are of seeds {seeds}: each seed counts once")
    tasks = list(summaries[0]["tasks"])
    for folder, summary in zip(folders, summaries, strict=True):
        if list(summary["tasks"]) != tasks:
            raise UsageError(f"{folder} has tasks {list(summary['tasks'])}, the first has {tasks}")
    return summaries


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (n - 1), least and greatest, and the values."""
    return {
        "value": fmean(values),
        "sd": stdev(values),
        "low": min(values),
        "high": max(values),
        "seeds": list(values),
    }


def merge(summaries: Sequence[Summary]) -> dict[str, dict[str, Any]]:
    """task -> the spread of everything that the summaries say of it, in their structure."""

    def over(read: Callable[[dict[str, Any]], float], task: str) -> dict[str, Any]:
        return spread([read(summary["tasks"][task]) for summary in summaries])

    tasks = {}
    for task, first in summaries[0]["tasks"].items():
        row: dict[str, Any] = {"accuracy": {}}
        for arm in ACCURACY:
            points = over(lambda r, arm=arm: r["accuracy"][arm]["accuracy"], task)
            n = first["accuracy"][arm]["n"]
            row["accuracy"][arm] = points | {"accuracy": points["value"], "n": n}
        for name in DIAGNOSTICS:
            row[name] = {
                "n": first[name]["n"],
                "k_base": over(lambda r, name=name: r[name]["k_base"]["value"], task),
                **{
                    kind: {
                        arm: over(lambda r, k=(name, kind, arm): r[k[0]][k[1]][k[2]]["value"], task)
                        for arm in ARMS
                    }
                    for kind in ("k_after", "gap_closed")
                },
            }
        row["effect"] = {
            key: spread([summary["effect"][task][key] for summary in summaries])
            for key in ("above_base", "above_noise")
        }
        tasks[task] = row
    return tasks


def markdown(merged: dict[str, Any]) -> str:
    """The tables, mean and standard deviation over seeds."""
    tasks, seeds = merged["tasks"], merged["seeds"]
    n = min(row["accuracy"]["opsd"]["n"] for row in tasks.values())
    accuracy = {
        task: [_points(row["accuracy"][arm], 100) for arm in ACCURACY]
        + [_points(row["effect"]["above_base"]), _points(row["effect"]["above_noise"])]
        for task, row in tasks.items()
    }
    gaps = {
        task: [
            f"{row['gap_dataset']['k_base']['value']:.3f} ± "
            f"{row['gap_dataset']['k_base']['sd']:.3f}",
            *(_points(row[name]["gap_closed"][arm], 100) for name in DIAGNOSTICS for arm in ARMS),
        ]
        for task, row in tasks.items()
    }
    per_seed = {
        f"seed {seed}": [
            f"{100 * tasks[OVERALL]['accuracy'][arm]['seeds'][place]:.1f}" for arm in ACCURACY
        ]
        for place, seed in enumerate(seeds)
    }
    columns = [f"{title}, {arm}" for title in ("texts", "own") for arm in ARMS]
    lines = [
        f"# Quickstart over {len(seeds)} seeds",
        "",
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; a seed varies data, "
        "base and run. Overall is the mean over tasks.",
        "",
        f"Accuracy in %, greedy decoding of {n} test items per task and seed, and the points that "
        "OPSD is above the untrained base and above the noise control. The noise control is "
        "expected to end near the base's accuracy with noise VTs.",
        "",
        *markdown_table(["task", *ACCURACY.values(), "OPSD - base", "OPSD - noise"], accuracy),
        "",
        "Overall accuracy by seed:",
        "",
        *markdown_table(["", *ACCURACY.values()], per_seed),
        "",
        "K_gen of the base in nats per token on data set texts, and the share of the gap that "
        "OPSD and the noise control closed, in %: on data set texts and on the base's own samples.",
        "",
        *markdown_table(["task", "K_gen of the base", *columns], gaps),
        "",
        f"Commits: {', '.join(merged['commits'])}. Each seed's own summary names its commands:",
        "",
        *(f"- `{file}`" for file in merged["files"]),
    ]
    return "\n".join(lines) + "\n"


def _points(values: dict[str, Any], scale: float = 1.0) -> str:
    return f"{scale * values['value']:.1f} ± {scale * values['sd']:.1f}"


def write_seeds(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the three files; returns the content of seeds.json."""
    summaries = load(folders)
    origins = [origin for summary in summaries for origin in summary["files"].values()]
    merged = {
        "seeds": [summary["seed"] for summary in summaries],
        "files": [str(folder / "summary.json") for folder in folders],
        "commits": list(dict.fromkeys(origin["commit"] for origin in origins)),
        **run_info(),
        "tasks": merge(summaries),
    }
    write_atomic(output / "seeds.json", json.dumps(merged, indent=1, allow_nan=False) + "\n")
    write_atomic(output / "seeds.md", markdown(merged))
    figure = quickstart_figure(
        merged,
        ACCURACY,
        title=f"Visual-OPSD on the miniature, mean over {len(folders)} seeds",
        whiskers="least and greatest over seeds",
    )
    figure.savefig(output / "seeds.png", dpi=150)
    return merged


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.seeds", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, help="results of a quickstart each")
    parser.add_argument("--output_dir", type=Path, help="default: the parent of the first folder")
    args = parser.parse_args(argv)
    output = args.output_dir or args.folders[0].parent
    with exit_on_user_error():
        print(markdown(write_seeds(args.folders, output)))
        print(f"saved {output}/seeds.json, seeds.md and seeds.png")


if __name__ == "__main__":
    main()
