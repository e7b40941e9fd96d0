"""What a report is made of: numbers that know where they came from, tables, pictures, artefacts.

Builders make these from result files, renderers write them as markdown, CSV and HTML. Neither
knows the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

from matplotlib.figure import Figure

NOT_RUN = "not run"


@dataclass(frozen=True)
class Source:
    """Where a number came from: a result file and the run that wrote it.

    file: below the results folder. seed: None where several runs were joined.
    """

    file: str
    command: str
    commit: str
    seed: int | None


class NotRun(Exception):
    """A result file, or what should be in it, is missing; `file` says which."""

    def __init__(self, file: str) -> None:
        super().__init__(f"{file} is missing")
        self.file = file


@dataclass(frozen=True)
class Measured:
    """A value of result files. low, high: 95 % interval; sd: over `runs` runs."""

    value: float
    sources: tuple[Source, ...]
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    runs: int = 1

    def scaled(self, factor: float) -> "Measured":
        """In another unit, e.g. percent."""
        ends = {
            name: None if getattr(self, name) is None else factor * getattr(self, name)
            for name in ("low", "high", "sd")
        }
        return replace(self, value=factor * self.value, **ends)


def over_runs(values: Sequence[Measured]) -> Measured:
    """Mean and standard deviation (n - 1) over runs with different seeds; of one run, that run."""
    if len(values) == 1:
        return values[0]
    numbers = [value.value for value in values]
    sources = joined(source for value in values for source in value.sources)
    return Measured(fmean(numbers), sources, sd=stdev(numbers), runs=len(numbers))


def joined(sources: Iterable[Source]) -> tuple[Source, ...]:
    """Each source once, in the order of their first appearance."""
    return tuple(dict.fromkeys(sources))


@dataclass(frozen=True)
class Number:
    """A cell with a number.

    text: as it is shown. value: as it goes to CSV; None where there is none. kind: `measured` by
    this repository, `paper` (the paper's own value), or `missing`.
    """

    text: str
    value: float | None
    kind: Literal["measured", "paper", "missing"]
    sources: tuple[Source, ...] = ()


Cell = str | Number


@dataclass(frozen=True)
class Table:
    """name: of its files. header and rows: first the row's title, then the cells."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib, or the bytes of a PNG. alt: what it shows, for those who cannot see
    it. sources: of everything in it.
    """

    name: str
    title: str
    alt: str
    image: Figure | bytes
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Text:
    """Free text of a run, e.g. a transcript: shown as it is, escaped."""

    title: str
    lines: tuple[str, ...]
    sources: tuple[Source, ...] = ()


Block = Table | Picture | Text


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper, or one that it lacks.

    name: what `--only` takes. place: in the paper, or "". about: paragraphs in plain text.
    remedy: the command that makes what is missing.
    """

    name: str
    title: str
    place: str
    about: tuple[str, ...]
    blocks: tuple[Block, ...]
    missing: tuple[str, ...] = ()
    remedy: str = ""


def measured(value: Measured, form: str = "{:.1f}", spread: bool = True) -> Number:
    """`value` as a cell: with "± sd" over runs, or with its interval in brackets."""
    text = form.format(value.value)
    unsigned = form.replace("+", "")
    if spread and value.sd is not None:
        text += f" ± {unsigned.format(value.sd)}"
    elif spread and value.low is not None and value.high is not None:
        text += f" ({form.format(value.low)} .. {form.format(value.high)})"
    return Number(text, value.value, "measured", value.sources)


def of_paper(value: float, form: str = "{:.2f}") -> Number:
    """The paper's own value."""
    return Number(form.format(value), value, "paper")


def missing() -> Number:
    """What was not run."""
    return Number(NOT_RUN, None, "missing")
