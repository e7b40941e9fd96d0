"""What tables and figures share: values over seeds, what is missing, the values of the paper."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from data.example import DataError
from eval.aggregate import average, columns
from eval.artefacts.model import (
    Measured,
    NotRun,
    Number,
    Source,
    joined,
    measured,
    missing,
    of_paper,
    over_runs,
)
from eval.artefacts.results import OVERALL, Results, source_of
from eval.files.registry import COLUMNS, PAPER
from eval.statistics import Estimate, mcnemar, weighted_mean
from train.config import UsageError

PAPER_FILE = Path(__file__).with_name("paper.yaml")
MEAN = "mean"
PLAN = "plan.json"
Read = Callable[[int], Measured]  # a seed -> its value


@cache
def paper_values() -> Mapping[str, Any]:
    return yaml.safe_load(PAPER_FILE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class RunPlan:
    """What was to be run: plan.json of a results folder.

    command: makes what is missing. defaults, sweeps: knob -> value of the main run, other values.
    steps: updates of a run. quick: the numbers mean nothing. own_questions: each seed has test
    questions of its own.
    """

    title: str
    command: str
    config: str
    seeds: int
    defaults: Mapping[str, str]
    sweeps: Mapping[str, list[str]]
    steps: int = 0
    quick: bool = False
    own_questions: bool = True

    @classmethod
    def read(cls, folder: Path) -> "RunPlan":
        """Read plan.json.

        Raises:
            UsageError: there is none.
            DataError: it is damaged, or of another version.
        """
        file = folder / PLAN
        if not file.is_file():
            raise UsageError(f"{file} is missing: eval.reproduce writes it when it begins")
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{file} is no plan ({error}): remove it, and eval.reproduce writes it anew"
            ) from error

    def about(self) -> str:
        """A sentence on what was run."""
        seeds = f"seeds 0 to {self.seeds - 1}" if self.seeds > 1 else "seed 0"
        text = f"Made by {self.command}, {seeds}, settings of {self.config}."
        return f"{text} A quick run: its numbers mean nothing." if self.quick else text


@dataclass(frozen=True)
class Paired:
    """Two systems on the same questions of all seeds: points, the exact McNemar p, the counts."""

    difference: Measured
    p: float
    both: int
    only_first: int
    only_second: int
    neither: int
    per_seed: tuple[Measured, ...]


class Runs:
    """Results of several seeds; what was looked for and not found is noted in `missing`."""

    def __init__(self, results: Results, plan: RunPlan) -> None:
        self.results, self.plan, self.seeds = results, plan, range(plan.seeds)
        self.missing: dict[str, None] = {}

    # ---- values ----------------------------------------------------------------------------------

    def over_seeds(self, read: Read) -> Measured:
        """Mean and spread over all seeds.

        Raises:
            NotRun: one of them is missing.
        """
        return over_runs([read(seed) for seed in self.seeds])

    def found(self, read: Callable[[], Any]) -> Any:
        """What `read` gives, or None with a note where it was not run."""
        try:
            return read()
        except NotRun as error:
            self.missing[error.file] = None
            return None

    def value(self, read: Read) -> Measured | None:
        """Over all seeds, or None."""
        return self.found(lambda: self.over_seeds(read))

    def cell(self, read: Read, form: str = "{:.1f}") -> Number:
        """Over all seeds, as a cell."""
        value = self.value(read)
        return missing() if value is None else measured(value, form)

    def single(self, read: Callable[[], Measured], form: str = "{:.1f}") -> Number:
        """One value as a cell."""
        value = self.found(read)
        return missing() if value is None else measured(value, form)

    def tasks(self, file: str) -> list[str]:
        """Tasks of a file of every seed, from the first seed that has it; none where none has."""
        for seed in self.seeds:
            if self.results.has(f"seed{seed}/{file}"):
                return self.results.tasks(f"seed{seed}/{file}")
        return []

    # ---- accuracies ------------------------------------------------------------------------------

    def columns(self, folder: str, systems: Sequence[str]) -> list[str]:
        """Columns of the first of these systems that was run: data sets or the paper's nine."""
        return self.columns_in(f"seed0/{folder}", systems)

    def columns_in(self, folder: str, systems: Sequence[str]) -> list[str]:
        """Columns of the first of these systems in a folder; the mean alone where none was run."""
        for system in systems:
            file = f"{folder}/{system}/scores.json"
            if self.results.has(file):
                return list(columns_of(self.results, file))
        return [MEAN]

    def accuracy(self, folder: str, system: str, column: str) -> Read:
        """Accuracy in %: seed -> value."""
        return lambda seed: self.column(scores_of(seed, folder, system), column)

    def column(self, file: str, column: str) -> Measured:
        """One column of a file of scores, in %.

        Raises:
            NotRun: it is not there.
        """
        found = columns_of(self.results, file)
        if column not in found:
            raise NotRun(f"{file}: {column}")
        return found[column]

    def difference(self, seed: int, first: str, second: str, task: str = OVERALL) -> Measured:
        """Points between two systems on the questions of one seed."""
        file, pair = f"seed{seed}/pairs.json", f"{first}:{second}"
        return self.results.value(file, "difference", task=task, id=pair).scaled(100)

    def paired(self, first: str, second: str, task: str = OVERALL) -> Paired:
        """Two systems on the questions of all seeds together.

        Raises:
            NotRun: the pairs of a seed are missing.
        """
        records = [
            self.results.record(f"seed{seed}/pairs.json", task, id=f"{first}:{second}")
            for seed in self.seeds
        ]
        found = [record["values"] for record in records]
        both, only_first, only_second, neither = (
            sum(values[name] for values in found)
            for name in ("both", "only_first", "only_second", "neither")
        )
        estimates = [Estimate(**values["difference"]) for values in found]
        mean, p = weighted_mean(estimates), mcnemar(only_first, only_second)
        if not self.plan.own_questions:  # the same questions again are no more questions
            low, high = (fmean(getattr(e, end) for e in estimates) for end in ("low", "high"))
            mean, p = Estimate(mean.value, low, high), max(values["p"] for values in found)
        sources = tuple(
            source_of(f"seed{seed}/pairs.json", record)
            for seed, record in zip(self.seeds, records, strict=True)
        )
        return Paired(
            Measured(mean.value, sources, mean.low, mean.high).scaled(100),
            p,
            both,
            only_first,
            only_second,
            neither,
            tuple(self.difference(seed, first, second, task) for seed in self.seeds),
        )


def scores_of(seed: int, folder: str, system: str) -> str:
    """The file of scores of a system."""
    return f"seed{seed}/{folder}/{system}/scores.json"


def columns_of(results: Results, file: str) -> dict[str, Measured]:
    """Column -> accuracy in % of a file of scores, the mean last.

    Where all eleven files of the paper are there, these are its nine columns, else the data sets.

    Raises:
        NotRun: there is no such file.
    """
    records = results.records(file)
    by_task = {record["task"]: record["values"] for record in records}
    origins = {record["task"]: source_of(file, record) for record in records}
    if not set(PAPER) & set(by_task):
        return {
            MEAN if task == OVERALL else task: _share(Estimate(*_ends(values)), (origins[task],))
            for task, values in by_task.items()
        }
    nine = columns({task: values for task, values in by_task.items() if task != OVERALL})
    found = {name: column for name, column in nine.items() if column is not None}
    parts = {name: joined(origins[task] for task in COLUMNS[name]) for name in found}
    shares = {n: _share(Estimate(c.accuracy, c.low, c.high), parts[n]) for n, c in found.items()}
    mean = average(nine)
    if mean is None:
        return shares
    return shares | {
        MEAN: _share(mean, joined(source for part in parts.values() for source in part))
    }


def _ends(values: Mapping[str, Any]) -> tuple[float, float, float]:
    return values["accuracy"], values["low"], values["high"]


def _share(estimate: Estimate, sources: tuple[Source, ...]) -> Measured:
    return Measured(estimate.value, sources, estimate.low, estimate.high).scaled(100)


def from_paper(*keys: str, form: str = "{:.2f}", place: int | None = None) -> Number | str:
    """A value of the paper behind keys, "–" where it has none."""
    found: Any = paper_values()
    for key in keys:
        if key not in found:
            return "–"
        found = found[key]
    return of_paper(found if place is None else found[place], form)


def p_value(p: float) -> str:
    return "< 1e-6" if p < 1e-6 else f"{p:.2g}"


def titled(task: str) -> str:
    return task.replace("_", " ")


def sources_in(values: Sequence[Measured | None]) -> tuple[Source, ...]:
    """Of those that were run."""
    return joined(source for value in values if value is not None for source in value.sources)
