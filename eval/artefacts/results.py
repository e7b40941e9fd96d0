"""Result files of a folder, opened once and read by name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.example import DataError
from eval.artefacts.model import Measured, NotRun, Source
from train.records import read_records

Record = dict[str, Any]
OVERALL = "overall"


class Results:
    """The result files below a folder. `read` has the files that were opened, in order."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._records: dict[str, list[Record]] = {}
        self._files: dict[str, bytes] = {}

    @property
    def read(self) -> list[str]:
        return [*self._records, *self._files]

    def has(self, file: str) -> bool:
        return (self.root / file).is_file()

    def records(self, file: str) -> list[Record]:
        """All records of a file.

        Raises:
            NotRun: it is not there.
            DataError: it is damaged.
        """
        if file not in self._records:
            path = self.root / file
            if not path.is_file():
                raise NotRun(file)
            try:
                self._records[file] = read_records(path)
            except ValueError as error:
                raise _damaged(path, error) from error
        return self._records[file]

    def lines(self, file: str) -> list[Record]:
        """The objects of a jsonl file that are no records, e.g. metrics of a run.

        Raises:
            NotRun: it is not there, or empty.
            DataError: it is damaged.
        """
        content = self.content(file)
        try:
            lines = [json.loads(line) for line in content.decode().splitlines()]
        except ValueError as error:  # no JSON, or not even text
            raise _damaged(self.root / file, error) from error
        if not lines:
            raise NotRun(file)
        return lines

    def content(self, file: str) -> bytes:
        """A file that is no record, e.g. a picture.

        Raises:
            NotRun: it is not there.
        """
        if file not in self._files:
            path = self.root / file
            if not path.is_file():
                raise NotRun(file)
            self._files[file] = path.read_bytes()
        return self._files[file]

    def record(self, file: str, task: str = OVERALL, **fields: Any) -> Record:
        """The one record of a task whose other fields (id, system, step) are as given.

        Raises:
            NotRun: there is none.
            ValueError: there are several.
        """
        wanted = {"task": task, **fields}
        found = [
            record
            for record in self.records(file)
            if all(record[name] == value for name, value in wanted.items())
        ]
        if not found:
            raise NotRun(f"{file}: {task}")
        if len(found) > 1:
            raise ValueError(f"{self.root / file} has {len(found)} records of {wanted}")
        return found[0]

    def value(self, file: str, *keys: str, task: str = OVERALL, **fields: Any) -> Measured:
        """One value of a record, behind `keys`; an estimate brings its interval.

        Raises:
            NotRun: file, record or key are missing, or the value is null.
        """
        record = self.record(file, task, **fields)
        found: Any = record["values"]
        for key in keys:
            if not isinstance(found, dict) or found.get(key) is None:
                raise NotRun(f"{file}: {task}: {'/'.join(keys)}")
            found = found[key]
        sources = (source_of(file, record),)
        if isinstance(found, dict):
            return Measured(found["value"], sources, found["low"], found["high"])
        return Measured(float(found), sources)

    def share(self, file: str, key: str, task: str = OVERALL, **fields: Any) -> Measured:
        """A share in percent with the interval that stands beside it as `low` and `high`."""
        values = self.record(file, task, **fields)["values"]
        point = self.value(file, key, task=task, **fields)
        return Measured(point.value, point.sources, values["low"], values["high"]).scaled(100)

    def tasks(self, file: str) -> list[str]:
        """Tasks of a file in their order, without the mean over them."""
        names = dict.fromkeys(record["task"] for record in self.records(file))
        return [name for name in names if name != OVERALL]


def _damaged(path: Path, error: ValueError) -> DataError:
    return DataError(f"{path} is damaged ({error}); remove it, and the step is run again")


def source_of(file: str, record: Record) -> Source:
    return Source(file, record["command"], record["commit"], record["seed"])


def sources_of(file: str, records: Sequence[Record]) -> tuple[Source, ...]:
    """Where the records of a file came from, each run once."""
    return tuple(dict.fromkeys(source_of(file, record) for record in records))
