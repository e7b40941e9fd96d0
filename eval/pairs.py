"""Wins and losses of one system against another, question by question (the paper's Fig. 5).

    python -m eval.pairs results/table2 --pairs opsd:thinkmorph opsd:base --output_file pairs.json

Per pair and data set: how many questions both got right, the first alone, the second alone and
neither; the difference of the accuracies with Newcombe's interval for pairs, and McNemar's exact
test. `overall` has the sums of the counts with the test on all questions together, and means over
the data sets, each counting the same, with an interval made of theirs. These are two questions, and
the answers may differ: the mean difference is over data sets, p over questions, in which a large
data set counts for more. Of systems that answered several times the first run counts.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.scores import SCORES
from eval.session import plain_parser, table
from eval.statistics import OVERALL, Estimate, mcnemar, paired, weighted_mean
from eval.table import Row, read_rows, results_of
from train.config import UsageError
from train.records import base_record, config_hash, run_info, write_records
from train.session import exit_on_user_error


@dataclass(frozen=True)
class Pair:
    """Two systems on one data set, or on several together.

    n: questions. first, second: accuracies. both, only_first, only_second, neither: questions by
    who got them right. difference: first minus second, with its 95 % interval. p: of McNemar's
    exact test. Of several data sets together first, second and difference are means over the data
    sets, the counts sums, and p that of the sums: pooled over questions, not of this difference.
    """

    n: int
    first: float
    second: float
    both: int
    only_first: int
    only_second: int
    neither: int
    difference: Estimate
    p: float


def compare(first: Mapping[str, bool], second: Mapping[str, bool]) -> Pair:
    """Two systems on one data set: question -> whether it is right.

    Raises:
        ValueError: they share no question.
    """
    found = paired(first, second)
    both = sum(right and second.get(question, False) for question, right in first.items())
    return Pair(
        found.n,
        found.first,
        found.second,
        both,
        found.only_first,
        found.only_second,
        found.n - both - found.only_first - found.only_second,
        found.difference,
        found.p,
    )


def together(pairs: Sequence[Pair]) -> Pair:
    """Several data sets as one: sums of the counts, their test, and means of accuracies."""
    counts = {
        name: sum(getattr(pair, name) for pair in pairs)
        for name in ("n", "both", "only_first", "only_second", "neither")
    }
    return Pair(
        first=fmean(pair.first for pair in pairs),
        second=fmean(pair.second for pair in pairs),
        difference=weighted_mean([pair.difference for pair in pairs]),
        p=mcnemar(counts["only_first"], counts["only_second"]),
        **counts,
    )


def compare_rows(first: Row, second: Row) -> dict[str, Pair]:
    """Data set -> pair, of those that both have answered, and `overall` at the end.

    Raises:
        UsageError: there is no such data set, or they answered different versions of one, or under
            different protocols.
    """
    pairs = {}
    for task in first.tasks:
        if task not in second.records:
            continue
        _check_comparable(first, second, task)
        results = results_of(first, task), results_of(second, task)
        if results[0].keys().isdisjoint(results[1]):
            raise UsageError(f"{task}: {first.name} and {second.name} have no question in common")
        pairs[task] = compare(*results)
    if not pairs:
        raise UsageError(
            f"{first.name} and {second.name} have no data set in common: {', '.join(first.tasks)} "
            f"against {', '.join(second.tasks)}"
        )
    return pairs | {OVERALL: together(list(pairs.values()))}


def _check_comparable(first: Row, second: Row, task: str) -> None:
    files, protocols = (
        [row.values(task)[name] for row in (first, second)]
        for name in ("file_hash", "protocol_hash")
    )
    if files[0] != files[1]:
        raise UsageError(
            f"{task}: {first.name} answered the file {files[0]}, {second.name} the file "
            f"{files[1]}: these are different questions; ask both on one file"
        )
    if protocols[0] != protocols[1]:
        names = [row.values(task)["protocol"] for row in (first, second)]
        raise UsageError(
            f"{task}: {first.name} answered under the protocol {names[0]} ({protocols[0]}), "
            f"{second.name} under {names[1]} ({protocols[1]}): prompts, budget or images differ; "
            "ask both with one --protocol"
        )


def records_of(
    first: Row, second: Row, pairs: Mapping[str, Pair], info: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A result record per data set. Commits and seed are those of the answers; `overall` names the
    data sets that it is a mean over; its p is pooled over their questions (see `Pair`).
    """
    records, tasks = [], [task for task in pairs if task != OVERALL]
    for task, pair in pairs.items():
        known = [row.records[t] for row in (first, second) for t in _origins(task, tasks)]
        seeds = {record["seed"] for record in known}
        values = asdict(pair) | {
            "tasks": tasks if task == OVERALL else [task],
            "files": [str(row.folder / SCORES) for row in (first, second)],
            "commands": list(dict.fromkeys(record["command"] for record in known)),
        }
        records.append(
            base_record(
                kind="pair",
                system=first.name,
                task=task,
                id=f"{first.name}:{second.name}",
                values=values,
                seed=seeds.pop() if len(seeds) == 1 else None,
                step=known[0]["step"],
                config_hash=config_hash({"hashes": [record["config_hash"] for record in known]}),
                info=dict(info) | {"commit": _commits(known)},
            )
        )
    return records


def _origins(task: str, tasks: Sequence[str]) -> Sequence[str]:
    """Whose records a pair comes from: of the mean, those of its data sets."""
    return tasks if task == OVERALL else [task]


def _commits(records: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(record["commit"] for record in records))


def split_pair(text: str) -> tuple[str, str]:
    """`opsd:base` -> the two names.

    Raises:
        UsageError: not two different names.
    """
    first, _, second = text.partition(":")
    if not first or not second or first == second:
        raise UsageError(f"--pairs {text}: give two systems as FIRST:SECOND, e.g. opsd:base")
    return first, second


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare every pair, write the records, print a table."""
    if args.output_file.suffix not in (".json", ".jsonl"):
        raise UsageError(f"--output_file {args.output_file} has to end in .json or .jsonl")
    names = list(dict.fromkeys(split_pair(text) for text in args.pairs))
    info = run_info()
    records: list[dict[str, Any]] = []
    for pair in names:
        first, second = read_rows(args.folders, pair)
        records += records_of(first, second, compare_rows(first, second), info)
    write_records(args.output_file, records)
    print(report(records))
    print(f"saved {args.output_file}")
    return records


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as plain text; accuracies and differences in points."""
    header = ["pair, data set", "n", "first", "second", "both", "only first", "only second"]
    header += ["neither", "difference", "95 %", "p"]
    counts = ("both", "only_first", "only_second", "neither")
    rows = []
    for record in records:
        values, difference = record["values"], record["values"]["difference"]
        rows.append(
            [
                f"{record['id']}, {record['task']}",
                str(values["n"]),
                *(f"{100 * values[name]:.2f}" for name in ("first", "second")),
                *(str(values[name]) for name in counts),
                f"{100 * difference['value']:+.2f}",
                f"{100 * difference['low']:+.1f} .. {100 * difference['high']:+.1f}",
                f"{values['p']:.2g}",
            ]
        )
    return table(header, rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = plain_parser("eval.pairs", "Wins and losses of systems, question by question.")
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="output folders of eval.run")
    add("--pairs", nargs="+", required=True, metavar="FIRST:SECOND", help="systems of the folders")
    add("--output_file", type=Path, required=True, help="records are written here, .json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        run(args)


if __name__ == "__main__":
    main()
