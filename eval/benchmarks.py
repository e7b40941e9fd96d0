"""Benchmarks by name: the eleven files of the paper, the miniature tasks, data sets of one's own.

`open_benchmark` finds the file, says which version it is, and gives one `Sample` per question; any
data set in the schema of the training data can be asked as well. Pictures are decoded when a sample
is asked for.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data.example import (
    PROBLEM_COLUMN,
    DataError,
    Example,
    ExampleError,
    Fields,
    decode_example,
)
from data.parquet import ParquetSource, resolve_root
from eval.files.originals import LAYOUTS, find_tables, read_tables
from eval.files.questions import ask_table, counted, first_rows, left_out, make_sample, oddities
from eval.files.registry import ALIASES, BENCHMARKS, PAPER, Benchmark, folded, label_version
from eval.files.rows import Table, check_unique, clipped, damage, hash_tables
from eval.files.tsv import read_tsv
from eval.protocol import PromptStyle
from eval.sample import Question, Sample
from train.config import UsageError

ROOT_VARIABLE = "LMUData"


@dataclass(frozen=True)
class Dataset:
    """The questions of one benchmark; `dataset[i]` decodes the pictures of question i.

    file: the TSV, or the folder of an original. file_hash: first 12 hex digits of the SHA-256 of
    the tables. label_version: which version of the labels this is. notices: what a reader of the
    scores has to know. left_out: rows of the file that cannot be used. ids: of the questions, in
    order.
    """

    name: str
    file: str
    file_hash: str
    label_version: str
    notices: list[str]
    left_out: int
    ids: list[str]
    make: Callable[[int], Sample] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`.

        Raises:
            DataError: its pictures cannot be decoded, although they looked whole.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {self.name} with {len(self)} questions")
        return self.make(index)


def benchmark_root(given: str | None = None) -> Path:
    """Folder of the benchmarks: the argument, else $LMUData, else ~/LMUData."""
    return Path(given or os.environ.get(ROOT_VARIABLE) or "~/LMUData").expanduser()


def resolve(names: Sequence[str], data_root: str | Path | None = None) -> list[str]:
    """Names and aliases in any case -> names of data sets, each once, in the order given.

    Raises:
        UsageError: a name is neither known nor a data set in the data root.
    """
    own = _own_sets(resolve_root(data_root))
    known = {folded(name): (name,) for name in (*own, *BENCHMARKS)}
    known |= {folded(name): names for name, names in ALIASES.items()}
    # Two folders may differ in case alone.
    known |= {name: (name,) for name in own if known[folded(name)][0] in own}
    found: dict[str, None] = {}
    for name in names:
        chosen = known.get(name) or known.get(folded(name))
        if chosen is None:
            raise UsageError(
                f"--benchmarks {name}: there is {', '.join(BENCHMARKS)}; for several: "
                f"{', '.join(ALIASES)}; in {resolve_root(data_root)}: "
                f"{', '.join(name for name in own if name not in BENCHMARKS) or 'no others'}"
            )
        found |= dict.fromkeys(chosen)
    return list(found)


def open_benchmark(
    name: str,
    *,
    root: Path,
    data_root: str | Path | None,
    style: PromptStyle,
    split: str = "test",
    limit: int | None = None,
) -> Dataset:
    """Open one data set.

    Args:
        name: as `resolve` gives it.
        root: folder of the benchmarks.
        data_root, split: of the miniature tasks and other data sets in their schema; benchmarks
            have the one split that the paper uses.
        limit: the first questions only. Pairs and rotations stay whole: what would take part of a
            group ends before it, but one group there always is.

    Raises:
        UsageError: there is no such data set, or no file of it; says where to get it.
        DataError: the file is damaged, lacks columns or has no usable row.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    name, *others = resolve([name], data_root)
    if others:
        raise UsageError(f"open {name} and {', '.join(others)} one by one")
    if name not in PAPER:
        return _open_examples(name, resolve_root(data_root), split, limit)
    benchmark = BENCHMARKS[name]
    table, notices = _read(benchmark, root)
    asked = ask_table(table, benchmark, style)
    usable = [item for item in asked if not item.fault]
    faults = [(item.row.id, item.fault) for item in asked if item.fault]
    lost = left_out(faults, len(asked))
    if not usable:
        raise DataError(
            f"{table.place}: {lost[0] if lost else 'it has no rows'}; needed are pictures "
            f"and the columns {', '.join(benchmark.needs)}. Download it again, or check its columns"
        )
    version, known = label_version(benchmark, table)
    notices += [*counted(benchmark, asked), *known, *oddities(benchmark, asked), *lost]
    usable = first_rows(usable, limit)
    return Dataset(
        name=name,
        file=str(table.place),
        file_hash=table.sha256[:12],
        label_version=version,
        notices=notices,
        left_out=len(faults),
        ids=[item.row.id for item in usable],
        make=partial(make_sample, usable, benchmark, table.place),
    )


def _read(benchmark: Benchmark, root: Path) -> tuple[Table, list[str]]:
    """The table, from the TSV where there is one; and what to say about the choice."""
    name, layout = benchmark.name, LAYOUTS[benchmark.name]
    tsv = root / f"{name}.tsv"
    folders = [root / folder for folder in benchmark.folders if (root / folder).is_dir()]
    files = {folder: find_tables(folder, layout) for folder in folders}
    found = [folder for folder in folders if files[folder]]
    if tsv.is_file():
        notices = [f"{tsv} is read, not the folder {folder}" for folder in found]
        return read_tsv(tsv, root / "images" / name, benchmark.needs), notices
    if found:
        notices = [f"{found[0]} is read, not {folder}" for folder in found[1:]]
        if benchmark.rule == "maze":
            notices.append("prompts are those of the original, which need not ask for \\boxed{}")
        return read_tables(found[0], files[found[0]], layout), notices
    wanted = f"{' or '.join(layout.files)}{f' of the split {layout.split}' if layout.split else ''}"
    empty = f" ({folders[0]} has no {wanted})" if folders else ""
    raise UsageError(
        f"{name} is not in {root}{empty}: put {name}.tsv there, from {benchmark.tsv}, or the "
        f"original {benchmark.original} into {root / benchmark.folders[0]}/. Another folder is "
        f"--benchmark_root or ${ROOT_VARIABLE}; `python -m data.miniworld.benchmarks --output "
        "FOLDER` draws imitations"
    )


def first_samples(name: str, data_root: str | Path | None, split: str, limit: int) -> list[Sample]:
    """The first questions of a data set in the schema of the training data, decoded.

    Raises:
        UsageError, DataError: see `open_benchmark`.
    """
    places = {"root": benchmark_root(), "data_root": data_root}
    dataset = open_benchmark(name, **places, style=PromptStyle(), split=split, limit=limit)
    return [dataset[number] for number in range(len(dataset))]


# --- data sets in the schema of the training data -------------------------------------------------


def _own_sets(root: Path) -> list[str]:
    return sorted({file.parts[-3] for file in root.glob("*/data/*.parquet")})


def _open_examples(name: str, root: Path, split: str, limit: int | None) -> Dataset:
    """Questions of a training data set; the sample has the row with its visual thoughts."""
    question = Fields(visual_thoughts=False, thoughts=False, full_text_only_thought=False)
    source = ParquetSource(root, name, split, question)
    ids, numbers, faults = [], [], []
    for number in range(len(source)):
        row = source.row(number)
        id = str(number if row.get("pid") is None else row["pid"])
        if fault := _example_fault(row):
            faults.append((id, fault))
        else:
            ids.append(id)
            numbers.append(number)
    place = root / name / "data"
    check_unique([*ids, *(id for id, _ in faults)], place)
    if not ids:
        raise DataError(
            f"{place}: none of {len(source)} rows can be used: row {clipped(faults[0][0])}: "
            f"{faults[0][1]}"
        )
    names = [set(pq.read_schema(file).names) for file in source.files]
    whole = Fields(
        visual_thoughts=all("reasoning_image_0" in columns for columns in names),
        full_text_only_thought=all("full_text_only_thought" in columns for columns in names),
    )
    return Dataset(
        name=name,
        file=str(place),
        file_hash=hash_tables(source.files, place)[:12],
        label_version=f"training schema, split {split}",
        notices=left_out(faults, len(source)),
        left_out=len(faults),
        ids=ids[:limit],
        make=partial(_make_example, ParquetSource(root, name, split, whole), numbers, ids),
    )


def _example_fault(row: Mapping[str, Any]) -> str:
    for column in ("question", "answer"):
        if not str(row[column] or "").strip():
            return f"its {column} is empty"
    data = (row[PROBLEM_COLUMN] or {}).get("bytes")
    if not data:
        return "it has no picture"
    found = damage(data)
    return f"its picture is {found}" if found else ""


def _make_example(
    source: ParquetSource, numbers: Sequence[int], ids: Sequence[str], index: int
) -> Sample:
    def read(place: int) -> Example:
        number = numbers[place]
        file = source.file_of(number)
        return decode_example(source.row(number), source.name, number, source.fields, file)

    example = read(index)
    return Sample(
        benchmark=source.name,
        id=ids[index],
        prompt=(example.problem_image, example.question),
        question=Question("match", example.answer),
        category=example.task,
        example=example,
        other=partial(_other_example, read, ids, index, source.name),
    )


def _other_example(
    read: Callable[[int], Example], ids: Sequence[str], index: int, name: str
) -> Example:
    """The nearest row before row `index` that has visual thoughts, going round at the beginning; of
    the first row, the nearest behind it. Rows that cannot be decoded are passed over: each is told
    where it is asked itself.

    Raises:
        DataError: no other row has any.
    """
    step = -1 if index else 1
    for distance in range(1, len(ids)):
        try:
            other = read((index + step * distance) % len(ids))
        except ExampleError:
            continue
        if other.visual_thoughts:
            return other
    others = len(ids) - 1
    told = f"none of the {others} other rows has any" if others else "there is no other row"
    raise DataError(
        f"{name}, row {ids[index]}: the visual thoughts of another row are to be shown, and "
        f"{told}; add rows that have some, or leave out the contexts and modes called shuffled"
    )
