"""Any set of systems in one table: accuracy, tokens, what could not be read, paired tests.

    python -m eval.table results/table2 [results/other ...] [--baseline thinkmorph-text]

Reads what `eval.run` left, in one folder or several, and writes table.md and table.json into the
first. Numbers come from scores.json and predictions.jsonl only.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.aggregate import average, columns, unit_results
from eval.files.registry import COLUMNS
from eval.predictions import PREDICTIONS, read_settings
from eval.scores import SCORES, scored
from eval.session import markdown_table, plain_parser, table
from eval.statistics import OVERALL, paired
from train.config import UsageError
from train.records import base_record, read_records, run_info, write_atomic, write_records
from train.session import exit_on_user_error

Values = Mapping[str, Any]
Cells = dict[str, list[str]]
TABLE = ("table.md", "table.json")
NOTHING = "–"
DETAILS = "Details, rates in %"
PAIRED = "Against the baseline, points; exact McNemar test on the first run"
READINGS = "Other readings of the same answers, %"
ONLY_WRITTEN = (DETAILS, READINGS, PAIRED)  # long, and not for a terminal


@dataclass(frozen=True)
class Row:
    """One system: its folder and the records of its scores.json by data set."""

    folder: Path
    records: Mapping[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.records[OVERALL]["system"]

    @property
    def tasks(self) -> list[str]:
        return [task for task in self.records if task != OVERALL]

    def values(self, task: str) -> Values:
        return self.records[task]["values"]


def read_rows(folders: Sequence[Path], names: Sequence[str] = ()) -> list[Row]:
    """Systems in the order asked for, or all of them by name.

    Raises:
        UsageError: no system, one that is asked for is missing, or a name stands in two folders.
    """
    found: dict[str, Row] = {}
    for folder in folders:
        for file in sorted(folder.glob(f"*/{SCORES}")):
            row = Row(file.parent, {record["task"]: record for record in read_records(file)})
            if row.name in found:
                raise UsageError(
                    f"{row.name} is in {found[row.name].folder} and {row.folder}: give one of them "
                    "another name in --systems (NAME:SYSTEM=CHECKPOINT)"
                )
            found[row.name] = row
    if not found:
        raise UsageError(f"{', '.join(map(str, folders))}: no SYSTEM/{SCORES} in there")
    if missing := [name for name in names if name not in found]:
        raise UsageError(f"{', '.join(missing)}: not among {', '.join(found)}")
    return [found[name] for name in names] if names else list(found.values())


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Data sets of any of the systems, in the order in which they are met."""
    return list(dict.fromkeys(task for row in rows for task in row.tasks))


def accuracies(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """Per system the accuracy on every data set, in %, and their mean where all are there."""
    tasks = tasks_of(rows)
    cells = {}
    for row in rows:
        line = [_percent(row, task) for task in tasks]
        complete = set(tasks) <= set(row.tasks)
        cells[row.name] = [*line, _percent(row, OVERALL) if complete else NOTHING]
    return ["system", *tasks, "mean"], cells


def _percent(row: Row, task: str) -> str:
    if task not in row.records:
        return NOTHING
    values = row.values(task)
    spread = f" ± {100 * values['accuracy_std']:.1f}" if "accuracy_std" in values else ""
    return f"{100 * values['accuracy']:.2f}{spread}"


def paper_columns(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """The nine columns of the paper and their average, which needs all nine."""
    cells, names = {}, []
    for row in rows:
        found = columns({task: row.values(task) for task in row.tasks})
        names = list(found)
        shares = [column and column.accuracy for column in found.values()]
        mean = average(found)
        cells[row.name] = [
            NOTHING if share is None else f"{100 * share:.2f}"
            for share in (*shares, mean and mean.value)
        ]
    return ["system", *names, "Avg"], cells


def tokens(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """Per system the mean output tokens on every data set, and their mean."""
    tasks = tasks_of(rows)
    cells = {
        row.name: [
            _number(row.values(task), "mean_tokens") if task in row.records else NOTHING
            for task in [*tasks, OVERALL]
        ]
        for row in rows
    }
    return ["system", *tasks, "mean"], cells


def details(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """Per system and data set: n, interval, what was not read or not answered, seconds."""
    header = [
        "system, data set", "n", "accuracy", "95 %", "unread", "failed", "cut off", "judged",
        "pictures", "s/answer", "batch",
    ]  # fmt: skip
    cells = {}
    for row in rows:
        for task in row.tasks:
            v = row.values(task)
            shares = ("unparsed_rate", "error_rate", "budget_rate", "judged_rate")
            cells[f"{row.name}, {task}"] = [
                str(v["n"]),
                f"{100 * v['accuracy']:.2f}",
                f"{100 * v['low']:.1f} .. {100 * v['high']:.1f}",
                *(f"{100 * v[name]:.1f}" for name in shares),
                f"{v['mean_pictures']:.2f}",
                NOTHING if v["seconds_per_sample"] is None else f"{v['seconds_per_sample']:.4f}",
                str(v["batch_size"]),
            ]
    return header, cells


def readings(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """What else is published of a data set, or can be said of it, beside its accuracy."""
    names = {
        "row_accuracy": "every row alone",
        "pair_accuracy": "both of a pair",
        "vanilla": "first rotation",
        "unflawed_accuracy": "without labels known to be wrong",
    }
    cells = {}
    for row in rows:
        for task in row.tasks:
            values = row.values(task)
            others = set(names) & set(values) - {"row_accuracy"}
            if others or values["row_accuracy"] != values["accuracy"]:
                shares = [values.get(name) for name in ("accuracy", *names)]
                cells[f"{row.name}, {task}"] = [
                    NOTHING if share is None else f"{100 * share:.2f}" for share in shares
                ]
        for name, column in columns({task: row.values(task) for task in row.tasks}).items():
            if column is not None and len(COLUMNS[name]) > 1:
                both = [f"{100 * share:.2f}" for share in (column.accuracy, column.pooled)]
                cells[f"{row.name}, {name}"] = both + [NOTHING] * (len(names) - 1)
    return ["system, data set", "accuracy", *names.values()], cells


def comparisons(rows: Sequence[Row], baseline: str) -> tuple[list[str], Cells]:
    """Every other system against one of them, on the questions that both answered."""
    header = ["system, data set", "n", f"above {baseline}", "95 %", "only it", "only other", "p"]
    (base,) = [row for row in rows if row.name == baseline]
    cells = {}
    for row in rows:
        for task in row.tasks if row is not base else []:
            if task not in base.records:
                continue
            pair = paired(results_of(row, task), results_of(base, task))
            difference = pair.difference
            cells[f"{row.name}, {task}"] = [
                str(pair.n),
                f"{100 * difference.value:+.2f}",
                f"{100 * difference.low:+.1f} .. {100 * difference.high:+.1f}",
                str(pair.only_first),
                str(pair.only_second),
                f"{pair.p:.2g}",
            ]
    return header, cells


def results_of(row: Row, task: str) -> dict[str, bool]:
    """Question -> whether it is right, of the first run; rotations and pairs as they are scored.

    Raises:
        UsageError: the predictions are gone.
    """
    file = row.folder / task / PREDICTIONS
    if not file.is_file():
        raise UsageError(f"{file} is gone: score again with eval.scores, or answer it again")
    rows = [scored(record) for record in read_records(file) if record["values"]["run"] == 0]
    partial = read_settings(file.parent)["settings"]["limit"] is not None
    return unit_results(task, rows, partial)


def _number(values: Values, name: str) -> str:
    return NOTHING if values.get(name) is None else f"{values[name]:.1f}"


def sections(rows: Sequence[Row], baseline: str) -> dict[str, tuple[list[str], Cells]]:
    """Title -> header and cells of every table."""
    found = {"Accuracy, %": accuracies(rows)}
    if any(value != NOTHING for line in paper_columns(rows)[1].values() for value in line):
        found["The nine columns of the paper, %"] = paper_columns(rows)
    found["Output tokens per answer"] = tokens(rows)
    found[DETAILS] = details(rows)
    if readings(rows)[1]:
        found[READINGS] = readings(rows)
    if len(rows) > 1:
        found[PAIRED] = comparisons(rows, baseline)
    return found


def origins(rows: Sequence[Row]) -> list[str]:
    """A line per system, or per way in which its data sets were asked: what it is, and where its
    numbers come from.
    """
    lines = []
    for row in rows:
        told: dict[str, list[str]] = {}
        for task in row.tasks:
            record, values = row.records[task], row.values(task)
            note = f" ({values['note']})" if values["note"] else ""
            told.setdefault(
                f"- {row.name}: {values['title']}{note}; protocol {values['protocol']} "
                f"({values['protocol_hash']}), judge {values['judge']}, seed {record['seed']}, "
                f"{values['dtype']}, commit {record['commit']}, `{record['command']}`",
                [],
            ).append(task)
        for text, tasks in told.items():
            lines.append(text if len(told) == 1 else f"{text}: {', '.join(tasks)}")
    return lines


def show(folders: Sequence[Path], names: Sequence[str] = (), baseline: str | None = None) -> None:
    """Print all tables; write table.md and table.json into the first folder."""
    rows = read_rows(folders, names)
    baseline = baseline or rows[0].name
    if baseline not in [row.name for row in rows]:
        known = ", ".join(row.name for row in rows)
        raise UsageError(f"--baseline {baseline} is not one of {known}")
    found = sections(rows, baseline)
    text = ["# Evaluation", ""]
    for title, (header, cells) in found.items():
        if title not in ONLY_WRITTEN:
            print(f"\n{title}")
            print(table(header, [[name, *line] for name, line in cells.items()]))
        text += [f"## {title}", "", *markdown_table(header, cells), ""]
    text += ["## Where the numbers come from", "", *origins(rows), ""]
    write_atomic(folders[0] / "table.md", "\n".join(text))
    info = run_info()
    records = [
        base_record(
            kind="table",
            system=row.name,
            task=task,
            id=row.name,
            values={**row.values(task), "file": str(row.folder / SCORES)},
            seed=record["seed"],
            step=record["step"],
            config_hash=record["config_hash"],
            info={**info, "commit": record["commit"], "command": record["command"]},
        )
        for row in rows
        for task, record in row.records.items()
    ]
    write_records(folders[0] / "table.json", records)
    print("\n" + "\n".join(origins(rows)))
    print(f"\nsaved {folders[0]}/table.md, with intervals, rates and paired tests, and table.json")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = plain_parser("eval.table", "Any set of evaluated systems in one table.")
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="output folders of eval.run")
    add("--systems", nargs="+", default=[], help="rows in this order; default: all by name")
    add("--baseline", help="the system that the others are compared with; default: the first")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        show(args.folders, args.systems, args.baseline)


if __name__ == "__main__":
    main()
